"""Timings of this package against transformers' and of CLVR; `tools/benchmark.py` runs them."""
