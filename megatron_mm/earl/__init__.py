"""EARL: experts of their own for each skill, found, rewarded and taught."""
