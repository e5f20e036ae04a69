"""Output: the live view of a run, sentences and tables for people, and some of it as plain data."""
