"""The commands of `hintfleet`, a module each."""
