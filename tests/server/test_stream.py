"""Prequential evaluation: predict, then learn; every text on its own; the frozen model as the measure."""

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.testing import assert_close

from keystore.records import GravityConfig
from model.errors import ModelError
from model.plastic_pass import UpperPast
from model.training.upper import lower_states
from server.cli import main
from server.settings import load_settings
from server.stream.adapter import Adapter, run_texts
from server.stream.command import StreamJob, stream
from server.stream.report import RuleReport, StreamReport, markdown
from server.stream.rules import FROZEN, StreamRule
from server.stream.text import cut, texts_in

LENGTH, WINDOW = 64, 16
TEXTS = torch.tensor([[(7 * i * i + 3 * i + 11 * j) % 23 for i in range(LENGTH + 1)] for j in range(3)])
STEEP = GravityConfig(rule="direct", plasticity_rate=0.5, trust_radius=0.5, inertia="none")
RULES = [
    StreamRule("literal", GravityConfig(rule="literal", plasticity_rate=0.1, inertia="none")),
    StreamRule("direct", STEEP),
    StreamRule(
        "gradient", GravityConfig(rule="gradient", plasticity_rate=0.5, trust_radius=0.5, inertia="none")
    ),
    StreamRule("value offsets", value_rate=0.05),
    StreamRule("output bias", bias_rate=2.0),
    StreamRule("all", STEEP, value_rate=0.05, bias_rate=2.0),
]


def losses_of(tiny, rule: StreamRule, texts: torch.Tensor, *, carry: bool = True) -> torch.Tensor:
    for block in tiny.blocks.values():
        block.requires_grad_(False)
    entry = lower_states(tiny.model, texts[:, :-1], min(tiny.blocks)).clone()
    return run_texts(
        Adapter(tiny.model, tiny.blocks, rule, len(texts)), entry, texts[:, 1:], WINDOW, carry=carry
    )


def test_the_frozen_rule_has_the_models_own_losses(tiny):
    losses = losses_of(tiny, FROZEN, TEXTS)
    for text, mine in zip(TEXTS, losses, strict=True):
        logits = tiny.model.logits(tiny.model.step([tiny.segment(text[:-1].tolist())]))
        expected = torch.nn.functional.cross_entropy(logits, text[1:], reduction="none")
        assert_close(mine, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_window_is_predicted_before_it_is_learned_from(tiny, rule):
    frozen, adapted = losses_of(tiny, FROZEN, TEXTS), losses_of(tiny, rule, TEXTS)
    assert_close(adapted[:, :WINDOW], frozen[:, :WINDOW], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(adapted[:, WINDOW:], frozen[:, WINDOW:], atol=1e-5)


@pytest.mark.parametrize(
    "rule", [rule for rule in RULES if rule.name != "literal"], ids=lambda rule: rule.name
)
def test_learning_from_a_repetitive_text_lowers_its_loss(tiny, rule):
    assert losses_of(tiny, rule, TEXTS)[:, WINDOW:].mean() < losses_of(tiny, FROZEN, TEXTS)[:, WINDOW:].mean()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_texts_beside_each_other_adapt_apart(tiny, rule):
    together = losses_of(tiny, rule, TEXTS)
    alone = torch.cat([losses_of(tiny, rule, text[None]) for text in TEXTS])
    assert_close(together, alone, atol=2e-4, rtol=2e-4)


def test_without_carry_every_window_has_a_context_of_its_own(tiny):
    fresh = losses_of(tiny, FROZEN, TEXTS[:1, : 2 * WINDOW + 1], carry=False)
    past = UpperPast()
    adapter = Adapter(tiny.model, tiny.blocks, FROZEN, 1)
    second = lower_states(tiny.model, TEXTS[:1, : 2 * WINDOW], min(tiny.blocks))[:, WINDOW:].clone()
    assert_close(
        fresh[:, WINDOW:],
        adapter.window(second, TEXTS[:1, WINDOW + 1 : 2 * WINDOW + 1], None),
        atol=1e-5,
        rtol=1e-5,
    )
    assert past.length == 0


def test_keys_stay_inside_their_radius_and_the_drift_says_how_far(tiny):
    tight = StreamRule("tight", GravityConfig(plasticity_rate=1.0, trust_radius=0.03, inertia="none"))
    adapter = Adapter(tiny.model, tiny.blocks, tight, 1)
    entry = lower_states(tiny.model, TEXTS[:1, :-1], 1).clone()
    run_texts(adapter, entry, TEXTS[:1, 1:], WINDOW, carry=True)
    assert 0.02 < adapter.drift() <= 0.03


def test_pieces_are_cut_from_files_in_order_and_say_which(tmp_path, tokenizer):
    (tmp_path / "b.txt").write_text("b" * 50)
    (tmp_path / "a.md").write_text("a" * 21)
    (tmp_path / "ignored.bin").write_bytes(b"\xff\xfe")
    pieces = cut(texts_in(tmp_path), tokenizer, 10)
    assert [Path(text.name).name for text in pieces.files] == ["a.md", "b.txt"]
    assert pieces.file_index.tolist() == [0, 0, 1, 1, 1, 1]
    assert pieces.tokens.shape == (6, 11)
    assert np.array_equal(pieces.tokens[2:, :-1].ravel(), tokenizer.encode("b" * 40))
    assert len(cut(texts_in(tmp_path), tokenizer, 10, wanted=3, per_file=1)) == 2
    assert len(cut(texts_in(tmp_path / "a.md"), tokenizer, 100)) == 0
    with pytest.raises(FileNotFoundError):
        list(texts_in(tmp_path / "nowhere"))


def test_the_report_compares_with_frozen_and_holds_its_interval():
    def rule(name: str, factor: float, held_out: float) -> RuleReport:
        return RuleReport(name, [factor * loss for loss in (1.0, 2.0, 3.0)], held_out, 0.1, 10.0, 0.9)

    report = StreamReport("text", "some", 16, 48, 1, [rule("frozen", 1.0, 2.0), rule("direct", 0.98, 2.01)])
    assert report.gain(report.rules[1]) == pytest.approx((2.0, 2.0, 2.0))
    assert report.forgotten(report.rules[1]) == pytest.approx(0.5)
    assert "| direct | 1.9600 | +2.00 % (+2.00 to +2.00) | +0.500 % |" in markdown(report)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"endpoint": "nobody"}, "'nobody' is not configured"),
        ({"endpoint": "dense"}, "no routing keys"),
        ({"text": Path("/nowhere")}, "/nowhere does not exist"),
    ],
)
def test_what_cannot_be_streamed_is_said(tmp_path, changes, says):
    job = {"text": tmp_path, "endpoint": "some", "rule": None, "value_rate": 0.0, "window": None}
    rest = {"max_tokens": None, "held_out": None, "out": None}
    with pytest.raises((ModelError, OSError), match=says):
        stream(load_settings(None, data_dir=tmp_path), StreamJob(**(job | rest | changes)), 1, as_json=False)


def test_the_command_explains_itself():
    shown = CliRunner().invoke(main, ["stream", "--help"])
    assert shown.exit_code == 0
    assert "Nothing that a server keeps is read or written" in " ".join(shown.output.split())
