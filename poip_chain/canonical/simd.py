"""Two inner loops written as vector code, because no compiler finds it from a plain loop.

`keccak_f` runs Keccak-f[1600] on LANES states side by side. `multiply_tile` is the heart of an integer matrix product:
vpmaddwd multiplies 16 pairs of int16 and adds neighbours, eight int32 results an instruction. Both are LLVM instructions
emitted through numba; imported only where numba is. Knows nothing of tensors or trees.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from poip_chain.canonical.compiled import cpu_has

LANES = 8 if cpu_has("avx512f") else 4
"""States per call of `keccak_f`: as many 64-bit lanes as a vector register has."""
WIDTH = 16
"""Output columns of a tile: two vectors of eight int32."""
HAVE_TILES = cpu_has("avx2")

_ROTATIONS = (0, 1, 62, 28, 27, 36, 44, 6, 55, 20, 3, 10, 43, 25, 39, 41, 45, 15, 21, 8, 18, 2, 61, 56, 14)
_I64, _I32, _I16 = ir.IntType(64), ir.IntType(32), ir.IntType(16)


def _data(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return context.make_array(kind)(context, builder, value).data


@intrinsic  # type: ignore[untyped-decorator]
def keccak_f(typing_context: Any, state: Any, constants: Any) -> Any:
    """keccak_f(state, constants): 24 rounds in place on uint64 [25 * LANES], lane x + 5 y of all states together."""
    signature = types.void(state, constants)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(_I64, LANES)
        base = builder.bitcast(_data(context, builder, signature.args[0], arguments[0]), vector.as_pointer())
        table = _data(context, builder, signature.args[1], arguments[1])
        rotate = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fshl.v{LANES}i64"
        )

        def constant(value: int) -> Any:
            return ir.Constant(vector, [value] * LANES)

        def rotl(value: Any, by: int) -> Any:
            return builder.call(rotate, [value, value, constant(by)]) if by else value

        def place(i: int) -> Any:
            return builder.gep(base, [ir.Constant(_I64, i)])

        loaded = [builder.load(place(i), align=8) for i in range(25)]
        before = builder.block
        loop = builder.append_basic_block("round")
        done = builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        counter = builder.phi(_I64)
        counter.add_incoming(ir.Constant(_I64, 0), before)
        a = []
        for value in loaded:
            phi = builder.phi(vector)
            phi.add_incoming(value, before)
            a.append(phi)
        column = []
        for x in range(5):
            value = a[x]
            for y in range(1, 5):
                value = builder.xor(value, a[x + 5 * y])
            column.append(value)
        parity = [builder.xor(column[(x + 4) % 5], rotl(column[(x + 1) % 5], 1)) for x in range(5)]
        moved: list[Any] = [None] * 25
        for i in range(25):
            x, y = i % 5, i // 5
            moved[y + 5 * ((2 * x + 3 * y) % 5)] = rotl(builder.xor(a[i], parity[x]), _ROTATIONS[i])
        result = []
        for i in range(25):
            x, y = i % 5, i // 5 * 5
            masked = builder.and_(builder.xor(moved[y + (x + 1) % 5], constant(2**64 - 1)), moved[y + (x + 2) % 5])
            result.append(builder.xor(moved[i], masked))
        one = builder.load(builder.gep(table, [counter]))
        spread: Any = ir.Constant(vector, ir.Undefined)
        for i in range(LANES):
            spread = builder.insert_element(spread, one, ir.Constant(_I32, i))
        result[0] = builder.xor(result[0], spread)
        following = builder.add(counter, ir.Constant(_I64, 1))
        counter.add_incoming(following, loop)
        for phi, value in zip(a, result, strict=True):
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_unsigned("<", following, ir.Constant(_I64, 24)), loop, done)
        builder.position_at_end(done)
        for i, value in enumerate(result):
            builder.store(value, place(i), align=8)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)  # type: ignore[untyped-decorator]
def multiply_tile(
    typing_context: Any, tokens: Any, limbs: Any, bits: Any, x: Any, x_at: Any, w: Any, w_at: Any, steps: Any, out: Any
) -> Any:
    """multiply_tile(tokens, limbs, bits, x, x_at, w, w_at, steps, out): adds to int64 out [tokens * WIDTH].

    x int32 [steps][tokens * limbs] from x_at on: two neighbouring columns of one limb of one row, as int16 in the lower
    and upper half; row-major in (token, limb). w int16 [steps][WIDTH][2] from w_at on. Limb l counts 2**(bits l) fold.
    The caller vouches that no int32 lane overflows within `steps`. The first three arguments are literals.
    """
    if not all(isinstance(kind, types.IntegerLiteral) for kind in (tokens, limbs, bits)):
        return None
    signature = types.void(tokens, limbs, bits, x, x_at, w, w_at, steps, out)
    count, parts, width = tokens.literal_value, limbs.literal_value, bits.literal_value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        args, rows = signature.args, count * parts
        short, narrow = ir.VectorType(_I16, 16), ir.VectorType(_I32, 8)
        wide = ir.VectorType(_I64, 4)
        madd = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(narrow, [short, short]), "llvm.x86.avx2.pmadd.wd"
        )

        def number(i: int) -> Any:
            return context.cast(builder, arguments[i], args[i], types.int64)

        xs = builder.gep(_data(context, builder, args[3], arguments[3]), [number(4)])
        ws = builder.gep(_data(context, builder, args[5], arguments[5]), [number(6)])
        sums = _data(context, builder, args[8], arguments[8])
        zero = ir.Constant(narrow, [0] * 8)
        before, loop = builder.block, builder.append_basic_block("step")
        done = builder.append_basic_block("flush")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(_I64)
        step.add_incoming(ir.Constant(_I64, 0), before)
        totals = []
        for _ in range(2 * rows):
            phi = builder.phi(narrow)
            phi.add_incoming(zero, before)
            totals.append(phi)
        w_step = builder.gep(ws, [builder.mul(step, ir.Constant(_I64, 2 * WIDTH))])
        pairs = []
        for v in range(2):
            place = builder.gep(w_step, [ir.Constant(_I64, 16 * v)])
            pairs.append(builder.load(builder.bitcast(place, short.as_pointer()), align=2))
        x_step = builder.gep(xs, [builder.mul(step, ir.Constant(_I64, rows))])
        following_totals = []
        for row in range(rows):
            value = builder.load(builder.gep(x_step, [ir.Constant(_I64, row)]))
            first = builder.insert_element(ir.Constant(narrow, ir.Undefined), value, ir.Constant(_I32, 0))
            everywhere = builder.shuffle_vector(
                first, ir.Constant(narrow, ir.Undefined), ir.Constant(ir.VectorType(_I32, 8), [0] * 8)
            )
            spread = builder.bitcast(everywhere, short)
            for v in range(2):
                products = builder.call(madd, [pairs[v], spread])
                following_totals.append(builder.add(totals[2 * row + v], products))
        following = builder.add(step, ir.Constant(_I64, 1))
        step.add_incoming(following, loop)
        for phi, value in zip(totals, following_totals, strict=True):
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", following, number(7)), loop, done)
        builder.position_at_end(done)
        for token in range(count):
            for v in range(2):
                for part in range(2):
                    lanes = ir.Constant(ir.VectorType(_I32, 4), [4 * part + i for i in range(4)])
                    at = builder.gep(sums, [ir.Constant(_I64, token * WIDTH + 8 * v + 4 * part)])
                    place = builder.bitcast(at, wide.as_pointer())
                    total = builder.load(place, align=8)
                    for limb in range(parts):
                        lane_sums = following_totals[2 * (token * parts + limb) + v]
                        some = builder.shuffle_vector(lane_sums, ir.Constant(narrow, ir.Undefined), lanes)
                        value = builder.sext(some, wide)
                        if limb:
                            value = builder.shl(value, ir.Constant(wide, [width * limb] * 4))
                        total = builder.add(total, value)
                    builder.store(total, place, align=8)
        return context.get_dummy_value()

    return signature, generate
