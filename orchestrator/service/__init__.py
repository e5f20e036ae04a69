"""The fleet service: answers questions about results over gRPC."""
