"""The command, the loop, and what a run starts from."""
