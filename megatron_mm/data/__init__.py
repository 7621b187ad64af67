"""Samples: rows, images, tokens and microbatches, without megatron."""
