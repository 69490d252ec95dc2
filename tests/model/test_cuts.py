"""Where a prompt is cut leaves no mark on the bits of its rows, on the real model as it is served."""

import random

import pytest
import torch

from model.blocks.base import ExpertUsage
from model.checkpoints.blocks import load_blocks, shipped_folder
from model.keys import AnchorKeys
from model.kv_cache import CacheBudget
from model.transformer import Segment, Variant

LENGTH = 259
WHOLE = [256, LENGTH]
CUTS = [[128, 192, LENGTH], [LENGTH], [100, 258, LENGTH]]
PROMPT = [random.Random(7).randrange(100, 40_000) for _ in range(LENGTH)]


@pytest.fixture(scope="module")
def real(load_real):
    return load_real(torch.bfloat16).transformer


@pytest.fixture(scope="module", params=["dense", "some", "moe", "fm-moe", "mom"])
def served(request, real):
    """A variant as it is served, with its keys."""
    if request.param == "dense":
        return request.param, None, None
    folder = load_blocks(shipped_folder(request.param), real.config.hidden_size)
    anchors = {
        layer: block.get_parameter("anchors").detach().numpy()
        for layer, block in folder.blocks.items()
        if request.param == "some"
    }
    return request.param, Variant(folder.blocks, ExpertUsage.of(folder.config)), AnchorKeys(anchors)


def fresh(real):
    """Memory in which somebody else left what is no number."""
    cache = CacheBudget(real.config, 4096, real.dtype, real.device).reserve(LENGTH)
    cache.keys.fill_(torch.nan)
    cache.values.fill_(torch.nan)
    return cache


def read(real, served, cuts, cache, start=0):
    _, variant, keys = served
    rows = []
    for end in cuts:
        rows.append(real.step([Segment(PROMPT[start:end], start, cache, variant, keys)]))
        start = end
    return torch.cat(rows)


def test_a_row_has_the_same_bits_wherever_its_prompt_is_cut(real, served):
    expected = read(real, served, WHOLE, fresh(real))
    # Masters sum along a chunk: their prompts are cut at fixed positions.
    for cuts in CUTS if served[0] != "mom" else [WHOLE]:
        assert torch.equal(read(real, served, cuts, fresh(real)), expected), cuts


def test_rows_behind_a_beginning_that_was_copied_have_the_bits_of_those_that_read_it(real, served):
    first = fresh(real)
    expected = read(real, served, WHOLE, first)
    known = 256 if served[0] == "mom" else 192
    other, copy = fresh(real), fresh(real)
    read(real, served, [known], other)
    copy.keys[:, :, :known] = other.keys[:, :, :known]
    copy.values[:, :, :known] = other.values[:, :, :known]
    copy.block_states.update(other.block_states)
    assert torch.equal(read(real, served, [LENGTH], copy, known), expected[known:])
    written = Segment([5], LENGTH, copy, *served[1:], decode=True)
    assert torch.equal(
        real.step([written]), real.step([Segment([5], LENGTH, first, *served[1:], decode=True)])
    )
