"""What every variant must hold: causality, chunking, batching, and that zero blocks are no blocks."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from model.blocks import build_block
from model.blocks.base import RoutingTrace

PROMPT = [(7 * i * i + 3 * i) % 97 for i in range(70)]


def test_changing_a_token_leaves_earlier_logits_unchanged(every_tiny):
    before = every_tiny.logits(PROMPT)
    changed = [*PROMPT[:40], *((t + 5) % 97 for t in PROMPT[40:])]
    after = every_tiny.logits(changed)
    assert torch.equal(before[:40], after[:40])
    assert not torch.equal(before[40], after[40])


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_a_prompt_read_in_chunks_gives_the_logits_of_one_pass(every_tiny, chunk):
    assert_close(every_tiny.logits(PROMPT, chunk), every_tiny.logits(PROMPT), atol=1e-4, rtol=0)


def test_decoding_token_by_token_equals_reading_the_whole_text(every_tiny):
    segment = every_tiny.segment(PROMPT)
    rows = [every_tiny.model.step([replace(segment, token_ids=PROMPT[:20])])]
    rows += [
        every_tiny.model.step([replace(segment, token_ids=[PROMPT[i]], start=i, decode=True)])
        for i in range(20, len(PROMPT))
    ]
    assert_close(every_tiny.model.logits(torch.cat(rows)), every_tiny.logits(PROMPT), atol=1e-4, rtol=0)


def text(start, length):
    return [(start + 3 * i) % 97 for i in range(length)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prompt_has_the_same_bits_alone_and_beside_others(make_tiny, variant, dtype):
    tiny = make_tiny(dtype, variant)
    prompts = [text(1, 9), text(2, 30), text(5, 17), text(8, 1)]
    alone = [tiny.model.step([tiny.segment(p)]) for p in prompts]
    together = tiny.model.step([tiny.segment(prompts[0], plain=True), *(tiny.segment(p) for p in prompts)])
    for rows, expected in zip(together.split([9, 9, 30, 17, 1])[1:], alone, strict=True):
        assert torch.equal(rows, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_token_has_the_same_bits_alone_and_beside_others(make_tiny, variant, dtype):
    tiny = make_tiny(dtype, variant)
    prompts = [text(1, 9), text(2, 30), text(5, 17), text(8, 1), text(3, 4)]
    steps = 3

    def written(segments, step):
        return [
            replace(s, token_ids=[20 + i + step], start=len(prompts[i]) + step, decode=True)
            for i, s in segments.items()
        ]

    def read():
        segments = {i: tiny.segment(p) for i, p in enumerate(prompts)}
        for segment in segments.values():
            tiny.model.step([segment])
        return segments

    apart = read()
    alone = {
        (i, step): tiny.model.step(written({i: segment}, step))
        for step in range(steps)
        for i, segment in apart.items()
    }
    batched = read()
    for step in range(steps):
        members = dict(list(batched.items())[step:] + list(batched.items())[:step])
        newcomer = tiny.segment(PROMPT[: 5 + step])
        together = tiny.model.step([*written(members, step), newcomer])
        for i, row in zip(members, together.split(1), strict=False):
            assert torch.equal(row, alone[i, step]), (i, step)
        assert torch.equal(together[len(members) :], tiny.model.step([tiny.segment(PROMPT[: 5 + step])]))


def test_fresh_blocks_leave_the_base_bit_for_bit(every_tiny, block_config):
    base = every_tiny.logits(PROMPT, plain=True)
    assert not torch.equal(every_tiny.logits(PROMPT), base)
    fresh = {layer: build_block(block_config).requires_grad_(False) for layer in block_config.layers}
    untrained = replace(every_tiny, variant=replace(every_tiny.variant, blocks=fresh))
    assert torch.equal(untrained.logits(PROMPT), base)
    assert torch.equal(untrained.logits(PROMPT, 1), every_tiny.logits(PROMPT, 1, plain=True))


def take_every_token(tiny):
    """Masters let some tokens pass by and do not count them."""
    for block in tiny.blocks.values():
        if block.config.kind == "mom":
            block.config = replace(block.config, bypass_threshold=0.0)


def test_only_a_variants_own_rows_pass_through_its_blocks(every_tiny):
    take_every_token(every_tiny)
    every_tiny.model.step([every_tiny.segment(PROMPT, plain=True), every_tiny.segment(PROMPT[:11])])
    per_layer = every_tiny.variant.usage.counts.sum(axis=(0, 2))
    per_token = every_tiny.variant.usage.num_experts_per_tok
    assert per_layer.tolist() == [11 * per_token, 11 * per_token]  # padding is never counted


def test_usage_tells_prefill_from_decode(every_tiny):
    take_every_token(every_tiny)
    running = every_tiny.segment(PROMPT[:10])
    every_tiny.model.step([running])
    written = replace(running, token_ids=[3], start=10, decode=True)
    every_tiny.model.step([written, every_tiny.segment(PROMPT[:7])])
    per_token = every_tiny.variant.usage.num_experts_per_tok
    by_phase = every_tiny.variant.usage.counts.sum(axis=2) // per_token
    assert by_phase.tolist() == [[17, 17], [1, 1]]


def test_usage_of_a_batch_is_the_sum_of_its_sequences(make_tiny, variant):
    together, apart = make_tiny(torch.float32, variant), make_tiny(torch.float32, variant)
    prompts = [PROMPT[:9], PROMPT[20:33], PROMPT[40:41]]
    together.model.step([together.segment(p) for p in prompts])
    for prompt in prompts:
        apart.model.step([apart.segment(prompt)])
    assert (together.variant.usage.counts == apart.variant.usage.counts).all()


def test_a_caches_second_text_finds_nothing_of_the_first(every_tiny):
    segment = every_tiny.segment(PROMPT[:30])
    expected = every_tiny.model.step([segment])
    every_tiny.model.step([replace(segment, token_ids=[5], start=30, decode=True)])
    assert torch.equal(every_tiny.model.step([segment]), expected)


def test_a_trace_holds_the_routing_of_just_its_own_rows(tiny):
    trace = RoutingTrace(frozenset({2}))
    traced = replace(tiny.segment(PROMPT[:12]), trace=trace)
    tiny.model.step([tiny.segment(PROMPT[:5]), traced])
    assert list(trace.by_layer) == [2]
    layer = trace.by_layer[2]
    assert layer.expert_ids.shape == (12, 2)
    assert layer.normed.shape == (12, 32)
    assert_close(layer.gates.sum(1), torch.ones(12), atol=1e-6, rtol=0)


class MovedKeys:
    """A later version of somebody's keys."""

    version = 7

    def __init__(self, keys):
        self._keys = keys

    def keys_of(self, layer):
        return self._keys.keys_of(layer)[::-1].copy()

    def search(self, layer, queries, k):
        scores, ids = self._keys.search(layer, queries, k)
        return scores[:, ::-1].copy(), (7 - ids)[:, ::-1].copy()


def test_sequences_pinned_to_different_versions_see_their_own_keys_in_one_batch(tiny):
    moved = MovedKeys(tiny.keys)
    alone = [
        tiny.model.step([tiny.segment(PROMPT[:9])]),
        tiny.model.step([replace(tiny.segment(PROMPT[:9]), keys=moved)]),
    ]
    assert not torch.equal(*alone)
    together = tiny.model.step(
        [tiny.segment(PROMPT[:9]), replace(tiny.segment(PROMPT[:9]), keys=moved), tiny.segment(PROMPT[:9])]
    )
    for rows, expected in zip(together.split(9), [alone[0], alone[1], alone[0]], strict=True):
        assert torch.equal(rows, expected)
