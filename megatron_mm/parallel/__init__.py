"""Process groups, sharding of sequences and parameters, and the pipeline wire."""
