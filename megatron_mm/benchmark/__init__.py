"""Measured cost of runs; both sides of a comparison take turns in one process."""
