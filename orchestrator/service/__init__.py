"""The fleet service, which answers questions about results over gRPC, and its client."""
