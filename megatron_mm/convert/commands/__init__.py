"""Commands of conversion, one module each; `tools/` starts them."""
