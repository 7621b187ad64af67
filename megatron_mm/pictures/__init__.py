"""Decodes image files that nobody has vouched for. See README.md."""
