"""Benchmarks: what `gspn-core bench` and `benchmarks/gpu.py` in the source tree share, and the CPU cases."""
