"""Kinds of layers: a letter of the pattern each, by settings alone."""
