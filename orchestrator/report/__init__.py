"""Makes an HTML report of a run, or a picture of its main plot. Needs the pip extra `report`."""
