"""A guest's RAM on the host: punches and their fence, looks (which pages are resident), books."""
