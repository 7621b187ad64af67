"""Files that travel with an export of a model with looks or glimpses."""
