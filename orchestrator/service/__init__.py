"""The fleet service: results over gRPC."""
