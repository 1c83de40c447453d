"""Benchmarks of effbench itself: `make bench NAME=...`. Each prints a card, a table and, last, one line of JSON."""
