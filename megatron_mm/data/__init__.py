"""What a sample, an image and a token are, and which of them a rank reads next."""
