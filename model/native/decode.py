"""A few rows through the base's layers, in one compiled call: a token of every sequence that is being written.

The weights keep the 4 or 8 bits of the file, a row is quantised to 16 bits in groups of 32 before each product;
attention, norms and the residual stream are float32. Rows are computed one by one or by instructions that treat them
apart, so a row's bits never depend on its neighbours, nor on which thread did what (tests/model/test_native.py).
L layers, R rows, H hidden, V vocabulary, P positions, D head_dim; packed matrices as in model.native.packed.
"""

# pyright: reportUntypedFunctionDecorator=false, reportUnknownParameterType=false, reportMissingParameterType=false

from numba import njit

from model.native.attention import attend, bfloat16_of, cached
from model.native.product import product_4bit, product_8bit
from model.native.routed import NORM, add_block
from model.native.rows import norm, quantise, rotate, silu_product
from model.native.sharing import GONE, close, finish, offer, rest, sent_home, take, wait_for
from model.native.tiles import GROUP, group_bytes

PIECES = 16  # of a product
EIGHT_BITS = group_bytes(8)
# The kinds of jobs: those that are done row by row, and products.
BEFORE_QKV, PLACE, ATTENTION, BEFORE_GATE_UP, BEFORE_DOWN, BLOCK, BEFORE_HEAD = range(7)
QKV, OUTPUT, GATE_UP, DOWN, HEAD = range(7, 12)
LAYER_JOBS = 10


@njit
def place_row(layer, parts, position, cache, cos, sin, heads, kv_heads):
    """Rotate a row's queries and keys, parts (Q + 2 G, D), and put its keys and values into the cache."""
    head_dim = parts.shape[1]
    rotate(parts[: heads + kv_heads], cos[position], sin[position])
    for head in range(kv_heads):
        key = cached(cache[0], layer, kv_heads, head, cache[2], head_dim)
        value = cached(cache[1], layer, kv_heads, head, cache[2], head_dim)
        for i in range(head_dim):
            key[position, i] = bfloat16_of(parts[heads + head, i])
            value[position, i] = bfloat16_of(parts[heads + kv_heads + head, i])


@njit(inline="always")
def do_piece(kind, layer, piece, hidden, place, matrices, blocks, head, room, rope, heads, kv_heads):
    """A piece of a job: a row, one of its key/value heads, or some of a product's outputs."""
    quants, sums, wide, narrow, values, scratch = room
    cos, sin, eps = rope
    size, inner = hidden.shape[1], matrices[3].shape[2] * GROUP
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
    if kind == BLOCK:
        about = blocks[1][blocks[0][layer], piece]
        if about[NORM] != 0:
            add_block(about, hidden[piece], blocks[2][blocks[0][layer], piece])
        return
    head_dim, (positions, caches) = 2 * cos.shape[1], place
    if kind == PLACE:
        parts = wide[piece, : (heads + 2 * kv_heads) * head_dim].reshape(-1, head_dim)
        place_row(layer, parts, positions[piece], caches[piece], cos, sin, heads, kv_heads)
        return
    if kind == ATTENTION:
        row, kv_head, width = piece // kv_heads, piece % kv_heads, heads // kv_heads * head_dim
        columns = slice(kv_head * width, (kv_head + 1) * width)
        cache = caches[row]
        key = cached(cache[0], layer, kv_heads, kv_head, cache[2], head_dim)
        value = cached(cache[1], layer, kv_heads, kv_head, cache[2], head_dim)
        own, queries = values[row, columns], wide[row, columns].reshape(-1, head_dim)
        attend(queries, key, value, positions[row] + 1, scratch[piece], own.reshape(-1, head_dim))
        groups = slice(columns.start // GROUP, columns.stop // GROUP)
        quantise(own, quants[row, groups], sums[row, groups])
        return
    row, width = values[piece], size
    if kind == BEFORE_DOWN:
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
    order = (BEFORE_QKV, QKV, PLACE, ATTENTION, OUTPUT, BEFORE_GATE_UP, GATE_UP, BEFORE_DOWN, DOWN, BLOCK)
    return order[step % LAYER_JOBS], first + step // LAYER_JOBS


@njit(nogil=True)
def work(board, leads, first, last, hidden, place, matrices, blocks, head, room, rope, heads, kv_heads):
    """Rows (R, H) through layers `first` to `last` - 1, in place, then through the head if logits (R, V) are given.

    Behind a layer come the expert blocks of some rows (model.native.routed): where in what follows each layer is (L; -1:
    nowhere), what there is to know of each row's (B, R, COLUMNS), zeros where there is none, and what it chose (B, R, K + 1).
    Rows may belong to one sequence: each sees those before it. One thread leads, others may follow on the same board;
    they return when all is done.
    """
    rows, layer_jobs = len(hidden), LAYER_JOBS * (last - first)
    jobs = layer_jobs + 2 * min(len(head[2]), 1)
    step, pieces, waited = 0, 0, 0
    while True:
        if not leads and sent_home(board):
            return
        kind, layer, piece = take(board)
        if kind >= 0:
            do_piece(kind, layer, piece, hidden, place, matrices, blocks, head, room, rope, heads, kv_heads)
            finish(board)
            waited = 0
        elif not leads:
            if kind == GONE:
                return
            waited = rest(board, waited)
        else:
            wait_for(board, pieces)
            if step < layer_jobs and step % LAYER_JOBS == LAYER_JOBS - 1:
                for row in range(rows):
                    hidden[row] += room[3][row]
            if step == jobs:
                close(board)
                return
            kind, layer = job_of(step, first, layer_jobs)
            pieces = PIECES if kind >= QKV else rows * kv_heads if kind == ATTENTION else rows
            if kind == BLOCK and blocks[0][layer] < 0:
                pieces = 0
            offer(board, kind, layer, pieces)
            step += 1
