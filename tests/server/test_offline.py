"""`libration train` and `libration evaluate`, end to end on a tiny base and text that is easy to learn."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

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
        "server.offline._open_base", lambda *_: BaseModel(make_tiny(torch.float32).model, tokenizer)
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
