"""The order of rows, packing, and the resumable loader."""
