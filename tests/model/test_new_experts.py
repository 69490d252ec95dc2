"""New experts for a person's own text: what is read, what learns, and what is left alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from model.checkpoints.experts import read_experts, write_experts
from model.training.data import WindowSet
from model.training.errors import TrainingDataMissing
from model.training.folder import WINDOW, read_folder
from model.training.loop import TrainingConfig
from model.training.new_experts import WidenedBlock, train_experts

CONFIG = TrainingConfig(windows_per_step=4, learning_rate=3e-2, warmup_steps=2, max_steps=40, epochs=40)


class Letters:
    """A tokenizer of one token a character."""

    def encode(self, text):
        return [ord(character) % 90 + 2 for character in text]


def doubling(first):
    rows = [[(start * 2**i) % 97 for i in range(17)] for start in range(first, 97, 3)]
    return WindowSet("doubling", np.array(rows, dtype=np.int32), np.arange(len(rows), dtype=np.int32))


def test_a_folder_is_split_by_file_and_every_file_counts(tmp_path):
    for i in range(10):
        (tmp_path / f"file-{i}.txt").write_text(chr(ord("a") + i) * 300)
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "image.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / ".hidden").write_text("x" * 5000)
    (tmp_path / "link").symlink_to(tmp_path / "file-0.txt")
    text = read_folder(tmp_path, Letters(), 1)
    assert text.passed_over == 1
    assert text.train.domain == tmp_path.name
    assert text.train.tokens.shape == ((9 * 301 - 1) // WINDOW, WINDOW + 1)
    assert text.heldout.tokens.shape == (1, WINDOW + 1)
    trained, heldout = (set(each.tokens.ravel().tolist()) - {1} for each in (text.train, text.heldout))
    assert len(heldout) == 1
    assert not trained & heldout
    assert (text.train.tokens[1:, 0] == text.train.tokens[:-1, -1]).all(), "nothing is lost between windows"
    again = read_folder(tmp_path, Letters(), 1)
    assert (again.train.tokens == text.train.tokens).all()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "is no folder"),
        ({}, "has 0 files"),
        ({"a": "x" * 900}, "has 1 files"),
        ({"a": "x" * 900, "b": "short"}, "fewer than 257 tokens"),
    ],
)
def test_a_folder_without_enough_text_is_told(tmp_path, files, message):
    folder = tmp_path / "text"
    if files is not None:
        folder.mkdir()
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    with pytest.raises(TrainingDataMissing, match=message):
        read_folder(folder, Letters(), 1)


def test_only_the_new_experts_learn_and_they_lower_the_loss(tiny, tmp_path):
    before = {layer: {n: p.clone() for n, p in b.named_parameters()} for layer, b in tiny.blocks.items()}
    trained = train_experts(
        tiny.model, tiny.blocks, (2,), 3, CONFIG, doubling(1), doubling(2), tmp_path / "run"
    )
    assert trained.loss_after < trained.loss_before - 0.05
    assert {name: each.shape for name, each in trained.matrices[2].items()} == {
        "down_proj": (3, 8, 32),
        "up_proj": (3, 32, 8),
    }
    assert trained.keys[2].shape == (3, 16)
    for layer, block in tiny.blocks.items():
        for name, parameter in block.named_parameters():
            assert torch.equal(parameter, before[layer][name]), (layer, name)


def test_what_was_trained_is_what_is_served_once_it_is_added(tiny, tmp_path):
    """The widened block in training, and the block with appended experts behind the same keys, agree."""
    torch.manual_seed(2)
    widened = WidenedBlock(tiny.blocks[2], 3)
    for matrix in widened.experts.parameters():
        torch.nn.init.normal_(matrix, std=0.3)
    hidden = torch.randn(2, 9, 32)
    expected, _ = widened(hidden)
    write_experts(tmp_path / "e.safetensors", {2: widened.experts.stacked}, {2: widened.keys.detach()})
    file = read_experts(tmp_path / "e.safetensors", {2: tiny.blocks[2]})
    tiny.blocks[2].experts.append(file.matrices[2])
    keys = torch.cat((tiny.blocks[2].anchors, file.keys[2]))
    served = tiny.blocks[2].mix(tiny.blocks[2].normed(hidden), keys).combined
    assert_close(served, expected.detach())


def test_an_interrupted_training_goes_on(tiny, tmp_path, monkeypatch):
    short = replace(CONFIG, max_steps=6, checkpoint_every=2)
    splits = doubling(1), doubling(2)
    whole = train_experts(tiny.model, tiny.blocks, (2,), 2, short, *splits, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("model.training.new_experts.window_losses", None)  # fails right after the training
        with pytest.raises(TypeError):
            train_experts(
                tiny.model, tiny.blocks, (2,), 2, replace(short, max_steps=4), *splits, tmp_path / "cut"
            )
    # The schedule depends on the number of steps, so only that training continues is compared, not its bits.
    resumed = train_experts(tiny.model, tiny.blocks, (2,), 2, short, *splits, tmp_path / "cut")
    lines = (tmp_path / "cut" / "curve.jsonl").read_text().splitlines()
    assert len(lines) == 6, "four steps, then two"
    assert resumed.loss_after == pytest.approx(whole.loss_after, rel=0.05)
