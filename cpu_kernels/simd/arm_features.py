"""Which instructions LLVM uses when it compiles for a 64-bit Arm processor."""

from __future__ import annotations

import os
import platform
import re

import llvmlite.binding as llvm

_SUM_OF_PRODUCTS = """
target triple = "{triple}"
define i32 @sum_of_products(<16 x i8> %left, <16 x i8> %right) {{
  %wide_left = sext <16 x i8> %left to <16 x i32>
  %wide_right = sext <16 x i8> %right to <16 x i32>
  %products = mul <16 x i32> %wide_left, %wide_right
  %sum = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %products)
  ret i32 %sum
}}
declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
"""


def is_arm() -> bool:
    """Return whether this processor is a 64-bit Arm one."""
    return platform.machine().lower() in ("aarch64", "arm64")


def has_dot_products() -> bool:
    """Return whether this processor, a 64-bit Arm one, has dot products of bytes that Numba may use."""
    name = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
    listed = os.environ.get("NUMBA_CPU_FEATURES")
    features = llvm.get_host_cpu_features().flatten() if listed is None else listed
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return compiles_to_dot_products(llvm.get_process_triple(), name, features)


def compiles_to_dot_products(triple: str, cpu: str, features: str) -> bool:
    """Return whether LLVM computes a sum of products of bytes by dot products (sdot).

    LLVM's list of the host's features lacks this one, but the processor's name implies it. A call of the instruction
    for a processor without it would end the process in LLVM, so LLVM is asked what it makes of the plain sum.

    Args:
        triple: of the target, which has been initialized.
        cpu: LLVM's name of the processor.
        features: those to add and leave out, such as "+dotprod,-sve".

    """
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, features=features, opt=2)
    assembly = machine.emit_assembly(llvm.parse_assembly(_SUM_OF_PRODUCTS.format(triple=triple)))
    return re.search(r"^\tsdot", assembly, re.MULTILINE) is not None
