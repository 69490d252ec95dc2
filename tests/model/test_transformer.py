"""What every variant must hold: causality, chunking, batching, and that zero blocks are no blocks."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from model.blocks.base import RoutingTrace

PROMPT = [(7 * i * i + 3 * i) % 97 for i in range(70)]


def test_changing_a_token_leaves_earlier_logits_unchanged(tiny):
    before = tiny.logits(PROMPT)
    changed = [*PROMPT[:40], *((t + 5) % 97 for t in PROMPT[40:])]
    after = tiny.logits(changed)
    assert torch.equal(before[:40], after[:40])
    assert not torch.equal(before[40], after[40])


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_a_prompt_read_in_chunks_gives_the_logits_of_one_pass(tiny, chunk):
    assert_close(tiny.logits(PROMPT, chunk), tiny.logits(PROMPT), atol=2e-5, rtol=0)


def test_decoding_token_by_token_equals_reading_the_whole_text(tiny):
    segment = tiny.segment(PROMPT)
    rows = [tiny.model.step([replace(segment, token_ids=PROMPT[:20])])]
    rows += [
        tiny.model.step([replace(segment, token_ids=[PROMPT[i]], start=i, decode=True)])
        for i in range(20, len(PROMPT))
    ]
    assert_close(tiny.model.logits(torch.cat(rows)), tiny.logits(PROMPT), atol=2e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sequence_has_the_same_bits_alone_and_beside_others(make_tiny, dtype):
    tiny = make_tiny(dtype)
    prompts = [
        [(start + 3 * i) % 97 for i in range(length)] for start, length in ((1, 9), (2, 30), (5, 17), (8, 1))
    ]
    alone = [tiny.model.step([tiny.segment(p)]) for p in prompts]
    together = tiny.model.step([tiny.segment(prompts[0], plain=True), *(tiny.segment(p) for p in prompts)])
    at = len(prompts[0])
    for rows in alone:
        assert torch.equal(together[at : at + len(rows)], rows)
        at += len(rows)


def test_blocks_that_contribute_zero_leave_the_base_bit_for_bit(tiny):
    base = tiny.logits(PROMPT, plain=True)
    assert not torch.equal(tiny.logits(PROMPT), base)
    for block in tiny.blocks.values():
        block.up_proj.data.zero_()
    assert torch.equal(tiny.logits(PROMPT), base)


def test_only_a_variants_own_rows_pass_through_its_blocks(tiny):
    tiny.model.step([tiny.segment(PROMPT, plain=True), tiny.segment(PROMPT[:11])])
    per_layer = tiny.variant.usage.counts.sum(axis=(0, 2))
    assert per_layer.tolist() == [11 * 2, 11 * 2]  # tokens times experts per token, padding never counted


def test_usage_tells_prefill_from_decode(tiny):
    segment = tiny.segment(PROMPT[:10])
    tiny.model.step([segment])
    tiny.model.step([replace(segment, token_ids=[3], start=10, decode=True)])
    assert tiny.variant.usage.counts.sum(axis=2).tolist() == [[20, 20], [2, 2]]


def test_a_trace_holds_the_routing_of_just_its_own_rows(tiny):
    trace = RoutingTrace(frozenset({2}))
    traced = replace(tiny.segment(PROMPT[:12]), trace=trace)
    tiny.model.step([tiny.segment(PROMPT[:5]), traced])
    assert list(trace.by_layer) == [2]
    layer = trace.by_layer[2]
    assert layer.expert_ids.shape == (12, 2)
    assert layer.deviations.shape == (12, 2, 32)
    mixed = (layer.gates.unsqueeze(-1) * layer.deviations).sum(1)
    assert_close(mixed, torch.zeros_like(mixed), atol=1e-5, rtol=0)  # deviations are from their own mean


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
