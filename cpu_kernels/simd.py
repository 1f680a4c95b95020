"""Vector operations as LLVM IR, for kernels written with `numba.extending.intrinsic`.

`Vectors` wraps an IR builder with the handful of operations that the kernels are made of. An operation that x86
has as one instruction is called by its target's name where the chosen instruction set has it, and is a generic
pattern elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

from cpu_kernels.instruction_set import AVX2, AVX512, PORTABLE

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
HALF, FLOAT = ir.HalfType(), ir.FloatType()
_BYTES = {I8: 1, I16: 2, I32: 4, HALF: 2, FLOAT: 4}


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    """Return the type <lanes x element>."""
    return ir.VectorType(element, lanes)


class Vectors:
    """Emits vector operations into `builder` for one instruction set."""

    def __init__(self, builder: ir.IRBuilder, isa: int) -> None:
        self.builder = builder
        self.isa = isa

    def constant(self, element: ir.Type, values: Sequence[int] | float, lanes: int) -> ir.Constant:
        """Return a constant vector: `values` repeated to fill the lanes."""
        pattern = [values] if isinstance(values, (int, float)) else list(values)
        return ir.Constant(vector(element, lanes), pattern * (lanes // len(pattern)))

    def call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        """Call an LLVM or target intrinsic by name."""
        module = self.builder.module
        function = module.globals.get(name) or ir.Function(
            module, ir.FunctionType(result, [argument.type for argument in arguments]), name
        )
        return self.builder.call(function, arguments)

    def load(self, address: ir.Value, element: ir.Type, lanes: int, offset: int = 0) -> ir.Value:
        """Load an unaligned vector from an address (i64) plus a constant offset in bytes."""
        if offset:
            address = self.builder.add(address, I64(offset))
        pointer = self.builder.inttoptr(address, vector(element, lanes).as_pointer())
        value = self.builder.load(pointer)
        value.align = _BYTES[element]
        return value

    def store(self, value: ir.Value, address: ir.Value, offset: int = 0) -> None:
        """Store an unaligned vector at an address (i64) plus a constant offset in bytes."""
        if offset:
            address = self.builder.add(address, I64(offset))
        pointer = self.builder.inttoptr(address, value.type.as_pointer())
        self.builder.store(value, pointer).align = _BYTES[value.type.element]

    def prefetch(self, address: ir.Value, offset: int = 0) -> None:
        """Ask for the cache line `offset` bytes behind an address, to be read once and soon."""
        pointer = self.builder.inttoptr(self.builder.add(address, I64(offset)), I8.as_pointer())
        module = self.builder.module
        name = "llvm.prefetch.p0"
        function = module.globals.get(name) or ir.Function(
            module, ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32]), name
        )
        self.builder.call(function, [pointer, I32(0), I32(3), I32(1)])

    def splat(self, address: ir.Value, element: ir.Type, lanes: int, offset: int = 0) -> ir.Value:
        """Load one element, `offset` bytes behind an address, and copy it into every lane."""
        one = self.load(address, element, 1, offset)
        return self.shuffle(one, [0] * lanes)

    def shuffle(self, value: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """Return the named lanes of one vector."""
        return self.builder.shuffle_vector(value, value, ir.Constant(vector(I32, len(lanes)), list(lanes)))

    def widen(self, value: ir.Value) -> ir.Value:
        """Zero-extend 16-bit lanes to 32 bits."""
        return self.builder.zext(value, vector(I32, value.type.count))

    def multiply_high(self, value: ir.Value, radices: Sequence[int] | int) -> ir.Value:
        """Return (value * radix) >> 16 of unsigned 16-bit lanes: the leading digits."""
        lanes = value.type.count
        name = {
            8: "llvm.x86.sse2.pmulhu.w",
            16: "llvm.x86.avx2.pmulhu.w",
            32: "llvm.x86.avx512.pmulhu.w.512",
        }.get(lanes)
        factor = self.constant(I16, radices, lanes)
        if self.isa == PORTABLE or name is None or (lanes == 32 and self.isa < AVX512):
            if self.isa == AVX2 and lanes == 32:
                low, high = self.split(value)
                return self.join(self.multiply_high(low, radices), self.multiply_high(high, radices))
            product = self.builder.mul(self.widen(value), self.widen(factor))
            return self.builder.trunc(self.builder.lshr(product, self.constant(I32, 16, lanes)), vector(I16, lanes))
        return self.call(name, value.type, value, factor)

    def multiply_low(self, value: ir.Value, factors: Sequence[int] | int) -> ir.Value:
        """Return value * factor mod 65536 of 16-bit lanes: the fraction with leading digits shifted out."""
        return self.builder.mul(value, self.constant(I16, factors, value.type.count))

    def split(self, value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return the lower and the upper half of a vector."""
        half = value.type.count // 2
        return self.shuffle(value, range(half)), self.shuffle(value, range(half, 2 * half))

    def join(self, low: ir.Value, high: ir.Value) -> ir.Value:
        """Concatenate two vectors."""
        lanes = 2 * low.type.count
        return self.builder.shuffle_vector(low, high, ir.Constant(vector(I32, lanes), list(range(lanes))))

    def dot_pairs(self, accumulator: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
        """Add left[2i] * right[2i] + left[2i+1] * right[2i+1], signed 16-bit lanes, to the 32-bit lane i."""
        lanes = left.type.count
        if self.isa == AVX512:
            width = {8: "128", 16: "256", 32: "512"}.get(lanes)
            if width is not None:
                return self.call(f"llvm.x86.avx512.vpdpwssd.{width}", accumulator.type, accumulator, left, right)
        if self.isa == AVX2:
            if lanes == 32:
                results = [
                    self.dot_pairs(part, a, b)
                    for part, a, b in zip(self.split(accumulator), self.split(left), self.split(right), strict=True)
                ]
                return self.join(*results)
            name = {8: "llvm.x86.sse2.pmadd.wd", 16: "llvm.x86.avx2.pmadd.wd"}[lanes]
            return self.builder.add(accumulator, self.call(name, accumulator.type, left, right))
        wide = vector(I32, lanes)
        product = self.builder.mul(self.builder.sext(left, wide), self.builder.sext(right, wide))
        even = self.shuffle(product, range(0, lanes, 2))
        odd = self.shuffle(product, range(1, lanes, 2))
        return self.builder.add(accumulator, self.builder.add(even, odd))

    def lookup(self, table: Sequence[ir.Value], address: ir.Value, indices: ir.Value) -> ir.Value:
        """Return the floats at `indices` (32-bit lanes, below 32) of a table of 32 floats.

        `table` is the table in two registers, used where a permutation reads them; `address` is the same in memory.
        """
        lanes = indices.type.count
        if self.isa == AVX512 and lanes == 16:
            return self.call("llvm.x86.avx512.vpermi2var.ps.512", table[0].type, table[0], indices, table[1])
        base = self.builder.inttoptr(address, FLOAT.as_pointer())
        result = ir.Constant(vector(FLOAT, lanes), ir.Undefined)
        for lane in range(lanes):
            index = self.builder.extract_element(indices, I32(lane))
            pointer = self.builder.gep(base, [index], source_etype=FLOAT)
            result = self.builder.insert_element(result, self.builder.load(pointer), I32(lane))
        return result

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """Return a * b + c with one rounding."""
        return self.call(f"llvm.fma.v{a.type.count}f32", a.type, a, b, c)

    def to_float(self, value: ir.Value) -> ir.Value:
        """Convert signed 32-bit lanes to float32."""
        return self.builder.sitofp(value, vector(FLOAT, value.type.count))

    def sum(self, value: ir.Value) -> ir.Value:
        """Return the sum of a float vector's lanes, pairwise."""
        function = f"llvm.vector.reduce.fadd.v{value.type.count}f32"
        module = self.builder.module
        declared = module.globals.get(function) or ir.Function(
            module, ir.FunctionType(FLOAT, [FLOAT, value.type]), function
        )
        return self.builder.call(declared, [FLOAT(0.0), value], fastmath=("reassoc",))
