"""How a free chunk is taken out of the guest's allocator, so that nobody can use it."""
