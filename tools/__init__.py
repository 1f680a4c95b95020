"""Tools for measuring and maintaining the project. Run them from its root: `python -m tools.FOLDER.NAME`."""
