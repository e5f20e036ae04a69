"""The state that outlives a host agent that is killed."""
