"""Training on a tiny model: it learns, it resumes where it left off, and what it trains is what is served."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from model.training.data import WindowSet
from model.training.evaluate import summarize, window_losses
from model.training.loop import TrainingConfig, train
from model.training.report import VariantReport, draw_curve, draw_losses, markdown_table
from model.training.sources import read_html, split_of
from model.training.sweep import choose_learning_rate
from model.training.upper import LowerStates, lower_states, upper_loss

CONFIG = TrainingConfig(windows_per_step=4, learning_rate=3e-2, warmup_steps=2, checkpoint_every=5, epochs=4)


@pytest.fixture
def windows():
    """Text in which every token is followed by its double: easy to learn, hard to guess."""
    starts = np.arange(40) % 96 + 1
    rows = [[(start * 2**i) % 97 for i in range(17)] for start in starts]
    return {
        "doubling": WindowSet("doubling", np.array(rows, dtype=np.int32), np.arange(40, dtype=np.int32) // 8)
    }


def mean_loss(tiny, blocks, windows):
    return window_losses(tiny.model, {"x": blocks}, windows)["x"]["doubling"].mean()


def test_training_lowers_the_loss(tiny, block_config, windows, tmp_path):
    before = mean_loss(tiny, {}, windows)
    trained = train(tiny.model, block_config, CONFIG, windows, tmp_path / "run", tmp_path / "lower")
    assert mean_loss(tiny, trained, windows) < 0.8 * before


def test_kept_states_are_those_of_windows_of_the_same_length(tiny, tmp_path):
    tokens = torch.arange(16).view(2, 8)
    whole = LowerStates(tiny.model, tokens, 1, tmp_path).of(torch.tensor([0, 1]))
    halves = LowerStates(tiny.model, tokens.view(4, 4), 1, tmp_path).of(torch.arange(4))
    again = LowerStates(tiny.model, tokens, 1, tmp_path).of(torch.tensor([0, 1]))
    assert torch.equal(again, whole)
    assert_close(halves[0], whole[0, :4], atol=0.05, rtol=0.05)
    assert not torch.allclose(halves[1], whole[0, 4:], atol=0.05, rtol=0.05), "the second half begins anew"


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(
    tiny, block_config, windows, tmp_path, monkeypatch
):
    short = replace(CONFIG, max_steps=12)
    whole = train(tiny.model, block_config, short, windows, tmp_path / "whole", tmp_path / "lower")

    def stop_early(*arguments):
        losses, auxiliary = upper_loss(*arguments)
        stop_early.calls += 1
        if stop_early.calls == 9:
            raise KeyboardInterrupt
        return losses, auxiliary

    stop_early.calls = 0
    monkeypatch.setattr("model.training.loop.upper_loss", stop_early)
    with pytest.raises(KeyboardInterrupt):
        train(tiny.model, block_config, short, windows, tmp_path / "cut", tmp_path / "lower")
    monkeypatch.undo()
    resumed = train(tiny.model, block_config, short, windows, tmp_path / "cut", tmp_path / "lower")
    for layer, block in whole.items():
        for name, parameter in block.named_parameters():
            assert torch.equal(resumed[layer].get_parameter(name), parameter), name


def test_what_is_trained_is_what_is_served(every_tiny):
    """The training pass and the serving pass give one text the same loss."""
    tokens = torch.tensor([[(7 * i * i + 3 * i) % 97 for i in range(41)]])
    lower = lower_states(every_tiny.model, tokens[:, :-1], 1)
    losses, _ = upper_loss(every_tiny.model, every_tiny.blocks, lower, tokens[:, 1:], 1)
    logits = every_tiny.logits(tokens[0, :-1].tolist())
    served = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    assert_close(losses[0].detach(), served, atol=1e-4, rtol=1e-4)


def test_without_blocks_the_upper_pass_is_the_base(tiny):
    tokens = torch.tensor([[(5 * i) % 97 for i in range(30)]])
    losses, auxiliary = upper_loss(
        tiny.model, {}, lower_states(tiny.model, tokens[:, :-1], 1), tokens[:, 1:], 1
    )
    logits = tiny.logits(tokens[0, :-1].tolist(), plain=True)
    served = torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    assert_close(losses[0].detach(), served, atol=1e-4, rtol=1e-4)
    assert auxiliary == 0


def test_the_better_of_two_learning_rates_is_chosen_once(tiny, windows, tmp_path, monkeypatch):
    def choose():
        return choose_learning_rate(
            tiny.model,
            tiny.blocks[1].config,
            replace(CONFIG, max_steps=10),
            [1e-6, 3e-2],
            windows,
            windows,
            tmp_path / "run",
            tmp_path / "lower",
        )

    assert choose() == 3e-2
    losses = json.loads((tmp_path / "run/sweep.json").read_text())
    assert set(losses) == {"1e-06", "0.03"}
    assert losses["0.03"]["doubling"] < losses["1e-06"]["doubling"]

    def no_training(*arguments):
        raise AssertionError("both rates are known")

    monkeypatch.setattr("model.training.sweep.train", no_training)
    assert choose() == 3e-2


@pytest.fixture
def reports(windows):
    windows = windows["doubling"]
    base = (windows.file_index * 1.0 + 5).astype(np.float32)
    return [
        VariantReport("dense", 0, 0, 250.0, (summarize(base, base, windows),)),
        VariantReport("some", 7_500_000, 1_250_000, 123.4, (summarize(base, base * 0.9, windows),)),
    ]


def test_the_table_sets_variants_side_by_side(reports):
    header, ruler, domain, *rest = markdown_table(reports).splitlines()
    assert header == "| domain | dense | some |"
    assert ruler == "|---|---|---|"
    assert domain.startswith("| doubling (640 tokens, 5 files) | 7.000 | 6.300")
    assert "-10.0 to -10.0" in domain
    assert rest == [
        "| parameters added, M | 0.00 | 7.50 |",
        "| of them active for a token, M | 0.00 | 1.25 |",
        "| prompt tokens/s | 250 | 123 |",
    ]


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_losses_become_a_picture(reports, tmp_path):
    draw_losses(reports, tmp_path / "losses.png")
    assert is_picture(tmp_path / "losses.png")


@pytest.mark.parametrize("steps", [5, 60])
def test_a_curve_becomes_a_picture_even_where_a_resumed_run_repeats_itself(tmp_path, steps):
    lines = [json.dumps({"step": i, "loss": 5 / (i + 1), "auxiliary": 0.0}) for i in range(steps)]
    (tmp_path / "curve.jsonl").write_text("\n".join([*lines, *lines[-3:]]) + "\n")
    draw_curve(tmp_path / "curve.jsonl", tmp_path / "curve.png", "training")
    assert is_picture(tmp_path / "curve.png")


def test_a_paired_interval_ignores_that_files_differ(windows):
    windows = windows["doubling"]
    base = (windows.file_index * 10.0 + 5).astype(np.float32)
    result = summarize(base, base * 0.9, windows)
    assert result.change == pytest.approx(-10, abs=1e-3)
    assert result.change_interval == pytest.approx((-10, -10), abs=1e-3)
    assert result.loss_interval[1] - result.loss_interval[0] > 5


def test_splits_depend_on_the_name_alone_and_hold_out_a_tenth(tmp_path):
    splits = [split_of(tmp_path / f"file-{i}") for i in range(2000)]
    assert splits == [split_of(tmp_path / f"file-{i}") for i in range(2000)]
    assert 0.07 < splits.count("heldout") / 2000 < 0.13
    assert 0.75 < splits.count("train") / 2000 < 0.85


def test_html_keeps_paragraphs_and_code_and_drops_scripts(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        "<html><head><title>T</title></head><body><script>x()</script><p>One\n two.</p><pre>a\n  b</pre></body>"
    )
    assert read_html(page) == "One two.\n\na\n  b"
