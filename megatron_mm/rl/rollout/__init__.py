"""Rollouts: prompts, completions, scores, and the steps made of them."""
