"""The host agent's gRPC services and metrics."""
