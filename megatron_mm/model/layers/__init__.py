"""The layers, a file each."""
