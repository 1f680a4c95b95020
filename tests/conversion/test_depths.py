"""Choosing the depth of each matrix."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import write_tiny_model

from tritgguf.architectures.tensor_names import quantized_tensor
from tritgguf.conversion.convert import convert
from tritgguf.conversion.depths import (
    DepthChoice,
    KeepRule,
    apply_rules,
    bits_per_weight,
    depths_below_threshold,
    depths_within_budget,
    parse_rules,
)
from tritgguf.errors import TritGgufError
from tritgguf.formats.gguf_file import GgufFile
from tritgguf.formats.trit_types import DEPTHS, TritType

NAMES = [f"blk.{block}.{matrix}.weight" for block in range(11) for matrix in ("attn_q", "ffn_down")]


def test_bits_of_the_file() -> None:
    assert [bits_per_weight(depth) for depth in range(5)] == [16, 2, 3.5, 5.25, 6.75]


def test_rules_are_parsed() -> None:
    assert parse_rules("blk.0.*=3, *.ffn_down=0") == [KeepRule("blk.0.*", 3), KeepRule("*.ffn_down", 0)]


@pytest.mark.parametrize("text", ["", "blk.0.*", "=3", "blk.0.*=5", "blk.0.*=3,", "blk.0.*=-1", "a=1=x"])
def test_invalid_rules(text: str) -> None:
    with pytest.raises(TritGgufError, match=r"--keep .*: give PATTERN=DEPTH with a depth from 0 \(F16\) to 4"):
        parse_rules(text)


def test_the_first_rule_counts_and_a_block_is_not_its_prefix() -> None:
    chosen = apply_rules(NAMES, parse_rules("blk.1.*=4,*.ffn_down=3,blk.1.attn_q.weight=1"))
    assert chosen["blk.1.attn_q.weight"] == chosen["blk.1.ffn_down.weight"] == 4
    assert chosen["blk.10.ffn_down.weight"] == 3
    assert "blk.10.attn_q.weight" not in chosen


def test_a_rule_without_a_match_is_an_error() -> None:
    with pytest.raises(TritGgufError, match=r"--keep blk.77.\*=3: no matrix has such a name"):
        apply_rules(NAMES, parse_rules("blk.0.*=3,blk.77.*=3"))


def test_threshold() -> None:
    found = depths_below_threshold({"a": {2: 0.01}, "b": {2: 0.02}, "c": {2: 0.5}}, 0.02, 3)
    assert found == {"a": 2, "b": 3, "c": 3}


problems = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.floats(0.001, 1), min_size=4, max_size=4)), min_size=1, max_size=5
)


@given(problem=problems, target=st.floats(2, 6.75))
def test_budget_is_kept_and_nearly_optimal(problem: list[tuple[int, list[float]]], target: float) -> None:
    sensitivities = {
        str(k): dict(zip(DEPTHS, sorted(costs, reverse=True), strict=True)) for k, (_, costs) in enumerate(problem)
    }
    weights = {str(k): 64 * size for k, (size, _) in enumerate(problem)}
    depths = depths_within_budget(sensitivities, weights, target * sum(weights.values()))
    assert average_bits(depths, weights) <= target * (1 + 1e-6)
    cost = sum(sensitivities[name][depth] for name, depth in depths.items())
    # No affordable step reduces the cost further ...
    left = sum(weights[name] * (target - bits_per_weight(depth)) for name, depth in depths.items())
    for name, depth in depths.items():
        if depth < 4 and sensitivities[name][depth + 1] < sensitivities[name][depth]:
            assert weights[name] * (bits_per_weight(depth + 1) - bits_per_weight(depth)) > left * (1 - 1e-9) - 1e-6
    # ... and the optimum is better by at most one matrix's gain.
    allowed = [
        sum(sensitivities[name][depth] for name, depth in zip(weights, some, strict=True))
        for some in itertools.product(DEPTHS, repeat=len(weights))
        if average_bits(dict(zip(weights, some, strict=True)), weights) <= target
    ]
    largest_gain = max(costs[1] - costs[4] for costs in sensitivities.values())
    assert cost <= min(allowed) + largest_gain + 1e-9


def chosen(choice: DepthChoice, kept: dict[str, int], other_bytes: int = 0) -> dict[str, int]:
    """Return the depths of two matrices of 64 weights, of which the rules keep some."""
    costs = {"a": {0: -0.1, 1: 1.0, 2: 0.5, 3: 0.1, 4: 0.0}}
    return choice.depths({"a": 64, "b": 64}, kept, 2, lambda names, depths: costs, lambda: other_bytes)


def test_kept_matrices_count_towards_the_average() -> None:
    assert chosen(DepthChoice(target_bpw=3.5), {"b": 1}) == {"a": 2, "b": 1}
    assert chosen(DepthChoice(target_bpw=3.7), {"b": 1}) == {"a": 3, "b": 1}
    assert chosen(DepthChoice(target_bpw=3.5), {"b": 0}) == {"a": 2, "b": 0}  # what is not packed does not
    with pytest.raises(TritGgufError, match=r"--target-bpw 3.5: .* it is 4.375 bits per weight at least"):
        chosen(DepthChoice(target_bpw=3.5), {"b": 4})


@pytest.mark.parametrize(("size", "depth"), [(1032, 1), (1057, 2), (1058, 3), (1143, 4), (1144, 0)])
def test_the_rest_of_the_file_counts_towards_its_size(size: int, depth: int) -> None:
    assert chosen(DepthChoice(target_bytes=size), {"b": 1}, other_bytes=1000) == {"a": depth, "b": 1}


def test_a_file_that_cannot_be_so_small() -> None:
    with pytest.raises(TritGgufError, match=r"--target-size 1031: with these options the file has 1032 bytes at least"):
        chosen(DepthChoice(target_bytes=1031), {"b": 1}, other_bytes=1000)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"target_bpw": 3.0, "sensitivity": 0.1},
            "--target-bpw and --sensitivity both choose depths; give one of them",
        ),
        ({"target_bpw": 3.0, "target_bytes": 1000}, "--target-bpw and --target-size both choose depths"),
        ({"target_bpw": 1.5}, "must be from 2.0 to 6.75"),
        ({"target_bpw": float("nan")}, "must be from"),
        ({"sensitivity": -1.0}, "must be 0 or more"),
        ({"sensitivity": float("nan")}, "must be 0 or more"),
    ],
)
def test_contradictions(settings: dict[str, float], message: str) -> None:
    with pytest.raises(TritGgufError, match=message):
        DepthChoice(**settings)  # type: ignore[arg-type]


def average_bits(depths: dict[str, int], weights: dict[str, int]) -> float:
    return sum(weights[name] * bits_per_weight(depth) for name, depth in depths.items()) / sum(weights.values())


def depths_of(path: Path) -> dict[str, int]:
    """Return the depth of each of the layers' matrices in a file, 0 for F16."""
    tensors = GgufFile(path).tensors
    return {
        name: 0 if info.type_name == "F16" else TritType(info.type_id).depth
        for name, info in tensors.items()
        if quantized_tensor(name)
    }


