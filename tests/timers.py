"""How exact times are."""

EARLY = 0.001
"""Seconds by which a timer may come early: libuv, below uvloop, counts in whole milliseconds."""
