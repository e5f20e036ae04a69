"""`python -m orchestrator` is `hintfleet`."""

from orchestrator.cli import main

main()