def test_convert_with_keep_rules(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    choice = DepthChoice(tuple(parse_rules("blk.0.*=3,*.ffn_down=0")))
    convert(source, tmp_path / "out.gguf", depth=1, choice=choice)
    depths = depths_of(tmp_path / "out.gguf")
    assert depths.pop("blk.1.ffn_down.weight") == 0
    assert all(depth == (3 if name.startswith("blk.0.") else 1) for name, depth in depths.items())
    assert GgufFile(tmp_path / "out.gguf").metadata["trit.depths"] == "blk.0.*=3, *.ffn_down=0, depth 1"


def test_convert_with_a_target(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = write_tiny_model(tmp_path / "model")
    windows = np.random.default_rng(0).integers(3, 400, (3, 32)).tolist()
    report = convert(source, tmp_path / "out.gguf", encoder="v2", windows=windows, choice=DepthChoice(target_bpw=3.0))
    assert 2.4 < report.bits_per_weight_quantized <= 3.0
    assert len(set(depths_of(tmp_path / "out.gguf").values())) > 1


def test_convert_by_sensitivity(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = write_tiny_model(tmp_path / "model")
    windows = np.random.default_rng(0).integers(3, 400, (3, 32)).tolist()
    for threshold, expected in ((0.0, {3}), (1e9, {2})):
        convert(
            source,
            tmp_path / "out.gguf",
            depth=3,
            encoder="v2",
            windows=windows,
            choice=DepthChoice(sensitivity=threshold),
            overwrite=True,
        )
        assert set(depths_of(tmp_path / "out.gguf").values()) == expected


def test_measuring_needs_a_text(tmp_path: Path) -> None:
    source = write_tiny_model(tmp_path / "model")
    with pytest.raises(TritGgufError, match="needs a calibration text"):
        convert(source, tmp_path / "out.gguf", choice=DepthChoice(target_bpw=3.0))
