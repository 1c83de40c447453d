"""Executors: where launches run. `local` is a fork server on this machine."""
