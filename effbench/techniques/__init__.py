"""Techniques: one file, one technique. The contract is `effbench/technique.py`."""
