"""Shared expert kernels for mixture-of-experts layers; this package knows nothing of effbench."""

__version__ = "0.1.0"
