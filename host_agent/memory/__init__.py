"""A guest's RAM on the host: punches, looks (which pages are resident), books."""
