"""Published models, a folder each (README.md says what stands in one)."""
