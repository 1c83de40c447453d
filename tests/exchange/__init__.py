"""Tests of effbench/exchange."""
