"""The state that outlives a host agent, even one that is killed."""
