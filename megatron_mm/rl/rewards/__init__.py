"""Reward functions, and the processes they run in. Nothing here imports torch."""
