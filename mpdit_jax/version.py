"""The version of this package; setup.py has the same number."""

__version__ = "0.1.0"
