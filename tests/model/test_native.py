"""Compiled code for rows that are being written: what it computes, and that nobody beside a row leaves a mark on it."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from model import transformer
from model.blocks import build_block
from model.blocks.base import ExpertUsage
from model.blocks.experts import SiluExperts, SwigluExperts
from model.blocks.routing import top_k_of_softmax
from model.checkpoints.assemble import assemble
from model.checkpoints.names import PACKED
from model.keys import AnchorKeys
from model.kv_cache import CacheBudget
from model.native.attention import attend, scratch_size
from model.native.decoder import supported
from model.native.experts import choose
from model.native.likeliest import likeliest
from model.native.packed import bits_of, pack, unpack
from model.native.product import product_4bit, product_8bit
from model.native.prompt_rows import EXACT_POSITIONS
from model.native.rows import norm, quantise, silu_product
from model.native.tiles import GROUP
from model.transformer import Segment, Transformer, Variant

needs_vnni = pytest.mark.skipif(not supported(), reason="this processor has no AVX-512 VNNI")
PRODUCTS = {4: product_4bit, 8: product_8bit}
SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantised_matrix(outputs, inputs, bits, seed=0):
    """Quants, scales and the matrix (N, M) that they stand for."""
    generator = torch.Generator().manual_seed(seed)
    quants = torch.randint(0, 1 << bits, (outputs, inputs), generator=generator, dtype=torch.uint8)
    scale = torch.rand(outputs, inputs // GROUP, generator=generator).half() * inputs**-0.5 / (1 << bits)
    scales = torch.stack((scale, -scale * (1 << (bits - 1))), -1)
    groups = quants.float().unflatten(1, (-1, GROUP))
    return quants, scales, (groups * scales[..., :1].float() + scales[..., 1:].float()).flatten(1)


def quantised_rows(rows):
    count, inputs = rows.shape
    quants = np.empty((count, inputs // GROUP, 2, GROUP), np.int8)
    sums = np.empty((count, inputs // GROUP, 2), np.float32)
    for row, own, total in zip(rows.numpy(), quants, sums, strict=True):
        quantise(row, own, total)
    return quants, sums


def product(packed, rows):
    out = torch.empty(len(rows), packed.shape[0] * 16)
    PRODUCTS[bits_of(packed)](packed.numpy(), 0, packed.shape[0], *quantised_rows(rows), out.numpy())
    return out


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_loses_nothing(bits):
    quants, scales, _ = quantised_matrix(48, 96, bits)
    found_quants, found_scales = unpack(pack(quants, scales, bits))
    assert torch.equal(found_quants, quants)
    assert torch.equal(found_scales, scales)


@needs_vnni
@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_is_that_of_the_matrix_within_the_rounding_of_its_rows(bits):
    quants, scales, matrix = quantised_matrix(48, 96, bits)
    rows = random(5, 96)
    expected = rows @ matrix.T
    found = product(pack(quants, scales, bits).clone(), rows)
    assert (found - expected).norm() / expected.norm() < 1e-4


@needs_vnni
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", range(1, 17))
def test_a_row_has_the_same_bits_for_any_number_of_rows(bits, count):
    packed = pack(*quantised_matrix(32, 64, bits)[:2], bits).clone()
    rows = random(16, 64)
    whole = product(packed, rows)
    assert torch.equal(product(packed, rows[:count]), whole[:count])
    assert torch.equal(product(packed, rows[16 - count :]), whole[16 - count :])


def test_quantised_values_are_within_half_a_step():
    rows = random(1, 64)
    quants, sums = quantised_rows(rows)
    values = (quants[..., 0, :] * 256.0 + quants[..., 1, :]) * sums[..., :1]
    steps = np.abs(rows.numpy().reshape(1, 2, GROUP) - values) / sums[..., :1]
    assert steps.max() <= 0.501
    assert_close(torch.from_numpy(values.sum(-1)), torch.from_numpy(sums[..., 1]).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("strange", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_not_lost(strange):
    rows = random(1, 64)
    rows[0, 5] = strange
    _, sums = quantised_rows(rows)
    assert not np.isfinite(sums[0, 0, 0])
    assert np.isfinite(sums[0, 1, 0])


def test_norm_and_silu_are_those_of_torch():
    values, weight, out = random(64), random(64, seed=1), torch.empty(64)
    norm(values.numpy(), weight.numpy(), np.float32(1e-5), out.numpy())
    assert_close(out, torch.nn.functional.rms_norm(values, (64,), weight, 1e-5), rtol=1e-5, atol=1e-6)
    gate = torch.linspace(-120, 120, 64)
    silu_product(gate.numpy(), weight.numpy(), out.numpy())
    assert_close(out, torch.nn.functional.silu(gate) * weight, rtol=1e-5, atol=1e-6)


@needs_vnni
@pytest.mark.parametrize("count", [1, 16, 37])
@pytest.mark.parametrize("heads", range(1, 6))
def test_attention_is_that_of_torch(count, heads):
    query = random(heads, 128)
    key, value = random(40, 128, seed=1).bfloat16(), random(40, 128, seed=2).bfloat16()
    key[count:], value[count:] = float("nan"), float("nan")  # what nobody has written yet
    out = torch.empty(heads, 128)
    bits = (part.view(torch.uint16).numpy() for part in (key, value))
    attend(query.numpy(), *bits, count, np.empty(scratch_size(count, 128), np.float32), out.numpy())
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key[:count].float(), value[:count].float()
    )
    assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [SiluExperts, SwigluExperts])
def test_experts_of_written_rows_give_what_dispatch_gives(form):
    experts = form(6, 32, 24).requires_grad_(requires_grad=False)
    for index, matrix in enumerate(experts.parameters()):
        matrix.copy_(random(*matrix.shape, seed=index))
    rows = random(7, 32)
    expert_ids, gates = torch.arange(14).view(7, 2) % 6, random(7, 2).softmax(-1)
    with torch.inference_mode():
        mixed = experts.mix(rows, expert_ids, gates, written=True)
        assert_close(mixed, experts.mix(rows, expert_ids, gates), rtol=1e-4, atol=1e-4)
        for row in range(7):
            alone = slice(row, row + 1)
            assert torch.equal(
                experts.mix(rows[alone], expert_ids[alone], gates[alone], written=True), mixed[alone]
            )


@pytest.mark.parametrize("renormalize", [True, False])
def test_chosen_experts_are_those_of_torch(renormalize):
    logits, gates, expert_ids = random(9, 16), torch.empty(9, 3), torch.empty(9, 3, dtype=torch.int64)
    expected_gates, expected_ids = top_k_of_softmax(logits, 3, renormalize=renormalize)
    choose(logits.clone().numpy(), renormalize, gates.numpy(), expert_ids.numpy())
    assert torch.equal(expert_ids, expected_ids)
    assert_close(gates, expected_gates, rtol=1e-5, atol=1e-6)


def test_the_likeliest_token_is_torchs_and_none_where_logits_are_not_finite():
    logits = random(9, 1000)
    logits[3, 700:] = logits[3].max()  # of equals the first
    logits[4] = -1.0
    logits[5, 999], logits[6, 0], logits[7, 500] = float("nan"), float("inf"), float("-inf")
    tokens = np.empty(9, np.int64)
    likeliest(logits.numpy(), tokens)
    expected = logits.argmax(1)
    expected[5:8] = -1
    assert tokens.tolist() == expected.tolist()


@pytest.fixture(scope="module")
def quantised(make_tiny, random_weights):
    """A tiny model whose matrices are 4-bit, and the same weights in float32."""
    config = replace(make_tiny(torch.float32).model.config, head_dim=64, **SIZES, vocab_size=96)
    weights = random_weights(config, torch.float32)
    for seed, (name, weight) in enumerate(list(weights.items())):
        if weight.dim() == 2:
            bits = 8 if name == "embedding" else 4
            quants, scales, matrix = quantised_matrix(*weight.shape, bits, seed)
            weights |= {name: matrix * 16, f"{name}{PACKED}": pack(quants, scales * 16, bits)}
    exact = assemble(config, {name: w for name, w in weights.items() if not name.endswith(PACKED)})
    halved = {name: w if name.endswith(PACKED) else w.bfloat16() for name, w in weights.items()}
    return assemble(config, halved), exact


def written(model: Transformer, tokens, start, caches):
    segments = [
        Segment([token], start, cache, decode=True) for token, cache in zip(tokens, caches, strict=True)
    ]
    return model.step(segments)


def caches_of(model: Transformer, count):
    budget = CacheBudget(model.config, 4096, model.dtype, model.device)
    return [budget.reserve(64) for _ in range(count)]


@needs_vnni
def test_embeddings_are_looked_up_in_the_eight_bits_of_the_file(quantised):
    model, exact = quantised
    token_ids = torch.tensor([[0, 15, 16, 95], [7, 7, 40, 31]])
    assert_close(model.embed(token_ids), exact.embed(token_ids), rtol=1e-6, atol=1e-6)


@needs_vnni
def test_a_text_written_token_by_token_has_the_logits_of_float32(quantised):
    model, exact = quantised
    tokens = [(7 * i) % 96 for i in range(20)]
    (cache,) = caches_of(model, 1)
    rows = torch.cat([written(model, [token], i, [cache]) for i, token in enumerate(tokens)])
    expected = exact.logits(exact.step([Segment(tokens, 0, caches_of(exact, 1)[0])]))
    found = model.logits(rows, written=True)
    assert (found - expected).norm() / expected.norm() < 0.02  # keys and values are bfloat16


@needs_vnni
def test_a_prompts_first_positions_have_the_bits_of_written_rows_however_it_is_cut(quantised):
    model, _ = quantised
    tokens = [(7 * i) % 96 for i in range(EXACT_POSITIONS + 20)]
    caches = CacheBudget(model.config, 4096, model.dtype, model.device)
    one, whole, cut = (caches.reserve(len(tokens)) for _ in range(3))
    expected = torch.cat([written(model, [tokens[i]], i, [one]) for i in range(EXACT_POSITIONS)])
    hidden = model.step([Segment(tokens, 0, whole)])
    assert torch.equal(hidden[:EXACT_POSITIONS], expected)
    following = written(model, [tokens[EXACT_POSITIONS]], EXACT_POSITIONS, [one])
    assert not torch.equal(hidden[EXACT_POSITIONS : EXACT_POSITIONS + 1], following)
    ends = [0, 10, EXACT_POSITIONS - 1, EXACT_POSITIONS + 5, len(tokens)]
    parts = [model.step([Segment(tokens[a:b], a, cut)]) for a, b in itertools.pairwise(ends)]
    assert torch.equal(torch.cat(parts), hidden)


@needs_vnni
@pytest.mark.parametrize("threads", [1, 2])
def test_rows_of_one_sequence_have_the_same_bits_at_once_and_one_after_the_other(quantised, threads):
    model, _ = quantised
    tokens, before = torch.arange(20), torch.get_num_threads()
    one, several = caches_of(model, 2)
    expected = torch.cat([written(model, [int(token)], i, [one]) for i, token in enumerate(tokens)])
    torch.set_num_threads(threads)
    try:
        hidden = model.embed(tokens)
        model.decoder.layers(0, len(model.layers), hidden, range(20), [several] * 20)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(hidden, expected)


@needs_vnni
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_written_row_has_the_same_bits_alone_beside_others_and_on_any_number_of_threads(quantised, threads):
    model, _ = quantised
    count = 11
    alone = [
        torch.cat([written(model, [token + step], step, [cache]) for step in range(4)])
        for token, cache in enumerate(caches_of(model, count))
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        caches = caches_of(model, count)
        together = [written(model, range(step, count + step), step, caches) for step in range(4)]
        logits = model.logits(together[-1], written=True)
    finally:
        torch.set_num_threads(before)
    for row in range(count):
        assert torch.equal(torch.stack([rows[row] for rows in together]), alone[row])
        assert torch.equal(logits[row : row + 1], model.logits(together[-1][row : row + 1], written=True))


KINDS = [None, "some", "some", "moe", "mom", "some", "some", "moe", None]
STEPS = 3


@pytest.fixture
def mixed(tiny_variants):
    """Variants whose weights bfloat16 can hold, and for each of KINDS its variant and version of the keys."""
    torch.manual_seed(7)
    variants = {}
    for kind in ("some", "moe", "mom"):
        config = replace(tiny_variants[kind], hidden_size=SIZES["hidden_size"])
        blocks = {layer: build_block(config).requires_grad_(requires_grad=False) for layer in config.layers}
        for parameter in itertools.chain.from_iterable(block.parameters() for block in blocks.values()):
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.3)
            parameter.data = parameter.data.bfloat16().float()
        variants[kind] = Variant(blocks, ExpertUsage.of(config))
    anchors = {layer: block.anchors.numpy() for layer, block in variants["some"].blocks.items()}
    versions = [
        AnchorKeys(anchors),
        AnchorKeys({layer: keys[::-1].copy() for layer, keys in anchors.items()}),
    ]
    keys = itertools.cycle(versions)
    return [(variants.get(kind), next(keys) if kind == "some" else None) for kind in KINDS], variants


def mixed_steps(model, members):
    """Hidden states (STEPS, n, H) of some rows that are written beside each other, and each one's expert ids."""
    caches, states, routed = caches_of(model, len(members)), [], [[] for _ in members]
    for step in range(STEPS):
        segments = [
            Segment([40 + row + step], step, cache, variant, keys, decode=True, routed=ids)
            for (row, (variant, keys)), cache, ids in zip(members, caches, routed, strict=True)
        ]
        states.append(model.step(segments))
    return torch.stack(states), [np.concatenate(ids).tolist() if ids else [] for ids in routed]


