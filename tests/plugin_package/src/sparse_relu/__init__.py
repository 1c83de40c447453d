"""A package that knows effbench, and that effbench knows by its entry point only."""
