"""Sharded checkpoints that restore a run bitwise and load on any layout."""
