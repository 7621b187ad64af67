"""What a run would use on this machine, and what is missing."""
