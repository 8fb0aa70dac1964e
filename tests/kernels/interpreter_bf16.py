"""bfloat16 under Triton's interpreter, which holds it as the uint16 of its bits and computes with those.

Here a bfloat16 value is a float32 number on the grid of bfloat16. Loads and stores convert; every result of that type
is rounded to the nearest, ties to even. A sum or a product of matrices is rounded once, at its end: a GPU adds
bfloat16 in another order, and `tl.dot` accumulates in float32 anyway.
"""

import numpy as np
import triton.language as tl
from triton._C.libtriton import interpreter as memory
from triton._C.libtriton import ir
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

NAN = np.uint32(0x7FC00000)


def bits_of(values: np.ndarray) -> np.ndarray:
    """The upper half of float32 numbers, which is the whole of those on the grid."""
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def values_of(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray, *, to_zero: bool = False) -> np.ndarray:
    """The nearest number on the grid, that with an even last bit where two are; or the next one towards zero."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    if not to_zero:
        bits = bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))
    return np.where(np.isnan(values), NAN, bits & np.uint32(0xFFFF0000)).view(np.float32)


def is_bf16(dtype: tl.dtype) -> bool:
    return dtype.scalar == tl.bfloat16


def on_grid(handle: TensorHandle) -> TensorHandle:
    """A result with the rounding that its type asks for; that of a comparison keeps its operands' type there."""
    if is_bf16(handle.dtype) and handle.data.dtype != np.bool_:
        handle.data = rounded(handle.data)
    return handle


class BFloat16Builder(InterpreterBuilder):
    """The interpreter's operations, with those that touch bfloat16 made right."""

    def get_bf16(self, value):
        return TensorHandle(rounded(np.array([value])), tl.bfloat16)

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        element = ptrs.get_element_ty()
        if not is_bf16(element):
            return super().create_masked_load(ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)
        instead = np.zeros(ptrs.data.shape, np.uint16) if other is None else bits_of(other.data)
        bits = memory.load(ptrs.data, mask.data, instead, np.dtype(np.uint16))
        return TensorHandle(values_of(bits), element)

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        if is_bf16(ptrs.get_element_ty()):
            return memory.store(ptrs.data, bits_of(value.data), mask.data)
        return super().create_masked_store(ptrs, value, mask, cache_modifier, eviction_policy)

    def cast_impl(self, src, dst_type):
        if is_bf16(dst_type):
            return TensorHandle(rounded(src.data.astype(np.float32)), tl.bfloat16)
        if is_bf16(src.dtype):
            return TensorHandle(src.data.astype(interpreter._get_np_dtype(dst_type)), dst_type.scalar)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if not (is_bf16(src.dtype) or is_bf16(dst_type)):
            return super().create_fp_to_fp(src, dst_type, rounding_mode)
        if 8 in (src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth):
            raise NotImplementedError("float8 to or from bfloat16")
        if is_bf16(dst_type) and rounding_mode == ir.ROUNDING_MODE.RTZ:
            return TensorHandle(rounded(src.data.astype(np.float32), to_zero=True), tl.bfloat16)
        return self.cast_impl(src, dst_type)

    def create_bitcast(self, src, dst_type):
        if is_bf16(src.dtype) and not is_bf16(dst_type):
            src = TensorHandle(bits_of(src.data), tl.uint16)
        elif is_bf16(dst_type) and not is_bf16(src.dtype):
            return TensorHandle(values_of(src.data.view(np.uint16)), tl.bfloat16)
        return super().create_bitcast(src, dst_type)

    def binary_op(self, lhs, rhs, op):
        return on_grid(super().binary_op(lhs, rhs, op))

    def ternary_op(self, lhs, rhs, other, op):
        return on_grid(super().ternary_op(lhs, rhs, other, op))

    def unary_op(self, arg, op):
        return on_grid(super().unary_op(arg, op))

    def create_fma(self, x, y, z):
        return on_grid(super().create_fma(x, y, z))

    def create_rsqrt(self, arg):
        return on_grid(super().create_rsqrt(arg))

    def create_erf(self, arg):
        return on_grid(super().create_erf(arg))

    def create_fabs(self, arg):
        return self.unary_op(arg, np.abs) if is_bf16(arg.dtype) else super().create_fabs(arg)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        if is_bf16(val.dtype):
            raise NotImplementedError("an atomic operation on bfloat16")
        return super().create_atomic_rmw(rmwOp, ptr, val, mask, sem, scope)

    def create_atomic_cas(self, ptr, cmp, val, sem, scope):
        if is_bf16(val.dtype):
            raise NotImplementedError("an atomic operation on bfloat16")
        return super().create_atomic_cas(ptr, cmp, val, sem, scope)


def install() -> None:
    """From here on the interpreter computes bfloat16; kernels that run on a GPU never see it."""
    if isinstance(interpreter.interpreter_builder, BFloat16Builder):
        return
    np_dtype, fits, to_tensor = (
        interpreter._get_np_dtype,
        interpreter._validate_np_data_size,
        ReduceScanOpInterface.to_tensor,
    )

    def float32_for_bf16(dtype):
        return np.dtype(np.float32) if is_bf16(dtype) else np_dtype(dtype)

    def fits_or_is_bf16(array, dtype):
        return array.dtype in (np.float32, np.bool_) if is_bf16(dtype) else fits(array, dtype)

    def to_rounded_tensor(self, ret, dtype):
        return to_tensor(self, rounded(ret) if is_bf16(dtype) else ret, dtype)

    interpreter._get_np_dtype = float32_for_bf16
    interpreter._validate_np_data_size = fits_or_is_bf16
    ReduceScanOpInterface.to_tensor = to_rounded_tensor
    interpreter.interpreter_builder.__class__ = BFloat16Builder
