"""How often a model answers each row rightly, and what is chosen by that."""
