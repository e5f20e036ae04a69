"""The CLI `hintfleet`: experiments on Ray, the result store, statistics and the fleet service."""
