"""What a run costs: planned, counted, measured."""
