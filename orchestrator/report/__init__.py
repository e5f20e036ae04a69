"""A run as one HTML file, or its main plot as a picture. Needs the extra `report`."""
