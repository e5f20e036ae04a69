"""What trials came to: figures, statistics, and the store on disk."""
