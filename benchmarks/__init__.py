"""Benchmarks: `python -m benchmarks NAME --help`. They time nothing whose check is red, and write JSON lines."""
