"""Isolators: they take a free chunk out of the guest's allocator, so that nobody can use it."""
