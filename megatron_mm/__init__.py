"""Train Qwen3-Next fused with InternViT on megatron-core's parallel layers."""

__version__ = "0.1.0"
