"""Report page, charts and metrics log of a run."""
