"""Sharded checkpoints: exact, and loadable on any layout."""
