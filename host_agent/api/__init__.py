"""The host agent's gRPC services and metrics; attaching, detaching and adopting of guests."""
