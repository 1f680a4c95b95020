"""The package version; `convert` writes it into the files that it makes."""

__version__ = "0.1.0"
