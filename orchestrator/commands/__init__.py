"""The commands of `hintfleet`, and what they share: options, output, the summary of a run."""
