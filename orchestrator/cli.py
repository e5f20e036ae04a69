"""The command line of `hintfleet`.

A command imports what it needs when it runs, so `--help` is fast. Results and help go to stdout;
everything else (progress, hints, errors, logs) goes to stderr.
"""

from __future__ import annotations

import logging
from contextlib import suppress

import click

from hintfleet import logs, program
from orchestrator.commands.cluster import cluster
from orchestrator.commands.compare import compare
from orchestrator.commands.doctor import doctor
from orchestrator.commands.domains import attach, detach, domains, guests
from orchestrator.commands.experiments import experiments
from orchestrator.commands.export import export
from orchestrator.commands.pki import pki
from orchestrator.commands.report import report
from orchestrator.commands.run import run
from orchestrator.commands.runs import runs, show
from orchestrator.commands.savings import savings
from orchestrator.commands.serve import serve

_EPILOG = """\b
Examples:
  hintfleet doctor                      what this machine can run
  hintfleet run quickstart              an experiment of the catalogue
  hintfleet run my.yaml -o json         an experiment of your own; JSON on stdout
  hintfleet show latest                 the results of the newest run
  hintfleet report latest               its results as one HTML file with plots
  hintfleet compare 4ynra latest        two runs of one spec; --fail-on: a gate for CI
  hintfleet export latest > all.csv     its samples, with the run's parameters in each row
  hintfleet savings --by host --since 1h
  hintfleet cluster                     what the nodes of a Ray cluster could run

\b
Environment: HINTFLEET_TLS, LIBVIRT_DEFAULT_URI, XDG_DATA_HOME, NO_COLOR; RAY_ADDRESS
(auto, or HOST:PORT of a Ray cluster; this machine must be a node of it). Proxies are
not used.
Exit codes: 0 done, 1 failed, 2 wrong usage or input, 3 undecided (the figures cannot
be trusted), 130 interrupted.
Shell completion: eval "$(_HINTFLEET_COMPLETE=bash_source hintfleet)"
"""


def _version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        from hintfleet import __version__

        click.echo(f"hintfleet {__version__}")
        context.exit()


@click.group(
    epilog=_EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version,
    help="Print the version.",
)  # fmt: skip
@click.option(
    "--log-level", type=click.Choice(logs.LEVELS),
    help="Also write log records of this level and above to stderr.  [default: no log]",
)  # fmt: skip
@click.option(
    "--log-format", type=click.Choice(logs.FORMATS), default="text", show_default=True,
    help="Log as text with NAME=VALUE fields, or as one JSON object per line.",
)  # fmt: skip
@click.pass_context
def cli(context: click.Context, log_level: str | None, log_format: str) -> None:
    """A lab for memory overcommit: measure how much host memory free page hinting gives
    back, what it costs, and which method is best, on real guests and a whole fleet."""
    if log_level is not None:
        logs.configure(log_level, log_format)
    else:
        # Without a handler, warnings and errors would go to logging.lastResort, and be printed
        # (hintfleet/program.py).
        logging.getLogger("hintfleet").addHandler(logging.NullHandler())
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for command in (
    attach,
    cluster,
    compare,
    detach,
    doctor,
    domains,
    experiments,
    export,
    guests,
    pki,
    report,
    run,
    runs,
    show,
    savings,
    serve,
):
    cli.add_command(command)


def run_command(arguments: list[str]) -> int:
    """Run a command line and return its exit code. Errors are printed on stderr."""
    return program.run(lambda: _invoke(arguments), _tell, "hintfleet[orchestrator]")


def _invoke(arguments: list[str]) -> int:
    try:
        # In standalone mode, click would call sys.exit() and ignore what a command returns, which
        # is its exit code.
        return int(cli.main(arguments, prog_name="hintfleet", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort as error:  # click raises it for KeyboardInterrupt and EOFError
        # No command prompts, so an EOFError is a bug, and is reported as one.
        cause = error.__cause__
        raise (cause if isinstance(cause, EOFError) else KeyboardInterrupt) from error


def _tell(message: str) -> None:
    with suppress(OSError):  # stderr may be closed or full; the exit code still counts
        click.secho("error: ", fg="red", bold=True, err=True, nl=False)
    program.say(message)
