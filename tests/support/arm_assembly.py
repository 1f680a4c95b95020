"""Kernels compiled for a 64-bit Arm processor, which LLVM can do on any machine."""

from __future__ import annotations

from collections.abc import Callable

import llvmlite.binding as llvm
import pytest
from llvmlite import ir

from cpu_kernels.simd.variants import PORTABLE
from cpu_kernels.simd.vectors import I64, Vectors

TRIPLE = "aarch64-unknown-linux-gnu"


def arm_target() -> llvm.Target:
    """Return LLVM's target; skips the test if this llvmlite cannot compile for Arm."""
    try:
        llvm.initialize_all_targets()
        target = llvm.Target.from_triple(TRIPLE)
    except RuntimeError:
        pytest.skip("this llvmlite cannot compile for Arm")
    llvm.initialize_all_asmprinters()
    return target


def arm_assembly(emit: Callable[..., object], arguments: int, isa: int = PORTABLE, cpu: str = "generic") -> str:
    """Return the assembly of a function whose body `emit` emits, given Vectors and `arguments` i64 values.

    Skips the test if this llvmlite cannot compile for Arm. `cpu` is LLVM's name of the processor.
    """
    target = arm_target()
    module = ir.Module()
    module.triple = TRIPLE
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * arguments), "step")
    builder = ir.IRBuilder(function.append_basic_block())
    emit(Vectors(builder, isa), *function.args)
    builder.ret_void()
    machine = target.create_target_machine(cpu=cpu, opt=3)
    parsed = llvm.parse_assembly(str(module))
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(parsed, passes)
    return str(machine.emit_assembly(parsed))
