"""InternViT, the vision encoder."""
