"""Other harnesses that effbench is compared with, each in a virtual environment of its own."""
