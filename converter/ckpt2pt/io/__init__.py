"""Files and bytes: complete reads and writes, checksums, small documents, what the operating system refuses."""
