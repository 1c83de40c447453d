"""Plugins: a new package from a template, the contract every technique keeps, and the check of one in a process of its own."""
