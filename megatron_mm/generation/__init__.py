"""Completions of prompts, on any layout."""
