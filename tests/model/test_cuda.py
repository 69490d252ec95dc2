"""The same model on a GPU (`make test-gpu`): equal logits within float32's tolerance, and training that lowers the loss."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from model.checkpoints.load import assemble
from model.training.data import WindowSet
from model.training.loop import TrainingConfig, train

pytestmark = pytest.mark.gpu

TOKENS = [(7 * i * i + 3 * i) % 97 for i in range(70)]
KINDS = ("some", "moe", "mom", "fm-moe", "ffn")


@pytest.fixture
def on_gpu(make_tiny, random_weights):
    """on_gpu(kind): a tiny variant on the CPU and the same one on the GPU."""

    def both(kind):
        here, there = make_tiny(torch.float32, kind), make_tiny(torch.float32, kind)
        moved = {
            name: weight.cuda() for name, weight in random_weights(here.model.config, torch.float32).items()
        }
        for block in there.blocks.values():
            block.cuda()
        return here, replace(there, model=assemble(here.model.config, moved))

    return both


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_and_decode_on_a_gpu_give_the_logits_of_the_cpu(on_gpu, kind):
    here, there = on_gpu(kind)
    rows = []
    for tiny in (here, there):
        segment = tiny.segment(TOKENS)
        steps = [tiny.model.step([replace(segment, token_ids=TOKENS[:40])])]
        steps += [
            tiny.model.step([replace(segment, token_ids=[TOKENS[i]], start=i, decode=True)])
            for i in range(40, len(TOKENS))
        ]
        rows.append(tiny.model.logits(torch.cat(steps)).cpu())
    assert_close(rows[1], rows[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_training_on_a_gpu_lowers_the_loss(on_gpu, tmp_path, kind):
    _, there = on_gpu(kind)
    starts = np.arange(40) % 96 + 1
    tokens = np.array([[(start * 2**i) % 97 for i in range(17)] for start in starts], dtype=np.int32)
    windows = {"doubling": WindowSet("doubling", tokens, np.arange(40, dtype=np.int32))}
    config = TrainingConfig(windows_per_step=4, learning_rate=3e-2, warmup_steps=2, epochs=4)
    train(there.model, there.blocks[1].config, config, windows, tmp_path / "run", tmp_path / "lower")
    curve = (tmp_path / "run" / "curve.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in curve]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
