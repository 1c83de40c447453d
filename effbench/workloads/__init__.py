"""Workloads: one file, one kind of work. The contract is `effbench/workload.py`."""
