"""A guest's RAM as the host sees it: punches, looks, books."""
