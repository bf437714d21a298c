"""Studies: what a method gains on real text; minutes to hours each. `python -m benchmarks.studies` lists them."""
