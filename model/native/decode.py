"""One token of every sequence that is being written through the base's layers, in one compiled call.

The weights keep the 4 or 8 bits of the file, a row is quantised to 16 bits in groups of 32 before each product;
attention, norms and the residual stream are float32. Rows are computed one by one or by instructions that treat them
apart, so a row's bits never depend on its neighbours, nor on which thread did what (tests/model/test_native.py).
L layers, R rows, H hidden, V vocabulary, P positions, D head_dim; packed matrices as in model.native.packed.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false

from numba import njit

from model.native.attention import attend, bfloat16_of, cached
from model.native.product import product_4bit, product_8bit
from model.native.rows import norm, quantise, rotate, silu_product
from model.native.sharing import GONE, close, finish, offer, rest, sent_home, take, wait_for
from model.native.tiles import GROUP, group_bytes

PIECES = 16  # of a product
EIGHT_BITS = group_bytes(8)
# The kinds of jobs: those that are done row by row, and products.
BEFORE_QKV, ATTENTION, BEFORE_GATE_UP, BEFORE_DOWN, BEFORE_HEAD = range(5)
QKV, OUTPUT, GATE_UP, DOWN, HEAD = range(5, 10)


@njit
def attend_row(layer, row, positions, caches, wide, attended, scores, cos, sin, heads, kv_heads):
    """Rotate a row's queries and key, put key and value into the cache, and attend."""
    position, capacity, head_dim = positions[row], caches[row, 2], 2 * cos.shape[1]
    group = heads // kv_heads
    parts = wide[row, : (heads + 2 * kv_heads) * head_dim].reshape(-1, head_dim)
    rotate(parts[: heads + kv_heads], cos[position], sin[position])
    out = attended.reshape(-1, head_dim)
    for head in range(kv_heads):
        key = cached(caches[row, 0], layer, kv_heads, head, capacity, head_dim)
        value = cached(caches[row, 1], layer, kv_heads, head, capacity, head_dim)
        for i in range(head_dim):
            key[position, i] = bfloat16_of(parts[heads + head, i])
            value[position, i] = bfloat16_of(parts[heads + kv_heads + head, i])
        own = slice(head * group, (head + 1) * group)
        attend(parts[own], key, value, position + 1, scores[row], out[own])


@njit(inline="always")
def do_piece(kind, layer, piece, hidden, place, matrices, head, room, rope, heads, kv_heads):
    """A piece of a job: a row, or some of a product's outputs."""
    quants, sums, wide, narrow, values, scores = room
    cos, sin, eps = rope
    size, inner, queries = hidden.shape[1], matrices[3].shape[2] * GROUP, 2 * heads * cos.shape[1]
    if kind >= QKV:
        packed, out = head[0], head[2]
        if kind == QKV:
            packed, out = matrices[0][layer], wide
        elif kind == OUTPUT:
            packed, out = matrices[1][layer], narrow
        elif kind == GATE_UP:
            packed, out = matrices[2][layer], wide
        elif kind == DOWN:
            packed, out = matrices[3][layer], narrow
        step = (packed.shape[0] + PIECES - 1) // PIECES
        first, last = piece * step, min((piece + 1) * step, packed.shape[0])
        if packed.shape[2] == EIGHT_BITS:
            product_8bit(packed, first, last, quants, sums, out)
        else:
            product_4bit(packed, first, last, quants, sums, out)
        return
    row, width = values[piece], size
    if kind == ATTENTION:
        width = queries
        attend_row(layer, piece, place[0], place[1], wide, row[:width], scores, cos, sin, heads, kv_heads)
    elif kind == BEFORE_DOWN:
        width = inner
        silu_product(wide[piece, :inner], wide[piece, inner : 2 * inner], row)
    else:
        weight = head[1]
        if kind == BEFORE_QKV:
            weight = matrices[4][layer, 0]
        elif kind == BEFORE_GATE_UP:
            hidden[piece] += narrow[piece]
            weight = matrices[4][layer, 1]
        norm(hidden[piece], weight, eps, row)
    quantise(row, quants[piece], sums[piece, : width // GROUP])


@njit(inline="always")
def job_of(step, first, steps):
    """The kind and layer of the job that comes as number `step` of `steps`; the last two are the head's."""
    if step >= steps:
        return BEFORE_HEAD + (step - steps) * (HEAD - BEFORE_HEAD), 0
    order = (BEFORE_QKV, QKV, ATTENTION, OUTPUT, BEFORE_GATE_UP, GATE_UP, BEFORE_DOWN, DOWN)
    return order[step % len(order)], first + step // len(order)


@njit(nogil=True)
def work(board, leads, first, last, hidden, place, matrices, head, room, rope, heads, kv_heads):
    """Rows (R, H) through layers `first` to `last` - 1, in place, then through the head if logits (R, V) are given.

    One thread leads, others may follow on the same board; they return when all is done.
    """
    rows, layer_jobs = len(hidden), 8 * (last - first)
    jobs = layer_jobs + 2 * min(len(head[2]), 1)
    step, pieces, waited = 0, 0, 0
    while True:
        if not leads and sent_home(board):
            return
        kind, layer, piece = take(board)
        if kind >= 0:
            do_piece(kind, layer, piece, hidden, place, matrices, head, room, rope, heads, kv_heads)
            finish(board)
            waited = 0
        elif not leads:
            if kind == GONE:
                return
            waited = rest(board, waited)
        else:
            wait_for(board, pieces)
            if 0 < step <= layer_jobs and step % 8 == 0:
                for row in range(rows):
                    hidden[row] += room[3][row]
            if step == jobs:
                close(board)
                return
            kind, layer = job_of(step, first, layer_jobs)
            pieces = PIECES if kind >= QKV else rows
            offer(board, kind, layer, pieces)
            step += 1
