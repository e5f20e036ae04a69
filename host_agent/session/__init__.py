"""A guest's streams: which are welcome, what may be sent on them, and which batches may run."""
