"""The command line: the only place where the measuring and the reading arm meet.

Heavy modules are imported inside the command that needs them, so that `list` and `show` answer at once.

    effbench run suites/quick.yaml && effbench show
"""

from effbench.cli import accepting, exchange, measuring, plugin, reading  # noqa: F401  (they add their commands)
from effbench.cli.app import app, main

__all__ = ["app", "main"]
