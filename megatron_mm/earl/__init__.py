"""EARL: experts of their own for every skill, and their reward."""