@needs_vnni
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_blocks_within_the_layers_call_give_what_they_give_behind_it(quantised, mixed, monkeypatch, threads):
    model, (rows, variants) = quantised[0], mixed
    members, before = list(enumerate(rows)), torch.get_num_threads()
    alone = [mixed_steps(model, [member]) for member in members]
    counts = {kind: variant.usage.counts.copy() for kind, variant in variants.items()}
    torch.set_num_threads(threads)
    try:
        states, routed = mixed_steps(model, members)
    finally:
        torch.set_num_threads(before)
    for row, (own, own_ids) in enumerate(alone):
        assert torch.equal(own[:, 0], states[:, row]), KINDS[row]
        assert own_ids == [routed[row]]
    assert len({tuple(map(tuple, ids)) for ids in routed[1:3]}) == 2, "each row sees its own version"
    for kind, variant in variants.items():
        assert (variant.usage.counts == 2 * counts[kind]).all()
    monkeypatch.setattr(transformer, "about_blocks", lambda variant, keys: None)
    expected, expected_ids = mixed_steps(model, members)
    assert_close(states, expected, rtol=1e-4, atol=1e-4)
    assert routed == expected_ids


@needs_vnni
def test_blocks_that_are_compiled_need_one_call_of_the_layers(quantised, mixed, monkeypatch):
    model, members = quantised[0], list(enumerate(mixed[0]))
    calls, layers = [], model.decoder.layers
    monkeypatch.setattr(model.decoder, "layers", lambda *given: calls.append(given[:2]) or layers(*given))
    mixed_steps(model, [member for member, kind in zip(members, KINDS, strict=True) if kind != "mom"])
    assert calls == [(0, 3)] * STEPS
    calls.clear()
    mixed_steps(model, members)
    assert calls == [(0, 2), (2, 3), (3, 3)] * STEPS
