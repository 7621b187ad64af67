"""Reinforcement learning: advantages, policy losses, rollouts, rewards."""
