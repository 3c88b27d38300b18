"""What Proctor costs, measured beside its peer in one run and given as a ratio: `python -m tests.benchmarks`."""
