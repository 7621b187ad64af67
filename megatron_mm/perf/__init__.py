"""Costs of a run, planned and counted."""
