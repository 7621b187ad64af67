"""Gated DeltaNet (linear attention)."""
