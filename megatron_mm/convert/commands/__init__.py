"""The converting commands, one module each; `tools/` starts them."""
