"""`libration keys` on the files of a data folder, with the anchors of tiny blocks."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from keystore.backends.embedded import EmbeddedBackend
from keystore.records import ScopeId
from keystore.statistics import RoutingStats, TokenCredit, TokenTrace
from model.checkpoints.blocks import save_blocks
from server.build import plastic_layers_of, read_variant
from server.cli import main
from server.key_stores import open_key_store
from server.offline_keys import file_of
from server.settings import load_settings

TENANT, SESSION = ScopeId("tenant", "default"), ScopeId("session", "default", "chat/1")


def keys(folder: Path, *arguments: object) -> Result:
    return CliRunner().invoke(main, ["keys", "--data-dir", str(folder), *map(str, arguments)])


@pytest.fixture(autouse=True)
def configured(tmp_path_factory, monkeypatch, make_tiny) -> None:
    """Every command of this file sees an endpoint with tiny blocks, and one without routing keys."""
    weights, tiny = tmp_path_factory.mktemp("weights"), make_tiny(torch.float32)
    save_blocks(weights, tiny.blocks[1].config, tiny.blocks, torch.float32)
    endpoints = {"some": {"variant": "some", "weights": str(weights)}, "dense": {"variant": "dense"}}
    monkeypatch.setenv("LIBRATION_ENDPOINTS", json.dumps(endpoints))


def printed(folder: Path, *arguments: object):
    result = keys(folder, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def learn(store, scope: ScopeId, seed: int) -> None:
    rng = np.random.default_rng(seed)
    traces = {}
    for layer in store.view(scope).usage:
        experts, dim = store.view(scope).keys_of(layer).shape
        queries = rng.standard_normal((8, dim), dtype=np.float32)
        ids = rng.integers(0, experts, (8, 2))
        traces[layer] = TokenTrace(ids, queries, experts, TokenCredit(ids, np.ones((8, 2), np.float32)))
    assert store.submit(RoutingStats.from_tokens(scope, traces))
    assert store.consolidate_once()


@pytest.fixture
def open_store(tmp_path):
    def opened():
        settings = load_settings(None, data_dir=tmp_path)
        folder = read_variant(settings.endpoints["some"])
        layers = plastic_layers_of(settings.endpoints["some"], folder.config)
        return open_key_store("some", settings, folder, layers, EmbeddedBackend(file_of(settings, "some")))

    return opened


@pytest.fixture
def checksums(open_store) -> dict[int, str]:
    """Two versions of the tenant and one of a session; the tenant's checksums by version."""
    store = open_store()
    learn(store, TENANT, 1)
    learn(store, TENANT, 2)
    learn(store, SESSION, 3)
    found = {version: store.view(TENANT, version).checksum for version in range(3)}
    store.close()
    return found


def test_scopes_and_versions_are_listed(tmp_path, checksums) -> None:
    rows = printed(tmp_path, "list")
    assert [(row["endpoint"], row["scope"], row["version"], row["frozen"]) for row in rows] == [
        ("some", "session:default/chat/1", 3, False),
        ("some", "tenant:default", 2, False),
    ]
    assert [row["checksum"] for row in printed(tmp_path, "versions", "some")] == [checksums[2], checksums[1]]
    table = keys(tmp_path, "versions", "some").output.splitlines()
    assert table[0].split() == ["version", "parent", "created_at", "tokens", "drift_max", "reason"]
    assert "learned from 8 tokens" in table[1]
    assert "tenant:default" in keys(tmp_path, "list").output


def test_a_version_is_shown_layer_by_layer(tmp_path, checksums) -> None:
    shown = printed(tmp_path, "show", "some", "--version", 1)
    assert (shown["version"], shown["checksum"], shown["tokens"]) == (1, checksums[1], 8)
    moved = {row["layer"]: (row["plastic"], row["moved"] > 0) for row in shown["layers"]}
    assert moved == {1: (False, False), 2: (True, True)}
    assert checksums[2] in keys(tmp_path, "show", "some").output


def test_freezing_is_kept_for_the_server(tmp_path, checksums, open_store) -> None:
    assert printed(tmp_path, "freeze", "some", "--scope", "tenant:default")["frozen"] is True
    assert [row["frozen"] for row in printed(tmp_path, "list")] == [True, True], "its sessions too"
    store = open_store()
    assert store.is_frozen(TENANT)
    assert not store.is_frozen()
    assert store.verify_audit() == 4
    store.close()
    assert "no longer frozen" in keys(tmp_path, "unfreeze", "some", "--scope", "tenant:default").output
    keys(tmp_path, "freeze", "some")
    assert all(row["frozen"] for row in printed(tmp_path, "list"))


def test_a_rollback_is_a_new_version(tmp_path, checksums) -> None:
    assert printed(tmp_path, "rollback", "some", 1, "--if-version", 2)["version"] == 3
    assert printed(tmp_path, "show", "some")["checksum"] == checksums[1]
    refused = keys(tmp_path, "rollback", "some", 0, "--if-version", 2)
    assert (refused.exit_code, "at version 3, not 2" in refused.output) == (1, True)


def test_an_export_is_imported_elsewhere(tmp_path, checksums) -> None:
    file, other = tmp_path / "keys.safetensors", tmp_path / "other"
    assert printed(tmp_path, "export", "some", file, "--version", 1)["checksum"] == checksums[1]
    again = keys(tmp_path, "export", "some", file)
    assert (again.exit_code, "exists already" in again.output) == (1, True)
    assert printed(other, "import", "some", file, "--scope", "tenant:acme")["version"] == 1
    assert printed(other, "show", "some", "--scope", "tenant:acme")["checksum"] == checksums[1]
    refused = keys(tmp_path, "import", "some", file, "--if-version", 1)
    assert (refused.exit_code, "at version 2, not 1" in refused.output) == (1, True)
    file.write_bytes(file.read_bytes()[:-1])
    broken = keys(tmp_path, "import", "some", file)
    assert (broken.exit_code, "keys.safetensors: " in broken.output) == (1, True)


