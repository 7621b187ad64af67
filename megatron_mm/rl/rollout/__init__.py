"""From rows to microbatches of scored completions."""
