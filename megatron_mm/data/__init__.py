"""Rows, images, tokens, samples and microbatches. Imports no megatron."""
