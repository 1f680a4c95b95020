"""PLAN.toml: what it means, and that every mistake in it is one line that says where it is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tritgguf.errors import BadRequestError, TritGgufError
from tritgguf.publishing.configurations import BUILT_IN
from tritgguf.publishing.plan_file import read_plan

GOOD = 'sources = ["org/name"]\nconfigurations = ["uniform-d2"]\n[publish]\noutput = "out"\n'


def plan_file(folder: Path, text: str) -> Path:
    file = folder / "plan.toml"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_whole_plan(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    text = """
        sources = ["model", { source = "org/Name", name = "renamed" }]
        [[configurations]]
        name = "uniform-d3"
        encoder = "best"
        [[configurations]]
        name = "small"
        recipe = "small"
        target_size = "900MB"
        keep = "blk.0.*=3"
        [publish]
        output = "out"
        text = "text.txt"
        tokens = 100
        exports = ["q8_0", "hf"]
        bench = false
        [calibration]
        tokens = 5000
        seed = 7
    """
    plan = read_plan(plan_file(tmp_path, text))
    assert [(source.location, source.name) for source in plan.sources] == [
        (str(tmp_path / "model"), "model"),
        ("org/Name", "renamed"),
    ]
    uniform, small = plan.configurations
    assert (uniform.depth, uniform.encoder, uniform.recipe) == (3, "best", "published")
    assert (small.target_size, small.encoder, small.options.recipe) == (900_000_000, "auto", small.options.recipe)
    assert [(rule.pattern, rule.depth) for rule in small.choice.keep] == [("blk.0.*", 3)]
    assert (plan.output, plan.text, plan.tokens) == (tmp_path / "out", tmp_path / "text.txt", 100)
    assert (plan.exports, plan.bench) == (("q8_0", "hf"), False)
    assert (plan.calibration.tokens, plan.calibration.seed, plan.calibration.text) == (5000, 7, None)


def test_the_six_published_configurations(tmp_path: Path) -> None:
    names = ", ".join(f'"{name}"' for name in BUILT_IN)
    plan = read_plan(plan_file(tmp_path, GOOD.replace('"uniform-d2"', names)))
    assert [configuration.name for configuration in plan.configurations] == [
        *("uniform-d1", "uniform-d2", "uniform-d3", "uniform-d4"),
        *("d3scale-sens002", "d3scale-sens003"),
    ]
    assert [configuration.depth for configuration in plan.configurations] == [1, 2, 3, 4, 3, 3]
    assert {configuration.encoder for configuration in plan.configurations} == {"v2"}
    sensitivities = [configuration.sensitivity for configuration in plan.configurations]
    assert sensitivities == [None, None, None, None, 0.002, 0.003]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[publish]", "[publish", "is no TOML: .*line"),
        ("sources", "source", "source: is unknown; a plan has sources"),
        ("output", "ouput", r"\[publish\] ouput: is unknown; choose from output"),
        ('output = "out"', "", r"\[publish\] output: is missing"),
        ('"out"', "3", r"\[publish\] output: must be a text, not 3"),
        ('"out"', '"out"\ntokens = true', r"\[publish\] tokens: must be a whole number, not True"),
        ('"out"', '"out"\ntokens = 1', r"\[publish\] tokens: must be 2 or more, not 1"),
        ('"out"', '"out"\nexports = ["q9"]', r"\[publish\] exports: has 'q9'; choose from hf"),
        ('"out"', '"out"\ntext = "none.txt"', r"\[publish\] text: \S+none.txt"),
        ('"out"', '"out"\n[calibration]\nseed = -1', r"\[calibration\] seed: must be 0 or more"),
        ('["org/name"]', "[]", "sources: is missing or empty"),
        ('["org/name"]', '["no folder"]', r"\[sources 1\] source: no folder: no such file"),
        ('["org/name"]', '["a/b", "c/b"]', r"\[sources 2\] name: b is there twice"),
        ('["org/name"]', "[{ source = 'a/b', name = '../x' }]", r"\[sources 1\] name: '../x' cannot be part"),
        ('["uniform-d2"]', '["uniform-d5"]', r"\[configurations 1\] name: uniform-d5 is not built in \(uniform-d1"),
        ('"uniform-d2"', "3", "configurations 1: must be a text or a table, not 3"),
        ('"uniform-d2"', "{ depth = 2 }", r"\[configurations 1\] name: is missing"),
        ('"uniform-d2"', "{ name = 'x', deph = 2 }", r"\[configurations 1\] deph: is unknown; choose from name, depth"),
        ('"uniform-d2"', "{ name = 'x', depth = 2.0 }", r"\[configurations 1\] depth: must be a whole number"),
        ('"uniform-d2"', "{ name = 'x', depth = 5 }", r"\[configurations 1\] x: depth 5 does not exist"),
        ('"uniform-d2"', "{ name = 'x', encoder = 'v3' }", r"\[configurations 1\] x: encoder v3 does not exist"),
        ('"uniform-d2"', "{ name = 'x', recipe = 'big' }", r"\[configurations 1\] x: recipe big does not exist"),
        ('"uniform-d2"', "{ name = 'x', keep = 'a' }", r"\[configurations 1\] x: --keep 'a'"),
        ('"uniform-d2"', "{ name = 'x', target_size = 'big' }", r"target_size: big is not a size"),
        ('"uniform-d2"', "{ name = 'x', target_bpw = 3, sensitivity = 0.1 }", "both choose depths"),
        ('"uniform-d2"', "{ name = 'x', depth = 1, sensitivity = 0.1 }", "depth 1 has none to remove"),
    ],
)
def test_mistakes(before: str, after: str, message: str, tmp_path: Path) -> None:
    assert before in GOOD
    file = plan_file(tmp_path, GOOD.replace(before, after, 1))
    with pytest.raises(BadRequestError) as error:
        read_plan(file)
    assert re.match(f"{re.escape(str(file))}: .*{message}", str(error.value)), error.value


def test_no_plan(tmp_path: Path) -> None:
    with pytest.raises(TritGgufError, match=r"none\.toml"):
        read_plan(tmp_path / "none.toml")
