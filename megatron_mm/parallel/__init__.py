"""Where tensors are: process groups, the wire, slices of parameters."""
