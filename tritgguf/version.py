"""The version of the package; written into the files that it makes."""

__version__ = "0.1.0"
