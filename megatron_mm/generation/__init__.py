"""Generation of completions on any layout."""
