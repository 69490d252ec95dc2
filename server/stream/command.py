"""What `libration stream` does: one text, predicted window by window and learned from, beside the frozen model.

The text is one scope: what a file teaches counts for the files after it. Attention carries a file's own text only.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from keystore.projection import load_balance
from model.blocks.some import SomeBlock
from model.checkpoints.assemble import BaseModel
from model.errors import ModelError
from model.plastic_pass import PlasticPass, UpperPast
from model.training.upper import lower_states
from server.build import load_variant, open_base, plastic_layers_of, read_variant
from server.canary_text import canary_windows
from server.settings import Settings
from server.settings_endpoint import EndpointSettings
from server.stream.adapter import Adapter
from server.stream.report import RuleReport, StreamReport, draw, markdown
from server.stream.rules import FROZEN, StreamRule
from server.stream.text import Pieces, cut, texts_in

MAX_FILE_TOKENS = 8192  # or the base's context, if that is shorter; what a file has beyond is left out
BIAS_RATE = 20.0  # the best of the tuning split of bench/plasticity.py
FORGETTING_WINDOWS = 8


class StreamTextMissing(ModelError):
    """Nothing to stream: no text file, or none long enough for a window."""


@dataclass(frozen=True, slots=True)
class StreamJob:
    """What one `libration stream` is asked for."""

    text: Path
    endpoint: str
    rule: str | None  # None: the endpoint's own
    value_rate: float
    window: int | None  # None: the endpoint's gravity window
    max_tokens: int | None
    held_out: Path | None  # text that must not be forgotten; None: the guard's
    out: Path | None


def stream(settings: Settings, job: StreamJob, threads: int, *, as_json: bool) -> None:
    """Print, and with `out` write, what each rule did. Raises ModelError, OSError, UnicodeDecodeError."""
    if job.endpoint not in settings.endpoints:
        raise StreamTextMissing(
            f"endpoint {job.endpoint!r} is not configured; there are {', '.join(settings.endpoints)}"
        )
    endpoint = settings.endpoints[job.endpoint]
    if not endpoint.has_keys:
        raise StreamTextMissing(
            f"variant {endpoint.variant!r} has no routing keys: only a `some` or a plastic endpoint can learn"
        )
    texts = texts_in(job.text)
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    base = open_base(endpoint.model, torch.bfloat16, settings.data_dir / "cache")
    blocks = some_blocks(endpoint, base)
    rules = rules_of(endpoint, job)
    window = job.window or endpoint.gravity.window_tokens
    pieces = cut(texts, base.tokenizer, window, wanted=job.max_tokens and -(-job.max_tokens // window))
    if not len(pieces):
        raise StreamTextMissing(f"{job.text} has no text file of more than {window} tokens")
    held_out = canary_windows(base.tokenizer, job.held_out, base.transformer.config.max_position_embeddings)[
        :FORGETTING_WINDOWS
    ]
    adapters = [Adapter(base.transformer, blocks, rule, 1) for rule in rules]
    losses, entropy = predict_and_learn(base, adapters, pieces, window, min(blocks))
    report = StreamReport(
        text=str(job.text),
        endpoint=job.endpoint,
        window=window,
        tokens=len(pieces) * window,
        files=len(pieces.files),
        rules=[
            RuleReport(
                name=adapter.rule.name,
                losses=losses[adapter.rule.name],
                held_out_loss=held_out_loss(base, blocks, adapter, held_out),
                drift=adapter.drift(),
                effective_rank=effective_rank(adapter),
                load_entropy=entropy[adapter.rule.name],
            )
            for adapter in adapters
        ],
    )
    if job.out is not None:
        job.out.mkdir(parents=True, exist_ok=True)
        (job.out / "stream.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
        draw(report, job.out / "stream.png")
    click.echo(json.dumps(asdict(report)) if as_json else markdown(report))


def some_blocks(endpoint: EndpointSettings, base: BaseModel) -> Mapping[int, SomeBlock]:
    """The endpoint's blocks."""
    folder = load_variant(endpoint, base)
    assert folder is not None, endpoint.variant
    return {
        layer: block.requires_grad_(False)
        for layer, block in folder.blocks.items()
        if isinstance(block, SomeBlock)
    }


def rules_of(endpoint: EndpointSettings, job: StreamJob) -> list[StreamRule]:
    """Frozen, the output bias as a baseline, and the rule that was asked for."""
    settings = (
        endpoint
        if job.rule is None
        else endpoint.model_copy(update={"gravity": endpoint.gravity.model_copy(update={"rule": job.rule})})
    )
    gravity = settings.gravity.config()
    blocks = read_variant(endpoint).config
    layers = plastic_layers_of(settings, blocks)
    rules = [
        FROZEN,
        StreamRule("output bias", bias_rate=BIAS_RATE),
        StreamRule(gravity.rule, gravity, layers),
    ]
    if job.value_rate:
        rules.append(
            StreamRule(f"{gravity.rule} + value offsets", gravity, layers, value_rate=job.value_rate)
        )
    return rules


def predict_and_learn(
    base: BaseModel, adapters: list[Adapter], pieces: Pieces, window: int, first_block: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Mean loss of every window under every rule, and the load entropy over all of them."""
    losses: dict[str, list[float]] = {adapter.rule.name: [] for adapter in adapters}
    most = min(MAX_FILE_TOKENS, base.transformer.config.max_position_embeddings) // window
    with tqdm(total=len(pieces) * window, unit="tok", unit_scale=True, desc="stream") as bar:
        for number in range(len(pieces.files)):
            tokens = torch.from_numpy(pieces.tokens[pieces.file_index == number][:most])
            entry = lower_states(base.transformer, tokens[:, :-1].reshape(1, -1), first_block)
            pasts = [UpperPast() for _ in adapters]
            for at in range(len(tokens)):
                rows = slice(at * window, (at + 1) * window)
                for adapter, past in zip(adapters, pasts, strict=True):
                    lost = adapter.window(entry[:, rows], tokens[at : at + 1, 1:], past)
                    losses[adapter.rule.name].append(float(lost.mean()))
                bar.update(window)
    return losses, {adapter.rule.name: load_entropy(adapter) for adapter in adapters}


def load_entropy(adapter: Adapter) -> float:
    """How even the load was, 1 = uniform: the mean over layers."""
    return float(
        np.mean([load_balance(counts.astype(np.float32)).entropy_ratio for counts in adapter.load.values()])
    )


def effective_rank(adapter: Adapter) -> float:
    """exp of the entropy of the keys' singular values, the mean over layers (Roy and Vetterli, 2007)."""
    ranks: list[float] = []
    for keys in adapter.keys_of(0).values():
        shares = torch.linalg.svdvals(keys)
        shares = shares / shares.sum()
        ranks.append(float(torch.special.entr(shares).sum().exp()))
    return float(np.mean(ranks))


def held_out_loss(
    base: BaseModel, blocks: Mapping[int, SomeBlock], adapter: Adapter, windows: Tensor
) -> float:
    """Loss on text that has nothing to do with the stream, under the keys that the rule ended with."""
    upper = PlasticPass(base.transformer, blocks, frozenset(blocks))
    losses = [
        upper.run(
            lower_states(base.transformer, row[None, :-1], min(blocks)), row[None, 1:], adapter.keys_of(0)
        ).losses
        for row in windows
    ]
    return float(torch.cat(losses).mean())
