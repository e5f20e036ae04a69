"""Runs on a host: makes guests, reclaims what they hint, keeps the books, serves gRPC."""
