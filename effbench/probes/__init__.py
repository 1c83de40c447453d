"""Probes: one file, one kind of sensor. The contract is `effbench/probe.py`."""
