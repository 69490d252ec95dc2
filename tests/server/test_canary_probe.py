"""The probe measures what requests would: the serving path on the same text gives the same loss and routing."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from keystore.canary import routing_overlap
from model.keys import AnchorKeys
from server.canary_probe import CanaryProbe

WINDOWS = torch.from_numpy(np.random.default_rng(0).integers(0, 97, (3, 65)))


def served(tiny, keys, plastic_layers):
    """Loss and routing by `Transformer.step`, layers by layer."""
    losses, selected = [], {layer: [] for layer in plastic_layers}
    for window in WINDOWS.tolist():
        routed = []
        segment = replace(tiny.segment(window[:-1]), keys=keys, routed=routed)
        logits = tiny.model.logits(tiny.model.step([segment]))
        losses.append(F.cross_entropy(logits, torch.tensor(window[1:])).item())
        for layer, expert_ids in zip(tiny.blocks, routed, strict=True):
            if layer in selected:
                selected[layer].append(expert_ids)
    return np.mean(losses), {layer: np.concatenate(ids) for layer, ids in selected.items()}


def moved(tiny, layers):
    rng = np.random.default_rng(1)
    keys = {layer: block.get_parameter("anchors").numpy() for layer, block in tiny.blocks.items()}
    return AnchorKeys(
        {
            layer: rows + 0.3 * rng.standard_normal(rows.shape, dtype=np.float32) if layer in layers else rows
            for layer, rows in keys.items()
        }
    )


@pytest.mark.parametrize("plastic_layers", [[2], [1, 2]])
def test_a_probe_measures_what_requests_would(tiny, plastic_layers):
    probe = CanaryProbe(tiny.model, tiny.blocks, plastic_layers, WINDOWS)
    runs = []
    for keys in (tiny.keys, moved(tiny, plastic_layers)):
        loss, selected = served(tiny, keys, plastic_layers)
        runs.append(probe.run(keys))
        assert runs[-1].loss_nats == pytest.approx(loss, abs=5e-3)  # kept states are bfloat16
        assert routing_overlap(runs[-1].expert_ids, selected) > 0.98
    assert abs(runs[1].loss_nats - runs[0].loss_nats) > 1e-2, "the keys in force matter"
    assert routing_overlap(runs[1].expert_ids, runs[0].expert_ids) < 0.9


def test_lower_layers_run_at_the_first_probe_only(tiny, monkeypatch):
    probe = CanaryProbe(tiny.model, tiny.blocks, [2], WINDOWS)
    layers = []
    layer = tiny.model.layer
    monkeypatch.setattr(tiny.model, "layer", lambda *given: layers.append(given[1]) or layer(*given))
    first = probe.run(tiny.keys)
    assert len(layers) == len(WINDOWS) * 3
    layers.clear()
    assert probe.run(tiny.keys).loss_nats == first.loss_nats
    assert layers == [], "the highest layer's block is the only thing left"


def test_a_probe_leaves_usage_and_threads_as_they_are(tiny):
    before, threads = tiny.variant.usage.counts.copy(), torch.get_num_threads()
    CanaryProbe(tiny.model, tiny.blocks, [2], WINDOWS).run(tiny.keys)
    assert (tiny.variant.usage.counts == before).all()
    assert torch.get_num_threads() == threads
