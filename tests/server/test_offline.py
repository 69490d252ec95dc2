"""`libration train` and `libration evaluate`, end to end on a tiny base and text that is easy to learn."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from model.checkpoints.blocks import save_blocks
from model.checkpoints.experts import read_experts
from model.checkpoints.load import BaseModel
from model.training.data import WindowSet, save
from server.cli import main

PNG = b"\x89PNG"


@pytest.fixture
def data(tmp_path):
    """Windows of three splits, as if they had been cut from files: every token is followed by its double."""
    folder = tmp_path / "data"
    folder.mkdir()
    for split, first in (("train", 1), ("validation", 2), ("heldout", 3)):
        rows = [[(start * 2**i) % 97 for i in range(17)] for start in range(first, 97, 2)]
        tokens = np.array(rows, dtype=np.int32)
        save(folder, split, WindowSet("doubling", tokens, np.arange(len(rows), dtype=np.int32) // 4))
    return folder


@pytest.fixture
def run(make_tiny, tokenizer, tiny_variants, tmp_path, monkeypatch):
    """run(*arguments): the command line over a tiny base, with no text to collect."""
    monkeypatch.setattr(
        "server.offline.open_base",
        lambda *_: BaseModel(make_tiny(torch.float32, vocab_size=tokenizer.vocab_size).model, tokenizer),
    )
    monkeypatch.setattr("server.offline.build", lambda *_: None)
    monkeypatch.setattr("server.offline._build_chat", lambda *_: None)
    monkeypatch.setattr("server.offline.VARIANTS", tiny_variants | {"ffn-active": tiny_variants["ffn"]})
    monkeypatch.setenv("LIBRATION_DATA_DIR", str(tmp_path / "own"))
    return lambda *arguments: CliRunner().invoke(main, [str(each) for each in arguments])


@pytest.mark.parametrize("variant", ["some", "moe", "mom", "fm-moe"])
def test_a_variant_is_trained_and_measured_from_the_command_line(run, data, tmp_path, variant):
    folder, out = tmp_path / variant, tmp_path / "out"
    trained = run(
        "train", variant, "--run", folder, "--data", data, "--steps", 24, "--sweep-steps", 8,
        "--learning-rate", 1e-4, "--learning-rate", 3e-2,
    )  # fmt: skip
    assert trained.exit_code == 0, trained.output
    assert "learning rate 0.03 had the lowest validation loss" in trained.output
    assert set(json.loads((folder / "sweep.json").read_text())) == {"0.0001", "0.03"}
    assert len((folder / "curve.jsonl").read_text().splitlines()) == 24
    assert (folder / "curve.png").read_bytes().startswith(PNG)

    measured = run("evaluate", "--data", data, "--blocks", folder / "blocks", "--out", out)
    assert measured.exit_code == 0, measured.output
    assert f"| domain | dense | {variant} |" in measured.output
    base, mine = json.loads((out / "evaluation.json").read_text())
    assert (base["name"], mine["name"]) == ("dense", variant)
    assert mine["domains"][0]["loss"] < base["domains"][0]["loss"]
    assert 0 < mine["active_parameters"] <= mine["parameters"]
    assert mine["prompt_tokens_per_s"] > 0
    assert (out / "evaluation.png").read_bytes().startswith(PNG)


def test_figures_for_machines_are_json(run, data, tmp_path):
    run("train", "ffn-active", "--run", tmp_path / "run", "--data", data, "--steps", 2)
    printed = run("evaluate", "--data", data, "--blocks", tmp_path / "run" / "blocks", "--json")
    assert [report["name"] for report in json.loads(printed.stdout)] == ["dense", "run"]


def test_evaluate_asks_what_to_measure(run, data):
    result = run("evaluate", "--data", data)
    assert (result.exit_code, "--all" in result.output) == (2, True)


def test_a_folder_without_blocks_is_named(run, data, tmp_path):
    result = run("evaluate", "--data", data, "--blocks", tmp_path / "nothing")
    assert result.exit_code == 1
    assert str(tmp_path / "nothing") in result.output


def test_new_experts_are_trained_on_a_folder_of_text(run, make_tiny, tmp_path):
    blocks, text, out = tmp_path / "blocks", tmp_path / "text", tmp_path / "legal.safetensors"
    tiny = make_tiny(torch.float32)
    save_blocks(blocks, tiny.blocks[1].config, tiny.blocks, torch.float32)
    text.mkdir()
    for i in range(4):
        (text / f"{i}.txt").write_text("to be or not to be " * 30)
    arguments = ("train", "experts", "--domain", text, "--out", out, "--blocks", blocks, "--experts", 2)
    trained = run(*arguments, "--steps", 3)
    assert trained.exit_code == 0, trained.output
    assert "windows to train on" in trained.output
    assert "held-out loss" in trained.output
    assert "2 experts for each of layers 2 are in" in trained.output
    file = read_experts(out, {2: tiny.blocks[2]})
    assert (file.count_of(2), file.keys) == (2, {})
    assert not list(tmp_path.glob("*.run"))
    kept = run(*arguments, "--steps", 1, "--layer", 1, "--with-keys", "--run", tmp_path / "run")
    assert kept.exit_code == 0, kept.output
    assert read_experts(out, {1: tiny.blocks[1]}).keys[1].shape == (2, 16)
    assert (tmp_path / "run" / "checkpoint.safetensors").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--domain", "nowhere"], "nowhere is no folder"),
        (["--layer", "9"], "--layer [9] has no block; allowed: [1, 2]"),
        (["--blocks", "nothing"], "nothing"),
    ],
)
def test_what_new_experts_cannot_be_trained_on_is_told(run, make_tiny, tmp_path, arguments, message):
    blocks, tiny = tmp_path / "blocks", make_tiny(torch.float32)
    save_blocks(blocks, tiny.blocks[1].config, tiny.blocks, torch.float32)
    result = run(
        "train", "experts", "--domain", tmp_path, "--out", tmp_path / "x", "--blocks", blocks, *arguments
    )
    assert (result.exit_code, message in result.output) == (1, True), result.output
