"""From settings to engines: who shares a base, and what is refused before anything is served."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from keystore.records import ScopeId
from keystore.statistics import RoutingStats, TokenCredit, TokenTrace
from model.blocks import BLOCKS
from model.checkpoints.blocks import save_blocks
from model.checkpoints.load import BaseModel
from model.errors import CheckpointError
from server.build import build
from server.metrics import Metrics
from server.settings import load_settings


@pytest.fixture
def built(make_tiny, tokenizer, tmp_path, monkeypatch):
    """built(**endpoints): the parts for these endpoints, over tiny blocks in place of the shipped ones."""
    devices: list[str] = []

    def load_base(path, dtype, cache, device, progress):
        devices.append(device)
        return BaseModel(make_tiny(torch.float32, vocab_size=tokenizer.vocab_size).model, tokenizer)

    monkeypatch.setattr("server.build.find_base_file", lambda: Path("unused"))
    monkeypatch.setattr("server.build.load_base", load_base)
    monkeypatch.setattr("server.build.shipped_folder", lambda variant: tmp_path / "weights" / variant)
    for kind in BLOCKS:
        tiny = make_tiny(torch.float32, kind)
        save_blocks(tmp_path / "weights" / kind, tiny.blocks[1].config, tiny.blocks, torch.float32)
    opened = []

    def build_parts(**settings):
        parts = build(load_settings(None, data_dir=tmp_path / "data", **settings), Metrics().observers())
        opened.append(parts)
        return parts, devices

    yield build_parts
    for parts in opened:
        for store in parts.stores:
            store.close()


def test_five_endpoints_are_served_by_default_from_one_base(built):
    parts, devices = built()
    assert list(parts.registry.endpoints) == ["some", "moe", "mom", "fm-moe", "dense"]
    assert devices == ["cpu"]
    assert len(parts.registry.runners) == 1
    assert len({id(e.runner.engine.model) for e in parts.registry.endpoints.values()}) == 1
    plastic = [name for name, endpoint in parts.registry.endpoints.items() if endpoint.plasticity is not None]
    assert plastic == ["some"]
    assert [name for name, e in parts.registry.endpoints.items() if e.usage is None] == ["dense"]


def test_the_data_folder_is_there_durably(built, tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_ino), sync(fd)))
    built(endpoints={"dense": {"variant": "dense"}})
    assert (tmp_path / "data").is_dir()
    assert tmp_path.stat().st_ino in synced


def test_endpoints_on_two_devices_get_an_engine_and_a_base_each(built):
    endpoints = {
        "here": {"variant": "moe"},
        "there": {"variant": "some", "device": "cpu:0"},
        "also-here": {"variant": "dense", "device": "cpu"},
    }
    parts, devices = built(endpoints=endpoints)
    assert devices == ["cpu", "cpu:0"]
    assert len(parts.registry.runners) == 2
    served = parts.registry.endpoints
    assert list(served) == ["here", "there", "also-here"]
    assert served["here"].runner is served["also-here"].runner is not served["there"].runner
    assert set(served["there"].runner.engine.variants) == {"there"}


def test_one_variant_may_be_served_under_two_names_with_weights_of_its_own(built, tmp_path):
    folder = tmp_path / "weights" / "ffn"
    parts, _ = built(endpoints={"control": {"variant": "ffn", "weights": folder}, "b": {"variant": "moe"}})
    assert parts.registry.endpoints["control"].variant == "ffn"


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ({"variant": "moe", "device": "abacus"}, "'abacus' is no device"),
        ({"variant": "moe", "device": "cuda"}, "no CUDA device"),
    ],
)
def test_a_device_that_is_not_there_is_refused_by_name(built, monkeypatch, endpoint, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        built(endpoints={"a": endpoint})


def test_blocks_of_another_kind_are_refused(built, tmp_path):
    with pytest.raises(CheckpointError, match="kind 'mom', not 'moe'"):
        built(endpoints={"a": {"variant": "moe", "weights": tmp_path / "weights" / "mom"}})


def test_keys_are_guarded_unless_the_configuration_says_otherwise(built, tmp_path):
    endpoints = {"mine": {"variant": "some"}, "ours": {"variant": "some", "learn_scope": "global"}}
    parts, _ = built(endpoints=endpoints, guard={"min_overlap": 0.0, "max_loss_increase": 100.0})
    mine, ours = (parts.registry.get(name).plasticity for name in endpoints)
    assert str(mine.scope_of("acme")) == "tenant:acme"
    assert str(ours.scope_of("acme")) == "global"
    assert str(ours.scope_of("acme", "s")) == "session:acme/s"
    teach_globally(ours.store)
    assert ours.store.canary_readings()[ScopeId("global")].passed


def test_servers_that_share_a_store_learn_the_global_scope_themselves(built, redis_server):
    shared = {"backend": "redis", "url": redis_server.url}
    parts, _ = built(
        endpoints={"ours": {"variant": "some", "learn_scope": "global"}},
        key_store=shared,
        guard={"min_overlap": 0.0, "max_loss_increase": 100.0},
    )
    plasticity = parts.registry.get("ours").plasticity
    plasticity.background.start()
    try:
        teach_globally(plasticity.store)
        assert plasticity.store.view(ScopeId("global")).version == 1
        assert plasticity.store.canary_readings()[ScopeId("global")].passed
    finally:
        plasticity.background.stop()


def test_a_guard_that_is_off_reads_no_canary(built, tmp_path):
    guard = {"enabled": False, "canary_file": tmp_path / "no.txt"}
    parts, _ = built(endpoints={"ours": {"variant": "some", "learn_scope": "global"}}, guard=guard)
    teach_globally(parts.stores[0])
    assert parts.stores[0].view(ScopeId("global")).version == 1
    assert parts.stores[0].canary_readings() == {}


@pytest.mark.parametrize(("content", "error"), [(None, FileNotFoundError), ("too short", ValueError)])
def test_a_canary_file_is_checked_at_the_start(built, tmp_path, content, error):
    if content is not None:
        (tmp_path / "canary.txt").write_text(content)
    with pytest.raises(error, match=r"canary\.txt"):
        built(guard={"canary_file": tmp_path / "canary.txt"})


def teach_globally(store):
    rng = np.random.default_rng(0)
    credit = TokenCredit(rng.integers(0, 8, (32, 2)), np.ones((32, 2), np.float32))
    trace = TokenTrace(credit.expert_ids, rng.standard_normal((32, 16), dtype=np.float32), 8, credit)
    assert store.submit(RoutingStats.from_tokens(ScopeId("global"), {2: trace}))
    assert store.consolidate_once()


def test_value_offsets_are_offered_where_the_configuration_says_so(built):
    endpoints = {
        "with": {"variant": "some", "value_offsets": {"enabled": True}},
        "without": {"variant": "some"},
    }
    parts, _ = built(endpoints=endpoints)
    offered = {name: parts.registry.get(name).plasticity.value_offsets for name in endpoints}
    assert offered["with"].held() == (0, 0)
    assert offered["without"] is None
