"""Registers of 512 bits and what numba has no words for: how the intrinsics of this folder are spelled in LLVM's terms."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # float32 numbers of a register

I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
BYTES = ir.VectorType(I8, 4 * LANES)
INTS = ir.VectorType(I32, LANES)
FLOATS = ir.VectorType(F32, LANES)
HALVES = ir.VectorType(ir.HalfType(), LANES)
SHORTS = ir.VectorType(I16, LANES)
VOID = ir.VoidType()

Builder = Any  # llvmlite ships no types
Value = Any


def number(value: int) -> Value:
    return ir.Constant(I64, value)


def filled(kind: Any, value: float) -> Value:
    return ir.Constant(kind, [value] * kind.count)


def load(b: Builder, address: Value, kind: Any, align: int = 4) -> Value:
    loaded = b.load(b.inttoptr(address, kind.as_pointer()))
    loaded.align = align
    return loaded


def store(b: Builder, value: Value, address: Value, align: int = 4) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = align


def splat(b: Builder, value: Value, kind: Any) -> Value:
    """One number in all lanes."""
    nothing = ir.Constant(kind, ir.Undefined)
    first = b.insert_element(nothing, value, ir.Constant(I32, 0))
    return b.shuffle_vector(first, nothing, filled(ir.VectorType(I32, kind.count), 0))


def call(b: Builder, name: str, result: Any, *arguments: Value, fastmath: tuple[str, ...] = ()) -> Value:
    """One of LLVM's own functions."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments, fastmath=fastmath)


def fma(b: Builder, first: Value, second: Value, added: Value) -> Value:
    return call(b, "llvm.fma.v16f32", FLOATS, first, second, added)


def _of_one(result: Any, argument: Any, spelled: Callable[[Builder, Value], Value]) -> Callable[..., Any]:
    """A function of one number for numba."""

    @intrinsic
    def function(typingctx: Any, value: Any) -> Any:
        def generate(context: Any, b: Builder, signature: Any, arguments: Any) -> Any:
            return spelled(b, arguments[0])

        return result(argument), generate

    return function


bits_of_float = _of_one(types.uint32, types.float32, lambda b, value: b.bitcast(value, I32))
float_of_bits = _of_one(types.float32, types.uint32, lambda b, value: b.bitcast(value, F32))
float_of_half = _of_one(
    types.float32, types.uint16, lambda b, value: b.fpext(b.bitcast(value, ir.HalfType()), F32)
)
# To the nearest whole number, ties to even.
rounded = _of_one(types.float32, types.float32, lambda b, value: call(b, "llvm.rint.f32", F32, value))
# An address as a pointer that `numba.carray` takes.
pointer = _of_one(types.voidptr, types.int64, lambda b, value: b.inttoptr(value, cgutils.voidptr_t))
