"""No variant sees the future: on independent uniform tokens nothing honest beats the logarithm of their number."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from model.recurrence import decayed_sums
from model.training.data import WindowSet
from model.training.loop import TrainingConfig, train
from model.training.upper import lower_states, upper_loss

SYMBOLS = 4
LENGTH = 16
STEPS = 120
CONFIG = TrainingConfig(windows_per_step=8, learning_rate=1e-2, warmup_steps=5, checkpoint_every=1000)
HONEST = math.log(SYMBOLS)
SAMPLING_ERROR = 0.02


def independent_tokens(windows, seed):
    return np.random.default_rng(seed).integers(10, 10 + SYMBOLS, (windows, LENGTH + 1), dtype=np.int32)


@pytest.fixture
def train_on_noise(tmp_path):
    def trained(tiny, config):
        tokens = independent_tokens(8 * STEPS, seed=1)
        windows = {"noise": WindowSet("noise", tokens, np.zeros(len(tokens), dtype=np.int32))}
        blocks = train(tiny.model, config, CONFIG, windows, tmp_path / "run", tmp_path / "lower")
        for block in blocks.values():
            block.requires_grad_(requires_grad=False)
        anchors = {layer: b.anchors.numpy() for layer, b in blocks.items() if config.kind == "some"}
        keys = type(tiny.keys)(anchors) if anchors else None
        return replace(tiny, blocks=blocks, variant=replace(tiny.variant, blocks=blocks), keys=keys)

    return trained


def teacher_forced(tiny, tokens):
    with torch.no_grad():
        lower = lower_states(tiny.model, tokens[:, :-1], 1)
        return upper_loss(tiny.model, tiny.blocks, lower, tokens[:, 1:], 1)[0]


def decoded(tiny, tokens):
    segments = [tiny.segment(window.tolist()) for window in tokens]
    columns = []
    for i in range(LENGTH):
        rows = tiny.model.step(
            [replace(s, token_ids=[s.token_ids[i]], start=i, decode=True) for s in segments]
        )
        columns.append(
            torch.nn.functional.cross_entropy(tiny.model.logits(rows), tokens[:, i + 1], reduction="none")
        )
    return torch.stack(columns, dim=1)


def test_independent_tokens_stay_unguessable(every_tiny, block_config, train_on_noise):
    tiny = train_on_noise(every_tiny, block_config)
    tokens = torch.from_numpy(independent_tokens(32, seed=2)).long()
    forced = teacher_forced(tiny, tokens)
    assert_close(forced, decoded(tiny, tokens), atol=1e-3, rtol=1e-3)
    assert forced.mean() >= HONEST - SAMPLING_ERROR
    assert forced.mean() < HONEST + 0.1, "it has not learned which tokens there are: the test says nothing"


class BothDirections:
    """What the paper's backward flow would see."""

    def run(self, slot, values, decay):
        nothing = values.new_zeros(values.shape[0], values.shape[2])
        return decayed_sums(values, decay, nothing) + decayed_sums(values.flip(1), decay, nothing).flip(1)


def test_a_flow_from_the_future_would_be_caught(make_tiny, train_on_noise, monkeypatch):
    monkeypatch.setattr("model.blocks.mom.WholeWindows", BothDirections)
    config = replace(make_tiny(torch.float32, "mom").blocks[1].config, flow_decay=0.5, bypass_threshold=0.0)
    tiny = train_on_noise(make_tiny(torch.float32, "mom"), config)
    tokens = torch.from_numpy(independent_tokens(32, seed=2)).long()
    assert teacher_forced(tiny, tokens).mean() < HONEST - 4 * SAMPLING_ERROR
    assert decoded(tiny, tokens).mean() > HONEST
