"""Planted faults: each breaks one thing in a run, so that `salsa doctor` can be judged by where it puts the blame.

python -m tests.faults --out runs/faults            # every kind, and 20 healthy runs; goes on where it stopped
python -m tests.faults --out runs/faults --only "reward:*"
"""
