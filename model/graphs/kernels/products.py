"""Products of rows with a matrix, together with what comes before and after them in a layer.

R rows, N outputs, M inputs.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

MOST_ROWS = 256  # beyond, and with 0 always, torch's operations
FEW_ROWS = 4  # up to which each program keeps its part of the matrix and takes all rows through it
MANY_OUTPUTS = 8192
NUMBERS = 8192  # of a matrix that a program of few rows has in its registers
SMALLEST_DOT = 16  # rows and columns of a tensor core's product


def product(
    rows: Tensor,
    weight: Tensor,
    *,
    norm: tuple[Tensor, float] | None = None,
    bias: Tensor | None = None,
    add_to: Tensor | None = None,
    gated: bool = False,
    exact: bool = False,
) -> Tensor:
    """rows (R, M) by weight (N, M): (R, N) in the weight's dtype, or added to `add_to` (R, N), which is returned.

    `norm`, weight (M) and epsilon: the rows' RMS norm is multiplied instead of them. `gated`: the weight is (2 N, M) and
    silu of the first half's product times the second half's is the result. `exact`: float32 rows are not rounded to the
    weight's dtype, nor is the result.
    """
    count, inputs = rows.shape
    if count > MOST_ROWS and not exact:
        return _in_torch(rows, weight, norm, bias, add_to, gated=gated)
    outputs = len(weight) // 2 if gated else len(weight)
    dtype = torch.float32 if exact else weight.dtype
    out = torch.empty(count, outputs, dtype=dtype, device=rows.device) if add_to is None else add_to
    assert rows.stride(1) == weight.stride(1) == out.stride(1) == 1, (rows, weight, out)
    norm_weight, eps = norm or (rows, 0.0)
    given = (
        *(rows, rows.stride(0), norm_weight, eps, weight, weight.stride(0)),
        *(rows if bias is None else bias, out, out.stride(0)),
    )
    kinds = {
        "NORM": norm is not None,
        "BIAS": bias is not None,
        "ADD": add_to is not None,
        "GATED": gated,
        "EXACT": exact and weight.dtype != torch.float32,
        "OUTPUTS": outputs,
        "INPUTS": inputs,
    }
    width = max(triton.next_power_of_2(inputs), 128)
    columns = NUMBERS // width // (2 if gated else 1)
    if count <= FEW_ROWS and columns:
        grid = (triton.cdiv(outputs, columns),)
        _few_rows[grid](*given, **kinds, ROWS=count, COLUMNS=columns, WIDTH=width, num_warps=4)
        return out
    tile = _tile(count, outputs)
    grid = (triton.cdiv(outputs, tile["COLUMNS"]), triton.cdiv(count, tile["ROWS"]))
    _many_rows[grid](*given, count, **kinds, **tile)
    return out


def _in_torch(
    rows: Tensor,
    weight: Tensor,
    norm: tuple[Tensor, float] | None,
    bias: Tensor | None,
    add_to: Tensor | None,
    *,
    gated: bool,
) -> Tensor:
    if norm is not None:
        rows = F.rms_norm(rows, norm[0].shape, *norm)
    result = F.linear(rows.to(weight.dtype), weight, bias)
    if gated:
        gate, up = result.chunk(2, dim=1)
        result = F.silu(gate) * up
    return result if add_to is None else add_to.add_(result)


def _tile(count: int, outputs: int) -> dict[str, int]:
    """Rows, columns and depth of a program's products, and how they are computed.

    A layer's matrices are cut for about as many programs as a large GPU has processors, an output head so that rows are
    read seldom.
    """
    rows = min(128, max(SMALLEST_DOT, triton.next_power_of_2(count)))
    if outputs >= MANY_OUTPUTS:
        warps = 8 if rows == 128 else 4
        return {"ROWS": rows, "COLUMNS": 64, "DEPTH": 64, "num_warps": warps, "num_stages": 3}
    if rows == 128:
        return {"ROWS": 64, "COLUMNS": 32, "DEPTH": 64, "num_warps": 4, "num_stages": 3}
    rows, depth = (rows, 128) if rows == SMALLEST_DOT else (32, 64)
    return {"ROWS": rows, "COLUMNS": 16, "DEPTH": depth, "num_warps": 4, "num_stages": 4}


@triton.jit
def _few_rows(
    rows,
    row_stride,
    norm,
    eps,
    weight,
    weight_stride,
    bias,
    out,
    out_stride,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    EXACT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A program for COLUMNS outputs of all rows; WIDTH, a power of two, is not below INPUTS."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.arange(0, WIDTH)
    inside = at < INPUTS
    there = column < OUTPUTS
    tile = there[:, None] & inside[None, :]
    address = weight + column[:, None].to(tl.int64) * weight_stride + at[None, :]
    matrix = tl.load(address, mask=tile, other=0.0)  # (COLUMNS, WIDTH)
    if GATED:
        second = tl.load(address + OUTPUTS * weight_stride, mask=tile, other=0.0)
    for row in tl.static_range(ROWS):
        part = tl.load(rows + row * row_stride + at, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            scale = tl.rsqrt(tl.sum(part * part, 0) / INPUTS + eps)
            part = part * scale * tl.load(norm + at, mask=inside, other=0.0)
        if not EXACT:
            part = part.to(matrix.dtype).to(tl.float32)
        result = tl.sum(matrix.to(tl.float32) * part[None, :], 1)
        if GATED:
            up = tl.sum(second.to(tl.float32) * part[None, :], 1)
            result = result / (1 + tl.exp(-result)) * up
        if BIAS:
            result += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
        target = out + row * out_stride + column
        if ADD:
            result += tl.load(target, mask=there, other=0.0)
        tl.store(target, result.to(out.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["count"])
def _many_rows(
    rows,
    row_stride,
    norm,
    eps,
    weight,
    weight_stride,
    bias,
    out,
    out_stride,
    count,
    NORM: tl.constexpr,
    BIAS: tl.constexpr,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    EXACT: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A program for ROWS x COLUMNS results. The norm's scale of a row is a factor of all its products: it comes last."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row_there, there = row < count, column < OUTPUTS
    squares = tl.zeros((ROWS,), tl.float32)
    result = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, INPUTS, DEPTH):
        at = start + tl.arange(0, DEPTH)
        inside = at < INPUTS
        tile = inside[:, None] & there[None, :]
        address = weight + column[None, :].to(tl.int64) * weight_stride + at[:, None]
        matrix = tl.load(address, mask=tile, other=0.0)  # (DEPTH, COLUMNS)
        part = tl.load(
            rows + row[:, None] * row_stride + at[None, :],
            mask=row_there[:, None] & inside[None, :],
            other=0.0,
        )
        if NORM:
            squares += tl.sum(part * part, 1)
            part = part * tl.load(norm + at, mask=inside, other=0.0)[None, :]
        rounded = part.to(matrix.dtype)
        result = tl.dot(rounded, matrix, result, input_precision="ieee")
        if EXACT:  # what rounding took away, in the same dtype
            rest = (part - rounded.to(tl.float32)).to(matrix.dtype)
            result = tl.dot(rest, matrix, result, input_precision="ieee")
        if GATED:
            second = tl.load(address + OUTPUTS * weight_stride, mask=tile, other=0.0)
            up = tl.dot(rounded, second, up, input_precision="ieee")
    if NORM:
        scale = tl.rsqrt(squares / INPUTS + eps)[:, None]
        result *= scale
        up *= scale
    if GATED:
        result = result / (1 + tl.exp(-result)) * up
    if BIAS:
        result += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
    target = out + row[:, None] * out_stride + column[None, :]
    place = row_there[:, None] & there[None, :]
    if ADD:
        result += tl.load(target, mask=place, other=0.0)
    tl.store(target, result.to(out.dtype.element_ty), mask=place)
