"""Expert blocks on disk: what is saved comes back, what is wrong is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoints.blocks import CONFIG_FILE, WEIGHTS_FILE, load_blocks, save_blocks, shipped_folder
from model.errors import CheckpointError


@pytest.fixture
def folder(tiny, tmp_path):
    config = next(iter(tiny.blocks.values())).config
    save_blocks(tmp_path, config, tiny.blocks, torch.float32)
    return tmp_path


def test_blocks_come_back_as_they_were_saved(tiny, folder):
    config, blocks = load_blocks(folder, 32)
    assert config == tiny.blocks[1].config
    for layer, block in blocks.items():
        for name, parameter in block.named_parameters():
            assert torch.equal(parameter, tiny.blocks[layer].get_parameter(name))
            assert not parameter.requires_grad


def damage(folder, change):
    tensors = load_file(folder / WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_FILE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("layers.1.anchors"), "no tensor 'layers.1.anchors'"),
        (lambda t: t.update({"layers.1.anchors": torch.zeros(3, 3)}), r"shape \(3, 3\), expected \(8, 16\)"),
        (lambda t: t["layers.2.up_proj"].fill_(float("nan")), "not finite"),
        (lambda t: t.update({"layers.9.extra": torch.zeros(1)}), "no block takes"),
    ],
)
def test_a_wrong_tensor_is_named(folder, change, message):
    damage(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_blocks(folder, 32)


def test_a_truncated_file_is_an_error_that_names_it(folder):
    whole = (folder / WEIGHTS_FILE).read_bytes()
    (folder / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=WEIGHTS_FILE):
        load_blocks(folder, 32)


def test_another_hidden_size_is_refused(folder):
    with pytest.raises(CheckpointError, match="hidden size 32, the base model has 64"):
        load_blocks(folder, 64)


def test_an_unknown_kind_is_refused(folder):
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"kind": "magic"}))
    with pytest.raises(CheckpointError, match="'magic'"):
        load_blocks(folder, 32)


def test_the_shipped_blocks_load_and_contribute():
    config, blocks = load_blocks(shipped_folder("some"), 576)
    assert set(blocks) == set(config.layers)
    assert all(block.get_parameter("up_proj").abs().sum() > 0 for block in blocks.values())
