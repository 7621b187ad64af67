"""What is computed: one pipeline stage of the fused model."""
