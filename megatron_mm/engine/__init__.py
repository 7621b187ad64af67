"""One optimizer step on any layout, and how ranks act together."""
