"""Isolators, which take free chunks out of the guest's allocator, so that nobody can use them, and
give them back."""
