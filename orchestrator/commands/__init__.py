"""The commands of `hintfleet`, one module each."""
