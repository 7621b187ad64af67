"""The page, the charts and the metrics log of a run."""
