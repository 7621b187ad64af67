"""Whose code computes the layers."""
