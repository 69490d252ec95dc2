"""Training on a tiny model: it learns, it resumes where it left off, and what it trains is what is served."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from model.training.data import WindowSet
from model.training.evaluate import summarize, window_losses
from model.training.loop import TrainingConfig, train
from model.training.sources import read_html, split_of
from model.training.upper import lower_states, upper_loss

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


def test_training_lowers_the_loss(tiny, windows, tmp_path):
    before = mean_loss(tiny, {}, windows)
    trained = train(tiny.model, tiny.blocks[1].config, CONFIG, windows, tmp_path / "run", tmp_path / "lower")
    assert mean_loss(tiny, trained, windows) < 0.8 * before


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tiny, windows, tmp_path, monkeypatch):
    config = tiny.blocks[1].config
    whole = train(tiny.model, config, CONFIG, windows, tmp_path / "whole", tmp_path / "lower")

    def stop_early(*arguments):
        losses, auxiliary = upper_loss(*arguments)
        stop_early.calls += 1
        if stop_early.calls == 18:
            raise KeyboardInterrupt
        return losses, auxiliary

    stop_early.calls = 0
    monkeypatch.setattr("model.training.loop.upper_loss", stop_early)
    with pytest.raises(KeyboardInterrupt):
        train(tiny.model, config, CONFIG, windows, tmp_path / "cut", tmp_path / "lower")
    monkeypatch.undo()
    resumed = train(tiny.model, config, CONFIG, windows, tmp_path / "cut", tmp_path / "lower")
    for layer, block in whole.items():
        for name, parameter in block.named_parameters():
            assert_close(resumed[layer].get_parameter(name), parameter, atol=1e-6, rtol=1e-5)


def test_what_is_trained_is_what_is_served(tiny):
    """The training pass and the serving pass give one text the same loss."""
    tokens = torch.tensor([[(7 * i * i + 3 * i) % 97 for i in range(41)]])
    lower = lower_states(tiny.model, tokens[:, :-1], 1)
    losses, _ = upper_loss(tiny.model, tiny.blocks, lower, tokens[:, 1:], 1)
    logits = tiny.logits(tokens[0, :-1].tolist())
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
