"""Conversion from and to Hugging Face folders."""
