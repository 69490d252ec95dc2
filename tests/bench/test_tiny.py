"""The arithmetic of bench/tiny.py: what it calls credit, what it calls a session, what it calls a gain."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))  # its files are scripts and import each other

from tiny_model import TinyConfig, TinyModel
from tiny_report import change, interval, summarize, table
from tiny_rules import RULES, Rule, credit, literal
from tiny_stream import Reader, effective_rank, stream

CONFIG = TinyConfig(
    layers=2, hidden_size=32, heads=2, num_experts=8, num_experts_per_tok=2, expert_size=8, key_size=16,
    context=32, vocabulary=48,
)  # fmt: skip
SESSION = 2048


@pytest.fixture
def model() -> TinyModel:
    torch.manual_seed(0)
    made = TinyModel(CONFIG)
    for parameter in made.parameters():  # experts begin at zero, which would earn no credit
        parameter.data += 0.2 * torch.randn_like(parameter)
    return made.requires_grad_(requires_grad=False)


@pytest.fixture
def sessions() -> torch.Tensor:
    return torch.randint(CONFIG.vocabulary, (3, SESSION + 1), generator=torch.Generator().manual_seed(1))


def keys_after(model: TinyModel, rule: Rule, session: torch.Tensor) -> list[np.ndarray]:
    reader = Reader(model, [rule], 0)
    reader.read_session(session)
    return reader.learners[0].keys


def test_gradient_credit_is_what_a_nudged_score_does_to_the_loss(model):
    tokens = torch.randint(CONFIG.vocabulary, (1, CONFIG.context + 1))
    at, slot, step = 5, 1, 1e-2

    def loss(nudges: list[torch.Tensor]) -> torch.Tensor:
        hidden, _ = model(tokens[:, :-1], model.anchors(), nudges)
        return torch.nn.functional.cross_entropy(model.logits(hidden)[0], tokens[0, 1:], reduction="sum")

    shape = (1, CONFIG.context, CONFIG.num_experts_per_tok)
    nudges = [torch.zeros(shape, requires_grad=True) for _ in range(CONFIG.layers)]
    gradients = torch.autograd.grad(loss(nudges), nudges)
    for layer in range(CONFIG.layers):
        moved = [torch.zeros(shape) for _ in range(CONFIG.layers)]
        moved[layer][0, at, slot] = step
        ahead = loss(moved)
        moved[layer][0, at, slot] = -step
        slope = (ahead - loss(moved)) / (2 * step)
        torch.testing.assert_close(slope, gradients[layer][0, at, slot], atol=2e-3, rtol=2e-2)


def test_direct_and_gradient_credit_agree_in_the_last_layer_and_differ_below(model, sessions):
    direct = keys_after(model, Rule(name="", law=credit(0.1, 0.2), signal="direct"), sessions[0, :1025])
    gradient = keys_after(model, Rule(name="", law=credit(0.1, 0.2), signal="gradient"), sessions[0, :1025])
    assert not np.array_equal(direct[-1], model.layers[-1].anchors.numpy())
    np.testing.assert_allclose(direct[-1], gradient[-1], atol=1e-5)
    assert np.abs(direct[0] - gradient[0]).max() > 1e-3


def test_a_rule_at_rate_zero_reads_exactly_as_frozen_keys_do(model, sessions):
    rules = [Rule(name="frozen"), Rule(name="still", law=literal(0.0)), Rule(name="moves", law=literal(0.1))]
    result = stream(model, rules, sessions, sessions[:, : CONFIG.context + 1], 0, tqdm(disable=True))
    np.testing.assert_array_equal(result.losses[1], result.losses[0])
    np.testing.assert_array_equal(result.heldout[1], result.heldout[0])
    assert (result.losses[2] != result.losses[0]).all()


def test_the_first_window_is_tested_before_anything_is_learned(model, sessions):
    rules = [rule for rule in RULES if rule.window == 1024]
    for rule in rules:
        losses = Reader(model, [Rule(name="frozen"), rule], 0).read_session(sessions[0])
        np.testing.assert_allclose(losses[1, : rule.window], losses[0, : rule.window], rtol=1e-6)


def test_sessions_that_begin_anew_do_not_depend_on_their_order(model, sessions):
    rules = [rule for rule in RULES if rule.per_session]
    heldout = sessions[:, : CONFIG.context + 1]
    forwards = stream(model, rules, sessions, heldout, 0, tqdm(disable=True))
    backwards = stream(model, rules, sessions.flip(0), heldout, 0, tqdm(disable=True))
    np.testing.assert_array_equal(forwards.losses, backwards.losses[:, ::-1])


def test_an_output_bias_lowers_the_loss_of_a_repeated_token(model):
    session = torch.full((SESSION + 1,), 7)
    rules = [Rule(name="session"), Rule(name="bias", per_session=True, bias_rate=0.02)]
    result = stream(model, rules, session[None], session[None, : CONFIG.context + 1], 0, tqdm(disable=True))
    assert result.losses[1, 0] < result.losses[0, 0]


def test_effective_rank_counts_directions():
    assert effective_rank(np.eye(6, dtype=np.float32)) == pytest.approx(6)
    assert effective_rank(np.ones((6, 4), dtype=np.float32)) == pytest.approx(1, abs=1e-4)


def test_gain_and_forgetting_are_percentages_of_the_frozen_loss():
    losses = np.array([[[2.0, 4.0], [1.8, 3.9]], [[2.0, 4.0], [1.8, 4.1]]])  # 2 seeds, 2 rules, 2 sessions
    heldout = np.array([[[1.0, 1.0, 2.0], [1.1, 1.1, 2.2]]] * 2)
    rows = summarize(["frozen", "rule"], losses, heldout, np.array([0, 0, 1]), np.ones((2, 2)))
    assert rows[1].gain == pytest.approx(100 * (1 - 5.8 / 6.0))
    assert rows[1].forgetting == pytest.approx(10.0)
    assert rows[1].forgetting_interval == pytest.approx((10.0, 10.0))
    assert (rows[1].sessions_improved, rows[1].sessions) == (3, 4)
    assert "| rule | +3.33 (" in table({"c": rows})


def test_interval_holds_the_change_and_narrows_with_more_files():
    noise = np.random.default_rng(3).normal(0.0, 0.1, 400)
    reference = np.full(400, 2.0)
    few, many = interval(1.9 + noise[:20], reference[:20]), interval(1.9 + noise, reference)
    assert many[0] < change(1.9 + noise, reference) < many[1]
    assert many[1] - many[0] < few[1] - few[0]
