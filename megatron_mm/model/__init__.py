"""The model's computation: one pipeline stage of the fused model."""
