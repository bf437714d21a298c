"""Benchmarks: ratios taken in one run, never a timed test. `python -m benchmarks` runs the CPU part."""
