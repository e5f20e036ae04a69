"""The host agent: makes guests, reclaims what they hint, keeps the books, serves gRPC."""
