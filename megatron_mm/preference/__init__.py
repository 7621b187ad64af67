"""Training on preference pairs: a better and a worse answer to the same prompt."""
