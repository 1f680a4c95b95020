"""The choice of the instruction set, and vectorization of the portable variant on Arm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import llvmlite.binding as llvm
import pytest
from arm_assembly import TRIPLE, arm_assembly, arm_target
from llvmlite.ir import Value

from cpu_kernels import precompile
from cpu_kernels.packed_rows.extract import EXTRACT
from cpu_kernels.packed_rows.group_lanes import GroupLanes
from cpu_kernels.simd import arm_features, instruction_set, self_test, variants
from cpu_kernels.simd.variants import AVX2, AVX2_VNNI, AVX512, AVX512_NO_VNNI, NAMES, NEON_DOTPROD, PORTABLE
from cpu_kernels.simd.vectors import I8, I32, Vectors
from cpu_kernels.threads.thread_pool import ThreadPool, default_thread_pool
from tritgguf.formats.trit_types import DEPTHS

_AVX2 = ("avx2", "fma", "f16c")
_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")


def clear_caches() -> None:
    """Clear the cached features and self-test results."""
    instruction_set.supported.cache_clear()
    instruction_set._works.cache_clear()


@pytest.fixture(autouse=True)
def no_environment_variable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in (instruction_set.ENVIRONMENT_VARIABLE, "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX"):
        monkeypatch.delenv(name, raising=False)
    clear_caches()
    yield
    clear_caches()


def fake_processor(monkeypatch: pytest.MonkeyPatch, *features: str, failures: dict[int, str] | None = None) -> None:
    """Make LLVM report only these features; variants pass their self-test unless `failures` lists them.

    The processor is an Arm one if "neon" is among them.
    """
    monkeypatch.setattr(arm_features, "is_arm", lambda: "neon" in features)
    monkeypatch.setattr(arm_features, "has_dot_products", lambda: "dotprod" in features)
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: dict.fromkeys(features, True))
    monkeypatch.setattr(self_test, "failure", (failures or {}).get)
    clear_caches()


def test_this_processor_has_the_portable_variant() -> None:
    assert instruction_set.supported()[0] == PORTABLE


def test_features_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    for features, best in (
        ((), PORTABLE),
        (("avx2",), PORTABLE),
        (("neon", "fp16"), PORTABLE),
        (("neon", "dotprod"), NEON_DOTPROD),
        (_AVX2, AVX2),
        ((*_AVX2, "avxvnni"), AVX2_VNNI),
        ((*_AVX2, *_AVX512[:-1]), AVX512_NO_VNNI),
        ((*_AVX2, *_AVX512), AVX512),
    ):
        fake_processor(monkeypatch, *features)
        assert instruction_set.choose() == best
        assert instruction_set.supported() == sorted(instruction_set.supported())


def test_a_feature_that_is_off_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    features = {**dict.fromkeys(_AVX2, True), "fma": False}
    monkeypatch.setattr(arm_features, "is_arm", lambda: False)
    monkeypatch.setattr(llvm, "get_host_cpu_features", lambda: features)
    assert instruction_set.supported() == [PORTABLE]


@pytest.mark.parametrize(
    ("variable", "value", "best"),
    [
        ("NUMBA_CPU_FEATURES", "+avx2, +fma,+f16c,-avx512f", "avx2"),
        ("NUMBA_CPU_FEATURES", "", "avx512"),
        ("NUMBA_ENABLE_AVX", "0", "portable"),
        ("NUMBA_ENABLE_AVX", "1", "avx512"),
    ],
)
def test_features_that_numba_may_not_use_do_not_count(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, best: str
) -> None:
    fake_processor(monkeypatch, *_AVX2, *_AVX512)
    monkeypatch.setenv(variable, value)
    assert instruction_set.choose() == NAMES[best]
    if best == "portable":
        reason = "needs avx2, which this processor or a setting of Numba lacks"
        assert instruction_set.why_unavailable(AVX2) == reason


def test_a_restricted_numba_computes(tmp_path: Path) -> None:
    program = "from cpu_kernels.simd import instruction_set as i; print(i.choose())"
    for_arm = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+neon"}
    restricted = for_arm if arm_features.is_arm() else {"NUMBA_ENABLE_AVX": "0"}
    places = {"NUMBA_CACHE_DIR": str(tmp_path), precompile.LAZY_VARIABLE: "1"}
    environment = {**os.environ, **restricted, **places}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == (f"{PORTABLE}\n", 0), done.stderr


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_processor(monkeypatch, *_AVX2)
    for name, isa in (("portable", PORTABLE), ("avx2", AVX2), ("", AVX2)):
        monkeypatch.setenv(instruction_set.ENVIRONMENT_VARIABLE, name)
        assert instruction_set.choose() == isa
    for name in ("avx512", "sse", "PORTABLE"):
        monkeypatch.setenv(instruction_set.ENVIRONMENT_VARIABLE, name)
        with pytest.raises(ValueError, match=f"TRITGGUF_ISA={name} .* choose from portable, avx2"):
            instruction_set.choose()


def test_a_name_wins_over_the_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_processor(monkeypatch, *_AVX2)
    monkeypatch.setenv(instruction_set.ENVIRONMENT_VARIABLE, "nonsense")
    assert instruction_set.choose("portable") == PORTABLE
    with pytest.raises(ValueError, match="instruction set avx512 is not available here; choose from portable, avx2"):
        instruction_set.choose("avx512")
    with pytest.raises(ValueError, match="TRITGGUF_ISA=nonsense"):
        instruction_set.choose()


def test_a_variant_that_fails_its_test_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_processor(monkeypatch, *_AVX2, *_AVX512, failures={AVX512: "cannot be compiled: no such intrinsic"})
    assert instruction_set.choose() == AVX512_NO_VNNI
    assert caplog.messages == [
        "note: instruction set avx512 cannot be compiled: no such intrinsic; trying another",
    ]
    with pytest.raises(ValueError, match="instruction set avx512 cannot be compiled: no such intrinsic; choose"):
        instruction_set.choose("avx512")
    # The portable variant is the last resort, so it is chosen even if it fails.
    fake_processor(monkeypatch, failures={PORTABLE: "computes wrong integers here"})
    assert instruction_set.choose() == PORTABLE


def test_a_failure_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    fake_processor(monkeypatch, *_AVX2, failures={AVX2: "computes wrong integers here"})
    assert [instruction_set.choose() for _ in range(3)] == [PORTABLE] * 3
    assert len(caplog.messages) == 1


def test_every_variant_is_a_type_of_its_own() -> None:
    types = [variants.as_type(isa) for isa in variants.NAMES.values()]
    assert [len(of_type) for of_type in types] == list(range(6))


def test_threads_take_the_chosen_variant(variant: str) -> None:
    for pool in (ThreadPool(1), default_thread_pool()):  # the latter has run with the variant before
        assert pool.isa == variants.as_type(variants.NAMES[variant])
    assert ThreadPool(1, isa="portable").isa == variants.as_type(PORTABLE)


@pytest.mark.parametrize("depth", DEPTHS)
def test_portable_is_vector_code_on_arm(depth: int) -> None:
    def emit(vectors: Vectors, words: Value, activations: Value, groups: Value, first_group: Value, out: Value) -> None:
        """Emit one vector step of 16 groups, the inner loop of every product."""
        zero = vectors.constant(I32, 0, 16)
        step = GroupLanes(vectors, words, activations, 16, groups, first_group, zero)
        indices = EXTRACT[depth](step)
        vectors.store(step.sums, out)
        vectors.store(indices, out, offset=64)

    instructions = re.findall(r"^\t(\w+)\t(\S+)", arm_assembly(emit, 5), re.MULTILINE)
    on_vectors = Counter(name for name, target in instructions if re.match(r"v\d+\.", target))
    # 8 steps of 32 lanes, 8 lanes per instruction: digits are unsigned, products signed widening multiplies.
    assert on_vectors["umull"] + on_vectors["umull2"] >= 8 * 8
    assert on_vectors["smull"] + on_vectors["smull2"] + on_vectors["smlal"] + on_vectors["smlal2"] >= 8 * 8
    # No level uses a 32-bit multiply or a scalar register. At depth 3 the trits of the scale indices are joined by two
    # multiplications, of 4 of the 16 groups each.
    wide = sum(name == "mul" and target.endswith(".4s,") for name, target in instructions)
    assert wide == (2 * 4 if depth == 3 else 0)
    assert on_vectors["umov"] + on_vectors["smov"] == 0
    assert not any(name in ("umov", "smov", "umulh") for name, _ in instructions)


@pytest.mark.parametrize(
    ("cpu", "features", "has"),
    [
        ("generic", "", False),
        ("cortex-a72", "-sve", False),
        ("generic", "+neon,+dotprod", True),
        ("neoverse-n1", "", True),
        ("neoverse-n1", "-dotprod", False),
        ("apple-m1", "", True),
    ],
)
def test_llvm_knows_which_arm_processors_have_dot_products(cpu: str, features: str, has: bool) -> None:
    arm_target()
    assert arm_features.compiles_to_dot_products(TRIPLE, cpu, features) == has


def test_dot_products_of_bytes_are_one_instruction_on_arm() -> None:
    def emit(vectors: Vectors, left: Value, right: Value, out: Value) -> None:
        """Emit the products of a step of 16 groups with activations of 8 bits."""
        levels, x = (vectors.load(address, I8, 64) for address in (left, right))
        vectors.store(vectors.dot_quads(vectors.load(out, I32, 16), levels, x), out)

    assembly = arm_assembly(emit, 3, NEON_DOTPROD, "neoverse-n1")
    instructions = Counter(re.findall(r"^\t([a-z]\w+)", assembly, re.MULTILINE))
    assert instructions["sdot"] == 4
    assert set(instructions) <= {"ldp", "ldr", "sdot", "stp", "str", "ret"}


def test_variants_of_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_processor(monkeypatch, "neon", "dotprod")
    assert instruction_set.of_this_architecture() == [PORTABLE, NEON_DOTPROD]
    assert instruction_set.features() == ["dotprod"]
    fake_processor(monkeypatch, *_AVX2)
    assert instruction_set.of_this_architecture() == [PORTABLE, AVX2, AVX2_VNNI, AVX512_NO_VNNI, AVX512]
    assert instruction_set.why_unavailable(NEON_DOTPROD) == "needs dotprod, which this processor lacks"
