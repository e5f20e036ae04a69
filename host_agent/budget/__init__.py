"""How much memory the guests of a host may use together, and who keeps them to it."""
