"""Compiled code for prompts: what it computes, and that neither neighbours nor cuts leave a mark on a row."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from model.checkpoints.assemble import assemble
from model.checkpoints.names import PACKED
from model.kv_cache import CacheBudget
from model.native.halves import WIDTH
from model.native.packed import pack
from model.native.reader import readable
from model.native.reading import QKV, product
from model.native.tiles import GROUP
from model.transformer import Segment, finished

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
pytestmark = pytest.mark.skipif(not readable([], 64), reason="this processor has no AVX-512 BF16")


def quantised_matrix(outputs, inputs, bits, seed=0):
    """The packed form, and the matrix (N, M) that it stands for."""
    generator = torch.Generator().manual_seed(seed)
    quants = torch.randint(0, 1 << bits, (outputs, inputs), generator=generator, dtype=torch.uint8)
    scale = torch.rand(outputs, inputs // GROUP, generator=generator).half() * inputs**-0.5 * 16 / (1 << bits)
    scales = torch.stack((scale, -scale * (1 << (bits - 1))), -1)
    groups = quants.float().unflatten(1, (-1, GROUP))
    matrix = (groups * scales[..., :1].float() + scales[..., 1:].float()).flatten(1)
    return pack(quants, scales, bits), matrix


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 3, 4, 12, 29])
def test_a_product_is_that_of_the_matrix_in_bfloat16(bits, count):
    packed, matrix = quantised_matrix(64, 96, bits)
    rows = torch.randn(count, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide, panel = torch.zeros(count, 64), torch.empty(96 * WIDTH, dtype=torch.uint16)
    nothing, halves = np.empty((0, 0), np.float32), np.empty((0, 0), np.uint16)
    for piece in range(2):
        product(
            QKV,
            packed.clone().numpy(),
            piece,
            rows.view(torch.uint16).numpy(),
            nothing,
            wide.numpy(),
            halves,
            panel.data_ptr(),
            np.empty((12, WIDTH), np.float32),
        )
    assert_close(wide, rows.float() @ matrix.bfloat16().float().T, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=[4, 8])
def models(request, make_tiny, random_weights):
    """A tiny model of packed matrices, and the same weights in float32."""
    config = replace(make_tiny(torch.float32).model.config, head_dim=64, **SIZES, vocab_size=96)
    weights = random_weights(config, torch.float32)
    for seed, (name, weight) in enumerate(list(weights.items())):
        if weight.dim() == 2:
            packed, matrix = quantised_matrix(
                *weight.shape, 8 if name == "embedding" else request.param, seed
            )
            weights |= {name: matrix, f"{name}{PACKED}": packed}
    # An embedding is looked up in bfloat16, and is the head in its 8 bits.
    both = {"embedding": weights["embedding"].bfloat16().float(), "head": weights["embedding"]}
    exact = assemble(config, {name: w for name, w in weights.items() if not name.endswith(PACKED)} | both)
    halved = {name: w if name.endswith(PACKED) else w.bfloat16() for name, w in weights.items()}
    return assemble(config, halved), exact


def text(seed, length):
    return [(7 * i + 11 * seed) % 96 for i in range(length)]


def fresh(model, capacity=256):
    """Memory in which somebody else left what is no number."""
    cache = CacheBudget(model.config, 4096, model.dtype, model.device).reserve(capacity)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    return cache


def distance(found, expected):
    return (found.float() - expected).norm() / expected.norm()


def test_compiled_code_is_no_further_from_float32_than_torch_in_bfloat16(models, monkeypatch):
    """Logits of every row, keys and values, and a token that is written behind them."""
    model, exact = models
    tokens = text(1, 150)

    def results(each):
        cache = fresh(each)
        rows = each.step([Segment(tokens, 0, cache)])
        after = each.step([Segment([5], 150, cache, decode=True)])
        caches = (part[:, :, :151] for part in (cache.keys, cache.values))
        return [each.logits(rows), each.logits(after), *caches]

    assert model.reader is not None
    found, expected = results(model), results(exact)
    monkeypatch.setattr(model, "reader", None)
    by_torch = results(model)
    for mine, theirs, right in zip(found, by_torch, expected, strict=True):
        assert distance(mine, right) < max(1.1 * distance(theirs, right), 0.01)


@pytest.mark.parametrize("cuts", [[1, 2, 150], [16, 32, 150], [33, 97, 150], [149, 150]])
def test_a_row_has_the_same_bits_wherever_its_prompt_is_cut(models, cuts):
    model, _ = models
    tokens, cache = text(3, 150), fresh(model)
    expected = model.step([Segment(tokens, 0, fresh(model))])
    rows, start = [], 0
    for end in cuts:
        rows.append(model.step([Segment(tokens[start:end], start, cache)]))
        start = end
    assert torch.equal(torch.cat(rows), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_prompt_has_the_same_bits_beside_others_in_parts_and_on_any_number_of_threads(models, threads):
    model, _ = models
    lengths = [1, 40, 13, 100]
    alone = [model.step([Segment(text(i, n), 0, fresh(model))]) for i, n in enumerate(lengths)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        segments = [Segment(text(i, n), 0, fresh(model)) for i, n in enumerate(lengths)]
        together = model.step(segments)
        again = [Segment(text(i, n), 0, fresh(model)) for i, n in enumerate(lengths)]
        in_parts = finished(model.reading(again, pauses=True))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(in_parts, together)


def test_between_two_parts_of_a_prompt_another_sequence_may_be_written(models):
    model, _ = models
    expected = model.step([Segment(text(4, 60), 0, fresh(model))])
    other, undisturbed = fresh(model), fresh(model)
    for cache in (other, undisturbed):
        model.step([Segment(text(5, 9), 0, cache)])
    reading = model.reading([Segment(text(4, 60), 0, fresh(model))], pauses=True)
    parts = []
    for position in range(9, 12):
        next(reading)
        parts.append(model.step([Segment([position], position, other, decode=True)]))
    assert torch.equal(finished(reading), expected)
    assert torch.equal(
        torch.cat(parts),
        torch.cat([model.step([Segment([p], p, undisturbed, decode=True)]) for p in range(9, 12)]),
    )


def test_a_number_that_is_not_finite_stays_in_its_own_sequence_and_is_not_lost(models):
    model, _ = models
    hidden = model.embed(torch.tensor(text(6, 10)))
    hidden[2, 7] = torch.nan
    caches = fresh(model), fresh(model)
    assert model.reader is not None
    plan = model.reader.plan([(0, 5, caches[0]), (0, 5, caches[1])])
    model.reader.halves(0, 2 * len(model.layers), hidden, *plan)
    finite = hidden.isfinite().all(1)
    assert not finite[2:5].any()
    assert finite[5:].all()
