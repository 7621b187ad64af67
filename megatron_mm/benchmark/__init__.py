"""What a run costs, measured: both sides in one run, interleaved."""
