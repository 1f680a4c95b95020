"""The file that a command's argument means: a path, or a name on the hub."""

from __future__ import annotations

from pathlib import Path

from tritgguf.cli import terminal
from tritgguf.sources.hub_names import HubName, name_instead_of, parse_hub_name


def local_file(file: Path) -> Path:
    """Return the path of the file that is named; fetched with a progress bar if it is on the hub and not in the cache.

    A path that exists always wins. What has not the form of a name on the hub is returned as it is. Raises as
    `tritgguf.sources.hub_files.pull`.
    """
    name = name_instead_of(file)
    if name is None:
        return file
    from tritgguf.sources.hub_files import local_or_fetched

    with terminal.progress(in_bytes=True) as report:
        return local_or_fetched(name, report).location


def hub_name(text: str) -> HubName:
    """Return a name on the hub; UsageError if the text has another form."""
    from tritgguf.cli.options import UsageError

    name = parse_hub_name(text)
    if name is None:
        raise UsageError(f"{text} is no name on the hub; write it as ORG/NAME, ORG/NAME:d2 or ORG/NAME:FILE")
    return name
