"""Everything that can go wrong does, at random moments drawn from a seed; then a checker reads the recorded history.

`drill.py` is the story. `system.py` builds the real stack out of processes, `load.py` is its client, `faults.py` what befalls
it, `gather.py` writes down what came of it as a `History`, and `checker.py` holds that against the rules.
"""
