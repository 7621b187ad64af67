"""What a run costs, planned and counted."""
