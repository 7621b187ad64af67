"""Reinforcement learning: rewards, advantages, policy losses and the router's reward."""
