"""One optimizer step on any layout, and collective decisions of ranks."""
