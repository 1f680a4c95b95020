"""The self-test of an instruction-set variant: it passes here, and it detects wrong operations."""

from __future__ import annotations

import numba
import pytest
from llvmlite import ir

from cpu_kernels.simd import self_test
from cpu_kernels.simd.variants import NAMES
from cpu_kernels.simd.vectors import Vectors


@pytest.fixture
def uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile the operations without any cache."""
    monkeypatch.setattr(self_test, "failure", self_test.failure.__wrapped__)
    monkeypatch.setattr(self_test, "_run", numba.njit(self_test._run.py_func))


def test_every_variant_of_this_processor_passes(variant: str) -> None:
    assert self_test.failure(NAMES[variant]) is None


@pytest.mark.parametrize("operation", ["multiply_high", "dot_pairs", "dot_quads", "lookup"])
@pytest.mark.usefixtures("uncached")
def test_a_wrong_operation_is_noticed(operation: str, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_result(self: Vectors, first: ir.Value, *others: ir.Value) -> ir.Value:
        like = first[0] if operation == "lookup" else first
        return ir.Constant(like.type, None)

    monkeypatch.setattr(Vectors, operation, without_result)
    assert self_test.failure(NAMES[variant]) == "computes wrong integers here"


@pytest.mark.usefixtures("uncached")
def test_a_compilation_error_is_noticed(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_intrinsic(self: Vectors, accumulator: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
        return self.call("llvm.x86.avx512.vpdpwssd.512", accumulator.type, accumulator)

    monkeypatch.setattr(Vectors, "dot_pairs", no_such_intrinsic)
    failure = self_test.failure(NAMES[variant])
    assert failure is not None
    assert failure.startswith("cannot be compiled (")
    assert "\n" not in failure
