"""Vector operations as LLVM IR, for kernels written with `numba.extending.intrinsic`.

`Vectors` wraps an IR builder with the handful of operations that the kernels are made of. An operation that x86
has as one instruction is called by its target's name where the chosen instruction set has it, and is a generic
pattern elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from llvmlite import ir

from cpu_kernels.simd.variants import AVX2, AVX2_VNNI, AVX512, AVX512_NO_VNNI, NEON_DOTPROD, PORTABLE

I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
HALF, FLOAT = ir.HalfType(), ir.FloatType()
# 2**r for |r| <= 1/2, the polynomial of least relative error (Remez): off by 8e-8 in float32.
_POWER_OF_TWO = (
    1.0,
    0.6931471824645996,
    0.24022646248340607,
    0.055503278970718384,
    0.009618484415113926,
    0.001340015442110598,
    0.00015347320004366338,
)
_LOWEST_POWER = -125.0  # below, powers of two are taken to be zero: the result would be no normal number
_BY_ADDING = (3,)  # factors that LLVM replaces with shifts and additions
_BYTES = {I8: 1, I16: 2, I32: 4, HALF: 2, FLOAT: 4}


def vector(element: ir.Type, lanes: int) -> ir.VectorType:
    """Return the type <lanes x element>."""
    return ir.VectorType(element, lanes)


class Vectors:
    """Emits vector operations into `builder` for one instruction set."""

    def __init__(self, builder: ir.IRBuilder, isa: int, *, keep_constants: bool = False) -> None:
        """Emit into `builder`; `keep_constants` makes factors once, at the function's start, where registers are few.

        Otherwise LLVM makes them anew wherever it runs out of registers, with two instructions each.
        """
        self.builder = builder
        self.isa = isa
        self._kept: dict[tuple[int, ...], ir.Value] | None = None
        if keep_constants and isa in (AVX2, AVX2_VNNI):
            self._kept = {}
        self._generic = isa in (PORTABLE, NEON_DOTPROD)
        self._register_bits = 128 if isa == NEON_DOTPROD else 512 if isa >= AVX512_NO_VNNI else 256
        self.has_quads = isa in (NEON_DOTPROD, AVX2_VNNI, AVX512)

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

    def prefetch(self, address: ir.Value, offset: int = 0, *, into_first_level: bool = True) -> None:
        """Ask for the cache line `offset` bytes behind an address, to be read soon; or later, from the second cache."""
        pointer = self.builder.inttoptr(self.builder.add(address, I64(offset)), I8.as_pointer())
        module = self.builder.module
        name = "llvm.prefetch.p0"
        function = module.globals.get(name) or ir.Function(
            module, ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32]), name
        )
        self.builder.call(function, [pointer, I32(0), I32(3 if into_first_level else 2), I32(1)])

    def splat(self, address: ir.Value, element: ir.Type, lanes: int, offset: int = 0) -> ir.Value:
        """Load one element, `offset` bytes behind an address, and copy it into every lane."""
        one = self.load(address, element, 1, offset)
        return self.shuffle(one, [0] * lanes)

    def fill(self, value: ir.Value, lanes: int) -> ir.Value:
        """Copy a number into every lane."""
        one = ir.Constant(vector(value.type, 1), ir.Undefined)
        return self.shuffle(self.builder.insert_element(one, value, I32(0)), [0] * lanes)

    def shuffle(self, value: ir.Value, lanes: Sequence[int]) -> ir.Value:
        """Return the named lanes of one vector."""
        return self.builder.shuffle_vector(value, value, ir.Constant(vector(I32, len(lanes)), list(lanes)))

    def interleave_halves(self, left: ir.Value, right: ir.Value, half: int) -> ir.Value:
        """Interleave the lower or upper halves (0, 1) of each 16 bytes of two vectors."""
        lanes = left.type.count
        own = 16 // _BYTES[left.type.element]
        places = [first + half * own // 2 + k for first in range(0, lanes, own) for k in range(own // 2)]
        order = [lane for place in places for lane in (place, lanes + place)]
        return self.builder.shuffle_vector(left, right, ir.Constant(vector(I32, lanes), order))

    def spread(self, words: ir.Value, order: Sequence[int]) -> ir.Value:
        """Return 16 of up to 8 16-bit lanes, as one byte shuffle of AVX2."""
        count = words.type.count
        both = self.shuffle(words, [lane % count for lane in range(16)])
        places = [2 * word + byte for word in order for byte in range(2)]
        with self.builder.goto_entry_block():
            shuffle = self.keep(ir.Constant(vector(I8, 32), places))
        twice = self.builder.bitcast(both, shuffle.type)
        return self.builder.bitcast(self.call("llvm.x86.avx2.pshuf.b", shuffle.type, twice, shuffle), both.type)

    def widen(self, value: ir.Value) -> ir.Value:
        """Zero-extend lanes to 32 bits."""
        return self.builder.zext(value, vector(I32, value.type.count))

    def _registers(self, value: ir.Value) -> list[ir.Value]:
        """Return the vectors of a register's size that make up a vector."""
        if 8 * _BYTES[value.type.element] * value.type.count <= self._register_bits:
            return [value]
        return [part for half in self.split(value) for part in self._registers(half)]

    def _in_registers(self, operation: Callable[..., ir.Value], *operands: ir.Value) -> ir.Value | None:
        """Apply `operation` to both halves of operands that fill two registers; None for operands that fit one."""
        if all(8 * _BYTES[operand.type.element] * operand.type.count <= self._register_bits for operand in operands):
            return None
        return self.join(*[operation(*halves) for halves in zip(*map(self.split, operands), strict=True)])

    def multiply_high(self, value: ir.Value, radices: Sequence[int] | int) -> ir.Value:
        """Return (value * radix) >> 16 of unsigned 16-bit lanes: the leading digits."""
        return self._multiply_high(value, self.factors(radices, value.type.count))

    def _multiply_high(self, value: ir.Value, factor: ir.Value) -> ir.Value:
        lanes = value.type.count
        name = {
            8: "llvm.x86.sse2.pmulhu.w",
            16: "llvm.x86.avx2.pmulhu.w",
            32: "llvm.x86.avx512.pmulhu.w.512",
        }.get(lanes)
        if self._generic or name is None:
            product = self.builder.mul(self.widen(value), self.widen(factor))
            return self.builder.trunc(self.builder.lshr(product, self.constant(I32, 16, lanes)), vector(I16, lanes))
        return self._in_registers(self._multiply_high, value, factor) or self.call(name, value.type, value, factor)

    def shift_left(self, value: ir.Value, bits: int) -> ir.Value:
        """Shift every lane."""
        return self.builder.shl(value, self.constant(value.type.element, bits, value.type.count))

    def multiply_low(self, value: ir.Value, factors: Sequence[int] | int) -> ir.Value:
        """Return value * factor mod 65536 of 16-bit lanes: the fraction with leading digits shifted out."""
        if factors in _BY_ADDING:
            return self.builder.mul(value, self.constant(I16, factors, value.type.count))
        return self.builder.mul(value, self.factors(factors, value.type.count))

    def factors(self, factors: Sequence[int] | int, lanes: int) -> ir.Value:
        """Return a vector of constant 16-bit factors, repeated to fill the lanes."""
        own = 16  # lanes of a register
        if self._kept is None or lanes < own:
            return self.constant(I16, factors, lanes)
        key = (factors,) if isinstance(factors, int) else tuple(factors)
        if key not in self._kept:
            with self.builder.goto_entry_block():
                self._kept[key] = self.keep(self.constant(I16, key, own))
        return self._kept[key] if lanes == own else self.join(self._kept[key], self._kept[key])

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
        if self.isa == NEON_DOTPROD:
            return self._dot_pairs_of_neon(accumulator, left, right)
        if self._generic:
            wide = vector(I32, lanes)
            product = self.builder.mul(self.builder.sext(left, wide), self.builder.sext(right, wide))
            even = self.shuffle(product, range(0, lanes, 2))
            odd = self.shuffle(product, range(1, lanes, 2))
            return self.builder.add(accumulator, self.builder.add(even, odd))
        if halves := self._in_registers(self.dot_pairs, accumulator, left, right):
            return halves
        if self.isa == AVX512:  # of 256 bits, it is no faster in decode and half as fast in prefill, where sums spill
            name = f"llvm.x86.avx512.vpdpwssd.{16 * lanes}"
            return self.call(name, accumulator.type, accumulator, left, right)
        name = {
            8: "llvm.x86.sse2.pmadd.wd",
            16: "llvm.x86.avx2.pmadd.wd",
            32: "llvm.x86.avx512.pmaddw.d.512",
        }[lanes]
        return self.builder.add(accumulator, self.call(name, accumulator.type, left, right))

    def _dot_pairs_of_neon(self, accumulator: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
        """Do what `dot_pairs` does, with an addition of neighbours that LLVM does not take apart."""
        if halves := self._in_registers(self._dot_pairs_of_neon, accumulator, left, right):
            return halves
        wide = vector(I32, left.type.count)
        product = self.builder.mul(self.builder.sext(left, wide), self.builder.sext(right, wide))
        sums = self.call("llvm.aarch64.neon.addp.v4i32", accumulator.type, *self.split(product))
        return self.builder.add(accumulator, sums)

    def keep(self, value: ir.Value, after: Sequence[ir.Value] = ()) -> ir.Value:
        """Return a value that LLVM takes for a new one: it does not regroup the operations before and after.

        What uses it comes behind what computes the vectors `after`, in the program, not in the processor.
        """
        if self.isa in (AVX2, AVX2_VNNI):
            after = [part for other in after for part in self._registers(other)]
            function = ir.FunctionType(value.type, [value.type, *(other.type for other in after)])
            register = "r" if isinstance(value.type, ir.IntType) else "v"
            constraint = ",".join([f"={register}", "0", *["v"] * len(after)])
            return self.builder.asm(function, "", constraint, [value, *after], side_effect=False)
        return value

    def dot_quads(self, accumulator: ir.Value, left: ir.Value, right: ir.Value) -> ir.Value:
        """Add the four products of unsigned 8-bit lanes of `left` and signed ones of `right` to each 32-bit lane.

        `left` is at most 127: the sum of two neighbouring products has to fit 16 bits, and Arm takes it for signed.
        """
        lanes = left.type.count
        if self.has_quads:
            neon = self.isa == NEON_DOTPROD
            name = "llvm.aarch64.neon.sdot.v4i32.v16i8" if neon else f"llvm.x86.avx512.vpdpbusd.{8 * lanes}"
            whole = self._in_registers(self.dot_quads, accumulator, left, right)
            return whole or self.call(name, accumulator.type, accumulator, left, right)
        return self.dot_pairs(accumulator, self.multiply_quads(left, right), self.constant(I16, 1, lanes // 2))

    def multiply_quads(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """Multiply unsigned 8-bit lanes with signed ones and add neighbours: 16-bit lanes; see `dot_quads`."""
        lanes = left.type.count
        if self._generic:
            wide = vector(I16, lanes)
            product = self.builder.mul(self.builder.zext(left, wide), self.builder.sext(right, wide))
            even, odd = self.shuffle(product, range(0, lanes, 2)), self.shuffle(product, range(1, lanes, 2))
            return self.builder.add(even, odd)
        name = {
            16: "llvm.x86.ssse3.pmadd.ub.sw.128",
            32: "llvm.x86.avx2.pmadd.ub.sw",
            64: "llvm.x86.avx512.pmaddubs.w.512",
        }[lanes]
        halves = self._in_registers(self.multiply_quads, left, right)
        return halves or self.call(name, vector(I16, lanes // 2), left, right)

    def lookup(self, table: Sequence[ir.Value], address: ir.Value, indices: ir.Value) -> ir.Value:
        """Return the floats at `indices` (16- or 32-bit lanes, below 32) of a table of 32 floats.

        `table` is the table in two registers, used where a permutation reads them; `address` is the same in memory.
        """
        indices, lanes = self.widen(indices), indices.type.count
        if self._register_bits == 512 and lanes == 16:
            return self.call("llvm.x86.avx512.vpermi2var.ps.512", table[0].type, table[0], indices, table[1])
        if not self._generic and self._register_bits == 256 and lanes == 16:
            return self.join(*[self.lookup(table, address, half) for half in self.split(indices)])
        if not self._generic and self._register_bits == 256 and lanes == 8:
            quarters = [quarter for half in table for quarter in self.split(half)]
            found = [self.call("llvm.x86.avx2.permps", quarter.type, quarter, indices) for quarter in quarters]
            high = [
                self.builder.icmp_signed("<", self.shift_left(indices, 31 - bit), self.constant(I32, 0, lanes))
                for bit in (3, 4)
            ]
            halves = [self.builder.select(high[0], found[k + 1], found[k]) for k in (0, 2)]
            return self.builder.select(high[1], halves[1], halves[0])
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

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """Return a * b + c, rounded once where the processor can."""
        return self.call(f"llvm.fmuladd.v{a.type.count}f32", a.type, a, b, c)

    def power_of_two(self, x: ir.Value) -> ir.Value:
        """Return 2**x of float32 lanes up to 127; zero below -125."""
        builder, lanes = self.builder, x.type.count
        zero = self.constant(FLOAT, 0.0, lanes)
        too_small = builder.fcmp_ordered("<", x, self.constant(FLOAT, _LOWEST_POWER, lanes))
        usable = builder.select(too_small, zero, x)
        whole = self.call(f"llvm.rint.v{lanes}f32", x.type, usable)
        rest = builder.fsub(usable, whole)
        power: ir.Value = self.constant(FLOAT, _POWER_OF_TWO[-1], lanes)
        for coefficient in _POWER_OF_TWO[-2::-1]:
            power = self.multiply_add(power, rest, self.constant(FLOAT, coefficient, lanes))
        integers = vector(I32, lanes)
        exponent = self.shift_left(builder.fptosi(whole, integers), 23)
        scaled = builder.bitcast(builder.add(builder.bitcast(power, integers), exponent), x.type)
        return builder.select(too_small, zero, scaled)

    def to_float(self, value: ir.Value) -> ir.Value:
        """Convert signed 32-bit lanes to float32."""
        return self.builder.sitofp(value, vector(FLOAT, value.type.count))

    def sum(self, value: ir.Value) -> ir.Value:
        """Return the sum of a float vector's lanes: both halves are added until one lane is left."""
        while value.type.count > 1:
            value = self.builder.fadd(*self.split(value))
        return self.builder.extract_element(value, I32(0))
