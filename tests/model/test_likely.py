"""The head's derivative by way of likely tokens: against the whole softmax, row by row."""

import math

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from model.head import loss_and_gradient
from model.kv_cache import CacheBudget
from model.native.likely import LEAST, TILE, LikelyHead, expect_rows
from model.transformer import Segment

HIDDEN, VOCABULARY = 32, 2 * TILE + 100
EVERY_TOKEN = np.float32(-math.inf)


def bits(tensor):
    return tensor.view(torch.int16).numpy().view(np.uint16)


def expected(logits, head, least):
    out = torch.empty(len(logits), head.shape[1])
    expect_rows(bits(logits), bits(head), head.float().mean(0).numpy(), least, out.numpy())
    return out


@pytest.fixture
def head():
    torch.manual_seed(0)
    return torch.randn(VOCABULARY, HIDDEN).bfloat16()


@pytest.fixture
def logits():
    torch.manual_seed(1)
    return (4 * torch.randn(7, VOCABULARY)).bfloat16()


def test_with_every_token_likely_it_is_the_mean_under_the_softmax(head, logits):
    found = expected(logits, head, EVERY_TOKEN)
    assert_close(found, logits.float().softmax(-1) @ head.float(), atol=1e-5, rtol=1e-4)


def test_rare_tokens_count_as_their_heads_mean(head, logits):
    shares = logits.float().softmax(-1)
    likely = shares.where(shares > math.exp(-6), 0)
    rest = 1 - likely.sum(-1, keepdim=True)
    assert 0.05 < rest.mean() < 0.95
    found = expected(logits, head, np.float32(-6))
    assert_close(found, likely @ head.float() + rest * head.float().mean(0), atol=1e-5, rtol=1e-4)


def test_a_rows_bits_do_not_depend_on_its_neighbours(head, logits):
    together = expected(logits, head, LEAST)
    for row in range(len(logits)):
        assert torch.equal(expected(logits[row : row + 1], head, LEAST)[0], together[row])


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_stays_that_and_harms_no_other(head, logits, strange):
    sound = expected(logits, head, LEAST)
    logits[3, 1000] = strange
    found = expected(logits, head, LEAST)
    assert not found[3].isfinite().any()
    others = [0, 1, 2, 4, 5, 6]
    assert torch.equal(found[others], sound[others])


@pytest.mark.parametrize("threads", [1, 2])
def test_on_real_text_it_errs_by_a_few_percent(load_real, threads):
    base = load_real(torch.bfloat16)
    model, before = base.transformer, torch.get_num_threads()
    token_ids = base.tokenizer.encode(__doc__ + " " + (loss_and_gradient.__doc__ or ""))
    cache = CacheBudget(model.config, 1024, model.dtype, model.device).reserve(len(token_ids))
    hidden, targets = model.step([Segment(token_ids, 0, cache)])[:-1], torch.tensor(token_ids[1:])
    head = (model.final_norm, model.config.rms_norm_eps)
    _, exact = loss_and_gradient(hidden, *head, model.head.float(), targets)
    _, rounded = loss_and_gradient(hidden, *head, model.head, targets)
    torch.set_num_threads(threads)
    try:
        found = LikelyHead(*head, model.head).gradient(hidden, targets)
    finally:
        torch.set_num_threads(before)

    def error(gradient):
        return ((gradient - exact).norm() / exact.norm()).item()

    assert error(rounded) < error(found) < 0.03  # rounded to bfloat16 alone: 0.012
