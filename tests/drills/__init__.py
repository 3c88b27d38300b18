"""Faults made on purpose, for longer than a test may take: `python -m tests.drills`."""
