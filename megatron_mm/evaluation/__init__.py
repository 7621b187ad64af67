"""Questions, answers, scores, and probes of a forward pass."""
