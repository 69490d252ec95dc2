"""Useful experts are added without addresses: prompts show where they help, and nobody else sees a bit of it."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from keystore.records import GravityConfig
from model.blocks.base import RoutingTrace
from server.auth import ApiKey, ApiKeys

ALICE, BOB, ROOT = ({"Authorization": f"Bearer {name}-key"} for name in ("alice", "bob", "root"))
LINE = "the tide turns at noon; "
TEXT = LINE * 8
LAYER, ADDED, HIDDEN, INNER = 2, 2, 32, 8
GRAVITY = GravityConfig(rule="gradient", window_tokens=64, settling_warmup_tokens=64)


def useful_experts(tiny, token_ids):
    """Experts (silu) that predict this text's next tokens from the last layer, in place of what is there now."""
    trace = RoutingTrace(frozenset({LAYER}))
    segment = tiny.segment(token_ids)
    segment.trace = trace
    hidden = tiny.model.step([segment])[:-1].clone()
    normed = trace.by_layer[LAYER].normed[:-1].clone()
    block = tiny.blocks[LAYER]
    without = hidden - block.mix(normed[None], block.anchors).combined[0]
    generator = torch.Generator().manual_seed(3)
    down = torch.randn(ADDED, INNER, HIDDEN, generator=generator) * HIDDEN**-0.5
    up = torch.zeros(ADDED, HIDDEN, INNER)
    optimizer = torch.optim.Adam([down.requires_grad_(), up.requires_grad_()], lr=0.05)
    targets = torch.tensor(token_ids[1:])
    for _ in range(60):
        outputs = torch.nn.functional.silu(normed @ down.transpose(1, 2)) @ up.transpose(1, 2)  # (n, T, H)
        rows = torch.nn.functional.rms_norm(without + outputs, (HIDDEN,), tiny.model.final_norm, 1e-5)
        logits = rows @ tiny.model.embedding.T
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.repeat(ADDED))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    names = {"down_proj": down, "up_proj": up}
    return {f"layers.{LAYER}.experts.{name}": matrix.detach() for name, matrix in names.items()}


@pytest.fixture
def served(serve, make_tiny, tokenizer, tmp_path):
    """A server for two tenants and an admin, with a file of two experts for TEXT in its folder."""
    tiny = make_tiny(torch.float32, vocab_size=tokenizer.vocab_size)
    (tmp_path / "experts").mkdir()
    save_file(useful_experts(tiny, tokenizer.encode(LINE * 4)), tmp_path / "experts" / "tide.safetensors")
    keys = [("alice", "user"), ("bob", "user"), ("root", "admin")]
    api_keys = ApiKeys([ApiKey.of(f"{name}-key", name, level) for name, level in keys])
    with serve(tmp_path, gravity=GRAVITY, api_keys=api_keys) as running:
        yield running


def scores(served, who):
    body = {"model": "some", "prompt": TEXT, "max_tokens": 0, "echo": True, "logprobs": 0}
    response = served.post("/v1/completions", body, headers=who)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["logprobs"]["token_logprobs"][1:]


def test_added_experts_are_found_by_the_prompts_they_are_good_for(served):
    bob = scores(served, BOB)
    body = {"file": "tide.safetensors", "name": "tide", "scope": "tenant:alice", "seed": 1}
    response = served.post("/admin/experts/some", body, headers=ROOT)
    assert response.status_code == 200, response.text
    added = np.mean(scores(served, ALICE))
    assert scores(served, BOB) == bob
    for _ in range(3):
        prompt = {"model": "some", "prompt": TEXT, "max_tokens": 1, "plasticity": "learn"}
        assert served.post("/v1/completions", prompt, headers=ALICE).status_code == 200
        assert served.post("/admin/keys/some/consolidate", headers=ROOT).json()["published"]
        assert scores(served, BOB) == bob
    (group,) = served.get("/admin/experts/some", headers=ROOT).json()["data"]
    settling = group["settling"][str(LAYER)]
    assert min(settling["drift"]) > 0
    assert min(settling["credited_tokens"]) > 0
    assert np.mean(scores(served, ALICE)) > added + 1
    assert scores(served, BOB) == bob
