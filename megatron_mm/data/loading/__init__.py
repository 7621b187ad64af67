"""Order of rows, packing, and the resumable loader."""
