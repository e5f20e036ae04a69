"""Results of trials: figures, statistics, and the store on disk."""
