"""What outlives a host agent that is killed."""
