"""`libration adapt`: a dense checkpoint gets blocks; in this process, on a tiny one."""

import re

import pytest
from click.testing import CliRunner

from model.checkpoints.blocks import load_blocks
from server.cli import main

SIZES = (
    "--experts",
    "8",
    "--experts-per-token",
    "2",
    "--expert-size",
    "8",
    "--key-size",
    "16",
    "--threads",
    "1",
)


@pytest.fixture
def text(tmp_path):
    """Four files that say the same over and over."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text("the same words come again and again, as they always do. " * 40)
    return folder


def adapt(model, text, tmp_path, *options):
    arguments = ["adapt", str(model), "--text", str(text), "--out", str(tmp_path / "blocks")]
    return CliRunner().invoke(main, [*arguments, "--data-dir", str(tmp_path / "data"), *SIZES, *options])


def test_blocks_lower_the_loss_of_text_that_was_held_out(checkpoint, text, tmp_path):
    done = adapt(checkpoint("llama")[0], text, tmp_path, "--steps", "30", "--learning-rate", "1e-2")
    assert done.exit_code == 0, done.output
    before, after = re.search(r"held-out loss (\S+) -> (\S+) nats", done.output).groups()
    assert float(after) < 0.9 * float(before)
    folder = load_blocks(tmp_path / "blocks", 64)
    assert folder.config.layers == (2,)
    assert (folder.config.num_experts, folder.config.num_experts_per_tok) == (8, 2)
    assert not (tmp_path / "blocks.run").exists()


def test_an_interrupted_run_goes_on(checkpoint, text, tmp_path):
    run = ("--run", str(tmp_path / "run"), "--layer", "0", "--layer", "2")
    assert adapt(checkpoint("qwen3")[0], text, tmp_path, "--steps", "2", *run).exit_code == 0
    done = adapt(checkpoint("qwen3")[0], text, tmp_path, "--steps", "4", *run)
    assert done.exit_code == 0, done.output
    curve = (tmp_path / "run" / "curve.jsonl").read_text().splitlines()
    assert len(curve) == 4
    assert load_blocks(tmp_path / "blocks", 64).config.layers == (0, 2)


@pytest.mark.parametrize(
    ("family", "changes", "options", "message"),
    [
        ("mixtral", {}, (), "has experts of its own: serve it with"),
        ("llama", {"max_position_embeddings": 64}, (), "reads 64 tokens at once; allowed: 256 or more"),
        ("llama", {}, ("--layer", "3"), "--layer 3: allowed are 0 to 2"),
        ("llama", {}, ("--experts-per-token", "9"), "num_experts_per_tok is 9; allowed: 1 to num_experts, 8"),
    ],
)
def test_what_cannot_be_adapted_is_said_before_anything_is_trained(
    checkpoint, text, tmp_path, family, changes, options, message
):
    done = adapt(checkpoint(family, **changes)[0], text, tmp_path, *options)
    assert done.exit_code == 1
    assert message in done.output
    assert not (tmp_path / "blocks").exists()
