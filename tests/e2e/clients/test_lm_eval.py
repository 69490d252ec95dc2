"""lm-eval: log-likelihoods, rolling perplexity and generation, beside our own evaluator on the same weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from model.blocks.base import ExpertBlock
from model.checkpoints.blocks import load_blocks, shipped_folder
from model.checkpoints.load import BaseModel
from model.training.upper import lower_states, upper_loss

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
TASKS = ("libration_choice", "libration_rolling", "libration_generate")


@pytest.fixture(scope="module")
def base(load_real) -> BaseModel:
    return load_real(torch.float32)


@pytest.fixture(scope="module")
def exact(launch, tmp_path_factory):
    """A server that computes in float32, as the comparison is to the last digits."""
    endpoints = {name: {"variant": name} for name in ("some", "dense")}
    running = launch(
        tmp_path_factory.mktemp("lm-eval") / "server",
        LIBRATION_ENGINE__DTYPE="float32",
        LIBRATION_ENDPOINTS=json.dumps(endpoints),
    )
    yield running
    running.end()


@pytest.fixture
def tasks(tmp_path) -> Path:
    """The tasks and their data; what is scored as a whole is the start of our licence, and other scripts."""
    folder = tmp_path / "tasks"
    shutil.copytree(HERE / "tasks", folder)
    licence = (HERE.parents[2] / "LICENSE").read_text()
    texts = (licence[:300], licence[300:3000], "Grüße aus Köln – こんにちは 👋🏽")
    (folder / "rolling.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def loglikelihood(
    base: BaseModel, blocks: dict[int, ExpertBlock], context: list[int], continuation: list[int]
) -> float:
    """Of a continuation, by the evaluator that `libration evaluate` uses."""
    first = min(blocks, default=0)
    tokens = torch.tensor([context + continuation])
    with torch.inference_mode():
        states = lower_states(base.transformer, tokens[:, :-1], first)
        losses, _ = upper_loss(base.transformer, blocks, states, tokens[:, 1:], first)
    return -float(losses[0, len(context) - 1 :].double().sum())


def samples(folder: Path, task: str) -> list[dict]:
    (path,) = folder.glob(f"out/*/samples_{task}_*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("model", ["dense", "some"])
def test_lm_eval_finds_what_our_own_evaluator_finds(exact, run, base, tasks, model):
    run(
        "lm_eval",
        "run",
        "--model=local-completions",
        f"--model_args=base_url={exact.url}/v1/completions,model={model},tokenizer_backend=remote,num_concurrent=2",
        "--include_path=.",
        f"--tasks={','.join(TASKS)}",
        "--log_samples",
        "--output_path=out",
        cwd=tasks,
    )
    encode = base.tokenizer.encode
    blocks = (
        {}
        if model == "dense"
        else load_blocks(shipped_folder(model), base.transformer.config.hidden_size).blocks
    )

    compared = 0
    for row in samples(tasks, "libration_choice"):
        for asked, found in zip(row["arguments"].values(), row["resps"], strict=True):
            context = encode(asked["arg_0"])
            whole = encode(asked["arg_0"] + asked["arg_1"])
            ours = loglikelihood(base, blocks, context, whole[len(context) :])
            assert float(found[0][0]) == pytest.approx(ours, abs=1e-3)
            compared += 1
        assert row["acc"] == 1
    assert compared == 12

    start = encode(base.tokenizer.bos_token)
    for row in samples(tasks, "libration_rolling"):
        tokens = encode(row["target"])
        ours = loglikelihood(base, blocks, start, tokens)
        assert float(row["resps"][0][0]) / len(tokens) == pytest.approx(ours / len(tokens), abs=1e-3)
        assert float(row["resps"][0][0]) == pytest.approx(ours, rel=1e-5, abs=1e-3)

    assert [row["exact_match"] for row in samples(tasks, "libration_generate")] == [1, 1]

    (keys,) = exact.get("/v1/keys")["data"]
    assert (keys["version"], keys["drift"]["max"]) == (0, 0), "being measured moved keys"
