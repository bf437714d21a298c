"""Benchmarks: ratios taken in one run, never a timed test (`python -m benchmarks`); longer studies in studies/."""
