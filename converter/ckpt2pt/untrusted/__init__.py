"""Files that anybody may have written: JSON within bounds, and what a file of another program is."""