@pytest.mark.parametrize(
    "command", [["list"], ["versions", "some"], ["freeze", "some"], ["rollback", "some", "0"]]
)
def test_a_running_server_is_named(tmp_path, checksums, open_store, command) -> None:
    store = open_store()
    result = keys(tmp_path, *command)
    store.close()
    assert result.exit_code == 1
    assert "a running server holds these keys" in result.output
    assert "/admin/keys/some" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["versions", "dense"], "endpoints that have: some"),
        (["versions", "some"], "learned nothing yet"),
        (["show", "some"], "learned nothing yet"),
        (["import", "some", "nothing.safetensors"], "No such file"),
        (["versions", "some", "--scope", "everyone"], "allowed"),
        (["versions", "some", "--scope", "anchor"], "the anchors never change"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, arguments, message) -> None:
    result = keys(tmp_path, *arguments)
    assert result.exit_code != 0
    assert message in result.output
    assert not isinstance(result.exception, ValueError | OSError)


def test_nothing_learned_lists_nothing_and_makes_no_file(tmp_path) -> None:
    assert printed(tmp_path, "list") == []
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_starts_without_torch_and_faiss() -> None:
    program = "import sys, server.cli; sys.exit(bool({'torch', 'faiss'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("name", ["global", "session:default/chat/1"])
def test_every_kind_of_scope_is_changed_alike(tmp_path, open_store, name) -> None:
    scope, file = ScopeId.parse(name), tmp_path / "keys.safetensors"
    store = open_store()
    learn(store, scope, 1)
    checksum = store.view(scope).checksum
    store.close()
    of = ("--scope", name)
    assert printed(tmp_path, "show", "some", *of)["checksum"] == checksum
    assert printed(tmp_path, "export", "some", file, *of)["version"] == 1
    assert printed(tmp_path, "rollback", "some", 0, *of, "--if-version", 1)["version"] == 2
    assert printed(tmp_path, "import", "some", file, *of)["version"] == 3
    assert printed(tmp_path, "show", "some", *of)["checksum"] == checksum
    assert [row["version"] for row in printed(tmp_path, "versions", "some", *of)] == [3, 2, 1]
    assert printed(tmp_path, "freeze", "some", *of)["frozen"] is True
    store = open_store()
    assert store.is_frozen(scope)
    assert not store.is_frozen(TENANT)
    assert store.verify_audit() == 4
    store.close()
    trail = printed(tmp_path, "audit", "some", *of)
    assert trail["verified"] == 4
    assert [event["event"] for event in trail["events"]] == ["freeze", "commit", "commit", "commit"]
    assert trail["events"][2]["reason"] == "rollback to 0"
    table = keys(tmp_path, "audit", "some").output.splitlines()
    assert table[0] == "4 events, the hash chain is whole"
    assert table[2].split()[3:] == ["freeze", name]
    printed(tmp_path, "unfreeze", "some", *of)
    assert printed(tmp_path, "list") == [{**printed(tmp_path, "list")[0], "scope": name, "frozen": False}]


@pytest.fixture
def expert_file(tmp_path) -> Path:
    file = tmp_path / "legal.safetensors"
    shapes = {"down_proj": (2, 8, 32), "up_proj": (2, 32, 8)}
    save_file({f"layers.2.experts.{name}": torch.ones(shape) for name, shape in shapes.items()}, file)
    return file


def test_experts_are_added_promoted_and_retired_on_the_files(tmp_path, expert_file) -> None:
    added = printed(tmp_path, "experts", "add", "some", expert_file, "legal", "--scope", "tenant:acme")
    assert (added["state"], added["scope"], added["expert_ids"]) == ("settling", "tenant:acme", {"2": [8, 9]})
    (kept,) = (tmp_path / "experts-some").iterdir()
    assert kept.name == f"{added['digest']}.safetensors"
    assert kept.read_bytes() == expert_file.read_bytes()
    (row,) = printed(tmp_path, "experts", "list", "some")
    assert (row["name"], row["state"], row["drift"]) == ("legal", "settling", {"2": [0, 0]})
    table = keys(tmp_path, "experts", "list", "some").output
    assert "layer 2: 8, 9" in table
    assert printed(tmp_path, "experts", "promote", "some", "legal")["state"] == "promoted"
    assert "nobody sees it" in keys(tmp_path, "experts", "retire", "some", "legal").output
    again = keys(tmp_path, "experts", "retire", "some", "legal")
    assert (again.exit_code, "is retired" in again.output) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["add", "some", "nothing.safetensors", "legal"], "No such file"),
        (["add", "dense", "nothing.safetensors", "legal"], "endpoints that have: some"),
        (["list", "some"], "learned nothing yet"),
        (["promote", "some", "legal"], "learned nothing yet"),
    ],
)
def test_experts_that_cannot_be_had_are_told(tmp_path, arguments, message) -> None:
    result = keys(tmp_path, "experts", *arguments)
    assert result.exit_code == 1
    assert message in result.output


def test_an_unknown_group_and_a_file_that_does_not_fit_are_named(tmp_path, expert_file, checksums) -> None:
    assert "no expert group 'nobody'" in keys(tmp_path, "experts", "promote", "some", "nobody").output
    expert_file.write_bytes(expert_file.read_bytes()[:-1])
    assert "legal.safetensors" in keys(tmp_path, "experts", "add", "some", expert_file, "legal").output
    assert printed(tmp_path, "experts", "list", "some") == []
