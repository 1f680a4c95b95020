"""Names of trit files on the hub, and which file they mean."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from tritgguf.errors import BadRequestError
from tritgguf.sources.hub_names import (
    HubName,
    chosen,
    depth_in_name,
    is_candidate,
    parse_hub_name,
    short_name,
    the_chosen,
)


@dataclass(frozen=True)
class File:
    path: str
    depth: str = ""


FAMILY = [
    File(f"Tiny-{name}.gguf", depth_in_name(f"Tiny-{name}.gguf"))
    for name in ("uniform-d1", "uniform-d2", "uniform-d3", "d3scale-sens002", "d3scale-sens003")
]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName("org/name")),
        ("org/name:d2", HubName("org/name", "d2")),
        ("org/name:sub/file.gguf", HubName("org/name", "sub/file.gguf")),
        ("org/name:", None),
        ("name", None),
        ("name:d2", None),
        ("a/b/c", None),
        ("./org/name", None),
        ("/org/name", None),
        ("org/name.gguf", None),
        ("org/name:..\\file", None),
        ("", None),
    ],
)
def test_the_form_of_a_name(text: str, name: HubName | None) -> None:
    assert parse_hub_name(text) == name
    assert name is None or str(name) == text


@pytest.mark.parametrize(
    ("path", "candidate"),
    [
        ("model.gguf", True),
        ("Qwen2.5-1.5B-uniform-d2.gguf", True),
        ("sub/q-model-d3.GGUF", True),
        ("model.safetensors", False),
        ("model-Q4_K_M.gguf", False),
        ("model.q8_0.gguf", False),
        ("model-IQ2_XXS.gguf", False),
        ("model-f16.gguf", False),
        ("model-BF16.gguf", False),
        ("mmproj-model.gguf", False),
        ("model.imatrix.gguf", False),
        ("model-00001-of-00003.gguf", False),
    ],
)
def test_what_may_be_a_trit_file(path: str, candidate: bool) -> None:
    assert is_candidate(path) == candidate


@pytest.mark.parametrize(
    ("path", "depth"),
    [("m-d2.gguf", "2"), ("d3/m_D1.gguf", "1"), ("m-d3scale.gguf", ""), ("m-d2-d3.gguf", ""), ("m-d5.gguf", "")],
)
def test_the_depth_in_a_name(path: str, depth: str) -> None:
    assert depth_in_name(path) == depth


@pytest.mark.parametrize(
    ("choice", "paths"),
    [
        ("d2", ["Tiny-uniform-d2.gguf"]),
        ("2", ["Tiny-uniform-d2.gguf"]),
        ("D3", ["Tiny-uniform-d3.gguf"]),
        ("tiny-uniform-d1", ["Tiny-uniform-d1.gguf"]),
        ("Tiny-uniform-d1.gguf", ["Tiny-uniform-d1.gguf"]),
        ("sens002", ["Tiny-d3scale-sens002.gguf"]),
        ("d3scale", ["Tiny-d3scale-sens002.gguf", "Tiny-d3scale-sens003.gguf"]),
        ("d4", []),
        ("other", []),
    ],
)
def test_what_a_choice_means(choice: str, paths: list[str]) -> None:
    assert [file.path for file in chosen(HubName("org/tiny", choice), FAMILY)] == paths


def test_an_ambiguous_name_is_refused_with_names_that_are_not() -> None:
    with pytest.raises(BadRequestError, match="has 5 trit files; name one of them") as error:
        the_chosen(HubName("org/tiny"), FAMILY)
    for word in str(error.value).split(": ")[-1].split(", "):
        name = parse_hub_name(word)
        assert name is not None
        assert the_chosen(name, FAMILY) is not None


def test_the_shortest_name() -> None:
    names = [short_name("org/tiny", file, FAMILY) for file in FAMILY]
    assert names == [
        "org/tiny:d1",
        "org/tiny:d2",
        "org/tiny:d3",
        "org/tiny:Tiny-d3scale-sens002",
        "org/tiny:Tiny-d3scale-sens003",
    ]
    assert short_name("org/tiny", FAMILY[0], FAMILY[:1]) == "org/tiny"
    twins = [File("a/m-d2.gguf", "2"), File("b/m-d2.gguf", "2")]
    assert [short_name("org/tiny", file, twins) for file in twins] == ["org/tiny:a/m-d2.gguf", "org/tiny:b/m-d2.gguf"]
