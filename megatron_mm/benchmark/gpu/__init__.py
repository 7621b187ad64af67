"""Checks for a short visit to a GPU."""
