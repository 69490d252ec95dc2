"""Rows of prompts through the base's layers, in one compiled call.

A piece of a product unpacks 32 outputs of the 4-bit weights into bfloat16 and takes all rows past them; inputs are
bfloat16, sums, norms and the residual stream float32. Every row is computed in an order of its own position, so its
bits depend neither on its neighbours nor on where its prompt was cut (tests/model/test_native.py).
L layers, R rows, H hidden, D head_dim; packed matrices as in model.native.packed, spans as in model.native.reader.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false

import numpy as np
from numba import njit

from model.native.attention import bfloat16_of, cached
from model.native.halves import PAIR_BYTES, ROWS, WIDTH, run_tile, unpack_4bit, unpack_8bit
from model.native.prompt_attention import attend_block, lay_out
from model.native.rows import ONE, exp, norm, rotate
from model.native.sharing import GONE, close, finish, offer, rest, sent_home, take, wait_for
from model.native.simd import LANES
from model.native.tiles import GROUP, group_bytes

ROW_PIECE = 16  # rows of a piece of what is done row by row
BEFORE_QKV, QKV, PLACE, LAY_OUT, ATTENTION, OUTPUT, BEFORE_GATE_UP, GATE_UP, DOWN = range(9)
JOBS = 9
EIGHT_BITS = group_bytes(8)
STAGGER = 16  # numbers between rows of scores, so that not all begin in the same set of a cache


@njit
def normalise(rows, weight, eps, normed, out):
    """RMSNorm of rows (n, H) in bfloat16, out (n, H or more); normed (H) is scratch."""
    for row in range(len(rows)):
        norm(rows[row], weight, eps, normed)
        for i in range(len(normed)):
            out[row, i] = bfloat16_of(normed[i])


@njit
def place_row(layer, position, span, wide, queries, cos, sin, heads, kv_heads):
    """Rotate a row's queries and key; queries (heads D) become bfloat16, key and value go into the cache."""
    head_dim = 2 * len(cos)
    parts = wide.reshape(-1, head_dim)
    rotate(parts[: heads + kv_heads], cos, sin)
    for i in range(len(queries)):
        queries[i] = bfloat16_of(wide[i])
    for head in range(kv_heads):
        key = cached(span[0], layer, kv_heads, head, span[2], head_dim)
        value = cached(span[1], layer, kv_heads, head, span[2], head_dim)
        for i in range(head_dim):
            key[position, i] = bfloat16_of(parts[heads + head, i])
            value[position, i] = bfloat16_of(parts[heads + kv_heads + head, i])


@njit(error_model="numpy", fastmath={"contract"})
def hand_over(kind, rows, row, column, sums, hidden, wide, inner):
    """A tile's sums (rows, 32): added to `hidden`, kept in `wide`, or silu(gate) * up into `inner`, gates first."""
    for i in range(rows):
        if kind == GATE_UP:
            for j in range(LANES):
                x = sums[i, j]
                inner[row + i, column + j] = bfloat16_of(x / (ONE + exp(-x)) * sums[i, LANES + j])
        elif kind == QKV:
            for j in range(WIDTH):
                wide[row + i, column + j] = sums[i, j]
        else:
            for j in range(WIDTH):
                hidden[row + i, column + j] += sums[i, j]


