"""Rows of the files that people have: JSONL, parquet, other projects' forms."""
