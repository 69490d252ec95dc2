"""The sweeps of bench/scale.py on a tiny model."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))  # its files are scripts and import each other

from scale_report import Sweep, draw, table
from scale_steps import RandomExperts, anchor_view, full_caches, reading_speed, scope_view, writing_speed
from scale_sweeps import Sizes, over_contexts, over_experts, over_scopes, over_streams, sweep

from keystore.records import GravityConfig
from model.transformer import Segment

SIZES = Sizes(streams=(1, 3), contexts=(32, 64), experts=(4, 16), scopes=(1, 4), steps=2, short_steps=2)


def is_complete(made: Sweep, columns: tuple[int, ...]) -> bool:
    rates = [rate for row in made.rates.values() for rate in row]
    return len(rates) == len(columns) * len(made.rates) and all(np.isfinite(rates)) and min(rates) > 0


def test_sweeps_on_a_tiny_model_have_a_rate_for_every_size(tiny):
    contexts = over_contexts(tiny.model, {"some": tiny.variant}, SIZES, 1)
    assert list(contexts.rates) == [
        "dense, 1 stream", "dense, 8 streams", "dense, prompt", "some, 1 stream", "some, 8 streams", "some, prompt",
    ]  # fmt: skip
    assert is_complete(contexts, SIZES.contexts)
    scopes = over_scopes(tiny.model, tiny.variant, SIZES, 1)
    assert list(scopes.rates) == ["tenant by tenant", "tenants in turns"]
    assert is_complete(scopes, SIZES.scopes)


def test_the_expert_sweep_fits_the_model_that_it_is_given(make_tiny: Callable, tiny_variants):
    tiny = make_tiny(torch.float32, max_position_embeddings=512)
    experts = over_experts(tiny.model, tiny_variants["some"], SIZES, 1)
    assert list(experts.rates) == ["1 stream", "8 streams", "prompt of 256"]
    assert is_complete(experts, SIZES.experts)


def test_writing_and_reading_reach_the_context_and_no_further(tiny, monkeypatch: pytest.MonkeyPatch):
    steps: list[list[Segment]] = []
    step = tiny.model.step
    monkeypatch.setattr(
        type(tiny.model), "step", lambda model, segments: (steps.append(segments), step(segments))[1]
    )
    caches = full_caches(tiny.model, 2, 64)
    view = anchor_view({layer: block.anchors.numpy() for layer, block in tiny.blocks.items()})
    writing_speed(tiny.model, caches, 64, 3, tiny.variant, [view, view])
    assert [[segment.start for segment in each] for each in steps] == [[61, 61], [62, 62], [63, 63]]
    assert all(segment.decode for each in steps for segment in each)
    steps.clear()
    reading_speed(tiny.model, caches[0], 64, 48)
    assert [(each[0].start, len(each[0].token_ids)) for each in steps] == [(0, 48), (48, 16)]
    assert not any(segment.decode for each in steps for segment in each)


def test_full_caches_are_full_and_alike(tiny):
    first, second = full_caches(tiny.model, 2, 64)
    assert first.keys.abs().amin() > 0
    assert torch.equal(first.keys, second.keys)
    assert torch.equal(first.values, second.values)


def test_scopes_have_keys_of_their_own_within_the_trust_radius(tiny):
    origin = anchor_view({layer: block.anchors.numpy() for layer, block in tiny.blocks.items()})
    first, second = scope_view(origin, 0), scope_view(origin, 1)
    for layer, anchors in origin.keys.items():
        moved = np.linalg.norm(first.keys_of(layer) - anchors, axis=1) / np.linalg.norm(anchors, axis=1)
        np.testing.assert_allclose(moved, 0.9 * GravityConfig().trust_radius, rtol=1e-5)
        assert (first.keys_of(layer) != second.keys_of(layer)).any(axis=1).all()


def test_more_random_experts_leave_the_first_ones_as_they_are(tiny, tiny_variants):
    experts = RandomExperts(tiny_variants["some"], 16)
    few, few_keys = experts.first(4)
    many, many_keys = experts.first(16)
    for layer in few.blocks:
        assert few.blocks[layer].experts.num_experts == 4
        assert many.blocks[layer].experts.up_proj.abs().amin() > 0, "untouched memory would be read too fast"
        assert torch.equal(few.blocks[layer].experts.up_proj, many.blocks[layer].experts.up_proj[:4])
        np.testing.assert_array_equal(few_keys.keys_of(layer), many_keys.keys_of(layer)[:4])
    assert (few_keys.keys_of(1) != few_keys.keys_of(2)).all()


def test_streams_are_answered_together_and_no_prompt_comes_twice():
    asked: list[list[list[int]]] = []

    def generate(prompts: list[list[int]], mode: str) -> float:
        asked.append(prompts)
        return 2.0

    made = over_streams(generate, SIZES, 2, ("dense",))
    assert [len(prompts) for prompts in asked] == [1, 1, 3, 1, 3]
    prompts = [tuple(prompt) for each in asked for prompt in each]
    assert len(set(prompts)) == len(prompts)
    assert made.rates == {"dense": [16.0, 48.0]}


def test_a_sweep_takes_turns_and_the_median_of_its_rounds(capsys: pytest.CaptureFixture[str]):
    calls: list[tuple[str, int]] = []
    answers = iter([0.0, 0.0, 1.0, 10.0, 2.0, 20.0, 9.0, 90.0, 9.0, 90.0, 3.0, 30.0, 4.0, 40.0])

    def row(name: str) -> Callable[[int], float]:
        return lambda size: (calls.append((name, size)), next(answers))[1]

    made = sweep("Title", "size", (1, 2), {"a": row("a"), "b": row("b")}, 3)
    assert calls == [("a", 1), ("b", 1), *[("a", 1), ("b", 1), ("a", 2), ("b", 2)] * 3]
    assert made.rates == {"a": [3.0, 4.0], "b": [30.0, 40.0]}
    assert "round 3 of 3" in capsys.readouterr().err


def test_the_table_has_ratios_to_the_first_column_and_the_picture_is_drawn(tmp_path: Path):
    made = Sweep("Streams", "streams", (1, 1024), {"dense": [50.0, 1234.0]})
    assert table(made).splitlines() == [
        "**Streams**",
        "",
        "| tok/s by streams | 1 | 1,024 |",
        "|---|---|---|",
        "| dense | 50.0 | 1,234 (24.68x) |",
    ]
    draw([made, made, made], "a machine", tmp_path / "scale.png")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
