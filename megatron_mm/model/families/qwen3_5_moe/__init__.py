"""The text model of Qwen3.5-MoE."""
