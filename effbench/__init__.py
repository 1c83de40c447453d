"""effbench: what an efficiency technique really costs and saves, on your hardware, with its interval."""

__version__ = "0.1.0"
