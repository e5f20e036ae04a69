"""What a user asks for: experiment specs, read, checked and frozen."""
