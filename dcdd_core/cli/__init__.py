"""The `dcdd` command: one module for each of its commands."""

from .app import main

__all__ = ["main"]
