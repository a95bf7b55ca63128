"""The version of the package, for the modules inside it that record it."""

__version__ = "0.2.0"
