"""Questions, answers, scores, and what a pass looks like inside."""