@njit
def product(kind, packed, piece, inputs, hidden, wide, inner, panel, sums):
    """32 outputs of a packed matrix by rows (R, M) of bfloat16; `panel` is an address with room for one."""
    groups, rows, row = packed.shape[1], len(inputs), 0
    tile, distance = 2 * piece, 1
    if kind == GATE_UP:
        tile, distance = piece, packed.shape[0] // 2
    for half in range(2):
        address = packed.ctypes.data + (tile + half * distance) * packed.strides[0]
        if packed.shape[2] == EIGHT_BITS:
            unpack_8bit(address, groups, panel + half * PAIR_BYTES // 2)
        else:
            unpack_4bit(address, groups, panel + half * PAIR_BYTES // 2)
    while row < rows:
        address = inputs.ctypes.data + row * inputs.strides[0]
        taken = run_tile(
            rows - row,
            panel,
            groups * GROUP // 2,
            address,
            inputs.strides[0],
            sums.ctypes.data,
            sums.strides[0],
        )
        hand_over(kind, taken, row, tile * LANES, sums, hidden, wide, inner)
        row += taken


@njit(inline="always")
def do_piece(kind, layer, piece, hidden, place, matrices, room, rope, heads, kv_heads, own):
    """A piece of a job: some rows, 32 outputs of a product, a stretch of keys, some rows of one head."""
    positions, spans, of_row, blocks, stretches = place
    inputs, wide, queries, inner, key_panels, value_panels = room
    cos, sin, eps = rope
    # The array stays in `own`: numba frees one of which only the address is used.
    panel, sums, scores, shares, normed = (own[0].ctypes.data + 63) & -64, own[1], own[2], own[3], own[4]
    size = hidden.shape[1]
    rows = slice(piece * ROW_PIECE, min((piece + 1) * ROW_PIECE, len(hidden)))
    if kind == BEFORE_QKV:
        normalise(hidden[rows], matrices[4][layer, 0], eps, normed, inputs[rows])
    elif kind == BEFORE_GATE_UP:
        normalise(hidden[rows], matrices[4][layer, 1], eps, normed, inputs[rows])
    elif kind == PLACE:
        for row in range(rows.start, rows.stop):
            at = positions[row]
            place_row(
                layer, at, spans[of_row[row]], wide[row], queries[row], cos[at], sin[at], heads, kv_heads
            )
    elif kind == LAY_OUT:
        stretch = stretches[piece]
        lay_out(layer, spans[stretch[0]], stretch[1], kv_heads, key_panels, value_panels)
    elif kind == ATTENTION:
        block, head = blocks[piece // heads], piece % heads
        span, kv_head = spans[block[0]], head // (heads // kv_heads)
        head_dim = 2 * cos.shape[1]
        columns = slice(head * head_dim, (head + 1) * head_dim)
        of_block = slice(block[1], block[2])
        attend_block(
            queries[of_block, columns],
            block[1] - span[3] + span[4],
            key_panels[kv_head, span[5] :],
            value_panels[kv_head],
            span[5],
            (scores, shares, sums),
            inputs[of_block, columns],
        )
    elif kind == QKV:
        product(kind, matrices[0][layer], piece, inputs[:, :size], hidden, wide, inner, panel, sums)
    elif kind == OUTPUT:
        product(
            kind,
            matrices[1][layer],
            piece,
            inputs[:, : heads * 2 * cos.shape[1]],
            hidden,
            wide,
            inner,
            panel,
            sums,
        )
    elif kind == GATE_UP:
        product(kind, matrices[2][layer], piece, inputs[:, :size], hidden, wide, inner, panel, sums)
    else:
        product(kind, matrices[3][layer], piece, inner, hidden, wide, inner, panel, sums)


@njit(inline="always")
def pieces_of(kind, rows, place, matrices, heads):
    if kind in (BEFORE_QKV, PLACE, BEFORE_GATE_UP):
        return (rows + ROW_PIECE - 1) // ROW_PIECE
    if kind == LAY_OUT:
        return len(place[4])
    if kind == ATTENTION:
        return len(place[3]) * heads
    if kind == GATE_UP:
        return matrices[2].shape[1] // 2
    if kind == QKV:
        return matrices[0].shape[1] // 2
    if kind == OUTPUT:
        return matrices[1].shape[1] // 2
    return matrices[3].shape[1] // 2


@njit(inline="always")
def first_job(half):
    """The number of a half layer's first job, through all layers."""
    return half // 2 * JOBS + half % 2 * BEFORE_GATE_UP


@njit(nogil=True)
def read(board, leads, first, last, hidden, place, matrices, room, rope, heads, kv_heads):
    """Rows (R, H) through half layers `first` to `last` - 1, in place; caches take in keys and values.

    Half a layer is its attention, of layer n number 2 n, or its FFN.

    One thread leads, others may follow on the same board; they return when all is done.
    """
    widest = max(matrices[1].shape[2], matrices[2].shape[2], matrices[3].shape[2]) * GROUP
    longest = room[4].shape[1] * WIDTH
    own = (
        np.empty(
            widest * WIDTH + 32, np.uint16
        ),  # by an address behind its own: a panel begins at a register
        np.empty((ROWS, WIDTH), np.float32),
        np.empty((ROWS, longest + STAGGER), np.float32),
        np.empty((ROWS, longest + 2 * STAGGER), np.uint16),
        np.empty(hidden.shape[1], np.float32),
    )
    step, end = first_job(first), first_job(last)
    pieces, waited = 0, 0
    while True:
        if not leads and sent_home(board):
            return
        kind, layer, piece = take(board)
        if kind >= 0:
            do_piece(kind, layer, piece, hidden, place, matrices, room, rope, heads, kv_heads, own)
            finish(board)
            waited = 0
        elif not leads:
            if kind == GONE:
                return
            waited = rest(board, waited)
        else:
            wait_for(board, pieces)
            if step == end:
                close(board)
                return
            kind, layer = step % JOBS, step // JOBS
            pieces = pieces_of(kind, len(hidden), place, matrices, heads)
            offer(board, kind, layer, pieces)
            step += 1
