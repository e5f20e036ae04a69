"""The memory of a guest, and which of it is free."""
