"""Names and layers: what a parameter is called on each side, and which rank holds it.  Pure: no files."""
