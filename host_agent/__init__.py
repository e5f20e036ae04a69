"""The host agent: makes and attaches guests, reclaims hinted memory, keeps books, serves gRPC."""
