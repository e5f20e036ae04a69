"""What memory a guest has and what of it is free."""
