"""Measurements and helpers of the project itself, run from its root: `python -m tools.FOLDER.NAME`."""
