"""Mimic learning: what a teacher's routes and answers teach."""
