"""Names of trit files on the hub, and which file of a model a name means.

A name is `organization/name`, or `organization/name:CHOICE` where a model has several trit files. CHOICE is a file, a
depth (`d2` or `2`), or a part of the file's name that no other file has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol, TypeVar

from tritgguf.errors import BadRequestError
from tritgguf.formats.file_kinds import is_hub_id

_DEPTH_IN_NAME = re.compile(r"(?<![a-z0-9])d([1-4])(?![a-z0-9])", re.IGNORECASE)
_DEPTH_CHOICE = re.compile(r"d?([1-4])", re.IGNORECASE)
# What GGUF files that are no trit files are named after: llama.cpp's types, and what is no model of its own.
_OTHER_FILES = re.compile(
    r"(?<![a-z0-9])(i?q[1-8](_[a-z0-9]+)*|b?f16|fp16|f32|fp32|mxfp4(_[a-z]+)?|tq[12]_0|mmproj|imatrix)(?![a-z0-9])"
    r"|-\d{5}-of-\d{5}$",
    re.IGNORECASE,
)


class NamedFile(Protocol):
    """A file of a model on the hub, or in its cache."""

    @property
    def path(self) -> str:
        """Its path in the model, such as `model-d2.gguf`."""

    @property
    def depth(self) -> str:
        """The layers' trits per weight, such as `2` or `2, 3`; empty if that is not known."""


File = TypeVar("File", bound=NamedFile)


@dataclass(frozen=True)
class HubName:
    """A name as the user gives it: a model, and which of its files; an empty choice means its only one."""

    repository: str
    choice: str = ""

    def __str__(self) -> str:
        return f"{self.repository}:{self.choice}" if self.choice else self.repository


def parse_hub_name(text: str) -> HubName | None:
    """Return the name that a text is; None if it has another form."""
    repository, colon, choice = text.partition(":")
    if not is_hub_id(repository) or (colon and not choice) or "\\" in choice:
        return None
    return HubName(repository, choice)


def name_instead_of(path: str | Path) -> HubName | None:
    """Return the name on the hub that stands in place of a file's path; None where that is a path.

    A path that exists always wins.
    """
    if Path(path).exists() or str(path).startswith("."):
        return None
    return parse_hub_name(Path(path).as_posix())


def is_candidate(path: str) -> bool:
    """Tell whether a file's name allows it to be a trit file."""
    pure = PurePosixPath(path)
    return pure.suffix.lower() == ".gguf" and _OTHER_FILES.search(pure.stem) is None


def depth_in_name(path: str) -> str:
    """Return the depth that a file's name tells, such as `2` of `model-d2.gguf`; empty if it tells none."""
    found = _DEPTH_IN_NAME.findall(PurePosixPath(path).stem)
    return found[0] if len(set(found)) == 1 else ""


def chosen(name: HubName, files: Sequence[File]) -> list[File]:
    """Return the files that a name's choice means; several if it is ambiguous."""
    choice = name.choice.lower()
    if not choice:
        return list(files)
    depth = _DEPTH_CHOICE.fullmatch(choice)
    rules = (
        lambda file: file.path.lower() in (choice, f"{choice}.gguf"),
        lambda file: PurePosixPath(file.path).name.lower() in (choice, f"{choice}.gguf"),
        lambda file: depth is not None and file.depth == depth[1],
        lambda file: choice in file.path.lower(),
    )
    for fits in rules:
        if matching := [file for file in files if fits(file)]:
            return matching
    return []


def the_chosen(name: HubName, files: Sequence[File]) -> File | None:
    """Return the one file that a name means, None if there is none; BadRequestError if there are several."""
    matching = chosen(name, files)
    if len(matching) > 1:
        names = ", ".join(short_name(name.repository, file, files) for file in matching)
        raise BadRequestError(f"{name}: has {len(matching)} trit files; name one of them: {names}")
    return matching[0] if matching else None


def short_name(repository: str, file: File, files: Sequence[File]) -> str:
    """Return the shortest name that means `file` among the `files` of a model."""
    choices = ("", f"d{file.depth}", PurePosixPath(file.path).name.removesuffix(".gguf"), file.path)
    for choice in choices:
        name = HubName(repository, choice)
        if chosen(name, files) == [file]:
            return str(name)
    return f"{repository}:{file.path}"
