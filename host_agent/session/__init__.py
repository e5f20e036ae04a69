"""A guest's streams: which of them are welcome, and what they may ask for."""
