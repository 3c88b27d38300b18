"""Faults as tools of their own, for tests, drills and benchmarks: a proxy that fails on demand, a stand-in for AlloyDB."""
