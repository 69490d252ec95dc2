"""What makes the trained variants comparable, and that their real sizes keep what tiny ones promise."""

from dataclasses import replace

import pytest
import torch

from model.blocks import build_block
from model.blocks.base import BlockSpan, ExpertUsage, count_parameters
from model.keys import AnchorKeys
from model.training.variants import LAYERS, VARIANTS

TOTALS = [name for name in VARIANTS if name != "ffn-active"]


@pytest.fixture(scope="module")
def blocks():
    torch.manual_seed(0)
    return {
        name: build_block(config).requires_grad_(requires_grad=False) for name, config in VARIANTS.items()
    }


def test_all_but_the_smaller_control_have_the_same_number_of_parameters(blocks):
    counts = [count_parameters(blocks[name]) for name in TOTALS]
    assert max(counts) <= 1.02 * min(counts), dict(zip(TOTALS, counts, strict=True))
    assert {config.layers for config in VARIANTS.values()} == {LAYERS}


def test_the_smaller_control_is_as_active_as_a_routed_variant(blocks):
    control = blocks["ffn-active"]
    assert control.active_parameters() == count_parameters(control)
    active = max(blocks[name].active_parameters() for name in ("some", "moe"))
    assert active <= control.active_parameters() <= 1.1 * active
    assert active < 0.1 * min(count_parameters(blocks[name]) for name in ("some", "moe"))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(blocks, name):
    block = blocks[name]
    for parameter in block.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    keys = AnchorKeys({17: block.anchors.numpy()}) if block.config.kind == "some" else None
    rows = torch.randn(33, 576)

    def serve(lengths):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        spans = [
            BlockSpan(end - n, end, 0, keys, None, decode=False, state={})
            for n, end in zip(lengths, ends, strict=True)
        ]
        with torch.inference_mode():
            return block.serve(rows[: ends[-1]], 17, spans, ExpertUsage.of(block.config))

    each = serve([1] * 33)
    for count in (1, 2, 3, 5, 13, 32):
        assert torch.equal(serve([1] * count), each[:count])
    together = serve([9, 5, 19])
    assert torch.equal(serve([9]), together[:9])
    assert torch.equal(serve([9, 5]), together[:14])


def test_masters_let_tokens_by_without_touching_the_bits_of_others():
    torch.manual_seed(0)
    config = replace(VARIANTS["mom"], attention="flow", bypass_threshold=0.9)
    block = build_block(config).requires_grad_(requires_grad=False)
    for parameter in block.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    rows = torch.randn(29, 576)

    def serve(count):
        spans = [BlockSpan(i, i + 1, 0, None, None, decode=True, state={}) for i in range(count)]
        with torch.inference_mode():
            return block.serve(rows[:count], 17, spans, ExpertUsage.of(config))

    whole = serve(29)
    assert 0 < (whole == 0).all(1).sum() < 29
    for count in (1, 2, 3, 7, 28):
        assert torch.equal(serve(count), whole[:count])
