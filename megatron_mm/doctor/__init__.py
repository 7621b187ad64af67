"""Checks of machines and jobs before a run."""
