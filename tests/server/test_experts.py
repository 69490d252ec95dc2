"""Experts added over HTTP while a tiny server answers: who sees them, who does not, and what outlives a restart."""

import asyncio
import base64
import io
import json

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from keystore.records import GravityConfig, ScopeId
from model.errors import CheckpointError
from server.auth import ApiKey, ApiKeys

ALICE, BOB, ROOT = ({"Authorization": f"Bearer {name}-key"} for name in ("alice", "bob", "root"))
SIZES = {"down_proj": (3, 8, 32), "up_proj": (3, 32, 8)}
SETTLING = GravityConfig(window_tokens=64, credit_candidates=0, settling_warmup_tokens=0)
TEXT = "what is taught here stays here. " * 5
BODY = {
    "model": "some",
    "prompt": "abc",
    "max_tokens": 24,
    "temperature": 0,
    "ignore_eos": True,
    "plasticity": "read",
}


def make_file(folder, name="new.safetensors", layer=2, dtype=torch.float32, **changes):
    """Three loud experts for layer 2: whoever is routed to them answers otherwise."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        f"layers.{layer}.experts.{part}": torch.randn(shape, generator=generator).to(dtype) * 3
        for part, shape in SIZES.items()
    }
    for tensor, value in changes.items():
        tensors[tensor.replace("__", ".")] = value
    folder.mkdir(exist_ok=True)
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / name)


@pytest.fixture
def start(serve, tmp_path):
    """start(**options): a server for two tenants and an admin, on one data folder."""
    api_keys = ApiKeys(
        [
            ApiKey.of("alice-key", "alice", "user"),
            ApiKey.of("bob-key", "bob", "user"),
            ApiKey.of("root-key", "ops", "admin"),
        ]
    )
    make_file(tmp_path / "experts")
    return lambda **options: serve(tmp_path, api_keys=api_keys, **options)


@pytest.fixture
def served(start):
    with start() as running:
        yield running


def add(served, **fields):
    body = {"file": "new.safetensors", "name": "legal", "scope": "tenant:alice", "seed": 1} | fields
    return served.post("/admin/experts/some", body, headers=ROOT)


def answer(served, who, **fields):
    response = served.post("/v1/completions", BODY | {"logprobs": 2} | fields, headers=who)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def loud_keys(served):
    """Addresses that every token of `answer` finds: far out in the directions of the best keys."""
    return torch.from_numpy(served.store.view(ScopeId("anchor")).keys_of(2)[:3].copy()) * 20


def add_loud(served, tmp_path, **fields):
    make_file(tmp_path / "experts", layers__2__keys=loud_keys(served))
    response = add(served, **fields)
    assert response.status_code == 200, response.text
    return response.json()


def groups(served):
    return served.get("/admin/experts/some", headers=ROOT).json()["data"]


def test_added_experts_are_seen_by_their_scope_alone(served, tmp_path):
    before = {who["Authorization"]: answer(served, who) for who in (ALICE, BOB, ROOT)}
    added = add_loud(served, tmp_path)
    assert (added["endpoint"], added["name"], added["scope"], added["state"]) == (
        "some", "legal", "tenant:alice", "settling",
    )  # fmt: skip
    assert added["expert_ids"] == {"2": [8, 9, 10]}
    assert answer(served, ALICE) != before[ALICE["Authorization"]]
    assert answer(served, ALICE, session_id="s") != before[ALICE["Authorization"]]
    for who in (BOB, ROOT):
        assert answer(served, who) == before[who["Authorization"]]
    assert answer(served, ALICE, plasticity="off") == before[ALICE["Authorization"]]


def test_two_tenants_in_one_batch_keep_their_bits(served, tmp_path):
    bob = answer(served, BOB)
    add_loud(served, tmp_path)
    alice = answer(served, ALICE)

    async def both():
        async with served.client() as client:
            asked = [
                client.post("/v1/completions", json=BODY | {"logprobs": 2}, headers=who)
                for who in (ALICE, BOB)
            ]
            return [response.json()["choices"] for response in await asyncio.gather(*asked)]

    assert asyncio.run(both()) == [alice, bob]


def test_a_stream_that_runs_while_experts_are_added_goes_on_as_it_would(served, tmp_path, listening):
    body = BODY | {"max_tokens": 300, "stream": True}
    alone = answer(served, ALICE, max_tokens=300)[0]["text"]
    make_file(tmp_path / "experts", layers__2__keys=loud_keys(served))
    texts, added = [], None

    with (
        listening(served.app) as url,
        httpx.Client(base_url=url, timeout=60) as client,
        client.stream("POST", "/v1/completions", json=body, headers=ALICE) as response,
    ):
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            texts.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
            if added is None:
                assert served.runner.running(), "the stream has not ended"
                added = add(served)
    assert added is not None
    assert added.status_code == 200, added.text
    assert "".join(texts) == alone
    assert answer(served, ALICE, max_tokens=300)[0]["text"] != alone


def test_a_restart_finds_the_experts_again(start, tmp_path):
    with start() as served:
        add_loud(served, tmp_path)
        alice, bob = answer(served, ALICE), answer(served, BOB)
        told = groups(served)
    (tmp_path / "experts" / "new.safetensors").unlink()
    with start() as served:
        assert (answer(served, ALICE), answer(served, BOB)) == (alice, bob)
        assert groups(served) == told


@pytest.mark.parametrize("harm", ["lost", "another"])
def test_a_kept_file_that_is_not_there_stops_the_start_and_is_named(start, tmp_path, harm):
    with start() as served:
        add(served)
    (kept,) = (tmp_path / "experts-some").iterdir()
    if harm == "lost":
        kept.unlink()
    else:
        make_file(kept.parent, kept.name, layers__2__keys=torch.ones(3, 16))
    with pytest.raises(CheckpointError, match=rf"'legal'.*{kept.name}"), start():
        pass


def test_a_retired_group_needs_no_file_and_later_ids_count_on(start, tmp_path):
    with start() as served:
        before = answer(served, ALICE)
        add_loud(served, tmp_path)
        assert (
            served.request("DELETE", "/admin/experts/some/legal", headers=ROOT).json()["state"] == "retired"
        )
        assert answer(served, ALICE) == before
    for kept in (tmp_path / "experts-some").iterdir():
        kept.unlink()
    with start() as served:
        assert answer(served, ALICE) == before
        assert add_loud(served, tmp_path, name="again")["expert_ids"] == {"2": [11, 12, 13]}
        assert answer(served, ALICE) != before


def test_promoted_experts_are_seen_by_everybody_and_keep_their_radius(served, tmp_path):
    before = answer(served, BOB)
    add_loud(served, tmp_path)
    alice = answer(served, ALICE)
    shown = served.post("/admin/experts/some/legal/promote", headers=ROOT).json()
    assert (shown["state"], shown["settling"]) == ("promoted", None)
    assert answer(served, BOB) == answer(served, ALICE) == alice != before
    layer = served.get("/v1/keys/some/layers/2", headers=BOB).json()
    assert layer["num_experts"] == 11
    assert all(row["drift_of_radius"] is not None for row in layer["experts"])


def test_settling_is_visible_and_only_the_new_experts_move(serve, tmp_path):
    make_file(tmp_path / "experts")
    with serve(tmp_path, gravity=SETTLING) as served:
        body = {"file": "new.safetensors", "name": "legal"}
        assert served.post("/admin/experts/some", body).json()["scope"] == "tenant:default"
        (still,) = groups(served)
        assert still["settling"]["2"]["drift"] == [0, 0, 0]
        before = served.store.view(ScopeId("tenant", "default")).keys_of(2)
        served.post(
            "/v1/completions", {"model": "some", "prompt": TEXT * 4, "max_tokens": 1, "plasticity": "learn"}
        )
        assert served.post("/admin/keys/some/consolidate").json()["published"]
        after = served.store.view(ScopeId("tenant", "default")).keys_of(2)
        assert np.array_equal(after[:8], before[:8])
        assert not np.array_equal(after[8:], before[8:])
        settling = groups(served)[0]["settling"]["2"]
        assert max(settling["drift"]) > 0
        assert max(settling["window_drift"]) > 0
        assert max(settling["credited_tokens"]) > 0
        assert all(0 <= share <= 1 for share in settling["share"])
        shown = served.get("/v1/keys/some").json()
        assert shown["drift"]["max"] == 0, "those that settle have no radius"
        assert shown["layers"][1]["num_experts"] == 11


def test_teaching_goes_on_when_a_group_is_retired_or_promoted(serve, tmp_path):
    make_file(tmp_path / "experts")
    teach = {"model": "some", "prompt": TEXT, "max_tokens": 1, "plasticity": "learn"}
    with serve(tmp_path, gravity=SETTLING) as served:
        for name, path, method in (("a", "/a", "DELETE"), ("b", "/b/promote", "POST")):
            assert (
                served.post("/admin/experts/some", {"file": "new.safetensors", "name": name}).status_code
                == 200
            )
            served.post("/v1/completions", teach)  # leaves a window that is not full
            served.request(method, f"/admin/experts/some{path}")
            served.post("/v1/completions", teach)
            assert served.post("/admin/keys/some/consolidate").json()["published"]
        assert served.engine.counters.lessons_failed == 0
        assert served.store.counters().updates["rejected"] == 0


def test_hidden_experts_are_nowhere_to_be_seen_by_others(served, tmp_path):
    add_loud(served, tmp_path)
    layer = "/v1/keys/some/layers/2"
    for who, experts in ((ALICE, 11), (BOB, 8)):
        shown = served.get(layer, headers=who, params={"sort": "distance"}).json()
        assert (shown["num_experts"], len(shown["experts"])) == (experts, experts)
        assert all(row["nearest"]["expert"] < experts for row in shown["experts"])
        picture = served.get(f"{layer}/projection", headers=who).json()
        assert len(picture["keys"]) == len(picture["anchors"]) == len(picture["expert_ids"]) == experts
        assert served.get(f"{layer}/experts/9", headers=who).status_code == (200 if experts > 9 else 404)
        assert served.post(f"{layer}/search", {"text": "ab", "k": 9}, headers=who).status_code == (
            200 if experts > 9 else 400
        )
    assert served.get("/metrics", headers=ROOT).status_code == 200
    usage = served.get("/v1/keys/some/usage", headers=ROOT).json()
    assert np.array(usage["counts"]).shape == (2, 2, 11)


def test_how_busy_hidden_experts_are_is_told_to_nobody_else(served, tmp_path):
    add_loud(served, tmp_path)
    answer(served, ALICE)
    alice, bob, root = (
        np.array(served.get("/v1/keys/some/usage", headers=who).json()["counts"])
        for who in (ALICE, BOB, ROOT)
    )
    assert root[:, 1, 8:].any()
    assert np.array_equal(alice, root)
    assert not bob[:, 1, 8:].any()
    assert np.array_equal(bob[:, :, :8], root[:, :, :8])


def test_routed_experts_name_added_ones_and_may_prescribe_only_what_is_visible(served, tmp_path):
    add_loud(served, tmp_path)
    routed = answer(served, ALICE, return_routed_experts=True)[0]["routed_experts"]
    body = BODY | {"max_tokens": 1, "prompt": "abcdefghijk", "routed_experts": routed}
    rows = np.load(io.BytesIO(base64.b64decode(routed)))
    assert rows[:, 1].max() >= 8
    file = io.BytesIO()
    np.save(file, rows[:8])
    body["routed_experts"] = base64.b64encode(file.getvalue()).decode()
    assert served.post("/v1/completions", body, headers=ALICE).status_code == 200
    refused = served.post("/v1/completions", body, headers=BOB)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "routed_experts")
    assert served.engine.counters.failed_steps == 0


def test_when_the_key_store_cannot_take_a_group_nothing_stays(served, tmp_path, monkeypatch):
    block, usage = served.engine.variants["some"].blocks[2], served.engine.variants["some"].usage

    def full(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr(served.store.experts, "add", full)
    assert add(served).status_code == 500
    assert block.experts.num_experts == 8
    assert usage.of_layer(2).shape == (2, 8)
    monkeypatch.undo()
    assert add(served).json()["expert_ids"] == {"2": [8, 9, 10]}
    assert add(served).status_code == 409, "the name is taken"
    assert block.experts.num_experts == 11


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers__2__experts__up_proj": None}, "tensor layers.2.experts.up_proj is missing"),
        ({"layers__2__experts__gate_proj": torch.zeros(3, 8, 32)}, "allowed are down_proj, up_proj"),
        (
            {"layers__2__experts__up_proj": torch.zeros(3, 32, 9)},
            r"has shape [3, 32, 9]; allowed: (3, 32, 8)",
        ),
        ({"layers__2__experts__up_proj": torch.zeros(2, 32, 8)}, "layers.2.experts."),
        ({"layers__2__experts__up_proj": torch.zeros(3, 32, 8).double()}, "is F64; allowed: F32, BF16, F16"),
        ({"layers__2__experts__up_proj": torch.full((3, 32, 8), torch.nan)}, "not finite"),
        ({"layers__2__experts__up_proj": torch.full((3, 32, 8), 1e5)}, "above 10000"),
        ({"layers__2__keys": torch.zeros(3, 15)}, "allowed: (3, 16)"),
        ({"layers__1__keys": torch.zeros(3, 16)}, "is for layer 1; allowed: 2"),
        ({"optimizer": torch.zeros(1)}, "tensor 'optimizer' has no place here"),
    ],
)
def test_a_file_that_does_not_fit_is_named_with_its_tensor(served, tmp_path, changes, message):
    make_file(tmp_path / "experts", **changes)
    response = add(served)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "file"), response.text
    assert response.json()["error"]["message"].startswith("new.safetensors: tensor ")
    assert message in response.json()["error"]["message"]
    assert groups(served) == []
    assert not (tmp_path / "experts-some").exists()


@pytest.mark.parametrize("content", [b"", b"x" * 100, (2).to_bytes(8, "little") + b"{}", b"\xff" * 16])
def test_a_file_that_is_none_is_refused(served, tmp_path, content):
    (tmp_path / "experts" / "new.safetensors").write_bytes(content)
    response = add(served)
    assert response.status_code == 400
    assert "new.safetensors" in response.json()["error"]["message"]


def test_a_file_cut_short_is_refused(served, tmp_path):
    file = tmp_path / "experts" / "new.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    assert "its header says" in add(served).json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"file": "none.safetensors"}, 404, "file"),
        ({"file": "out.safetensors"}, 404, "file"),
        ({"file": "../new.safetensors"}, 400, "file"),
        ({"file": "/etc/passwd"}, 400, "file"),
        ({"file": "a/new.safetensors"}, 400, "file"),
        ({"file": "new"}, 400, "file"),
        ({"name": "Legal"}, 400, "name"),
        ({"name": "a/b"}, 400, "name"),
        ({"scope": "anchor"}, 400, "scope"),
        ({"scope": "session:alice/s"}, 400, "scope"),
        ({"scope": "everyone"}, 400, "scope"),
        ({"seed": -1}, 400, "seed"),
        ({"path": "x"}, 400, "path"),
    ],
)
def test_a_bad_request_is_told_by_field(served, tmp_path, fields, status, param):
    (tmp_path / "experts" / "out.safetensors").symlink_to(tmp_path / "keys.sqlite3")
    response = add(served, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text
    assert groups(served) == []


def test_groups_and_endpoints_that_are_not_there_and_wrong_states(served):
    add(served)
    root = {"headers": ROOT}
    assert served.post("/admin/experts/some/none/promote", **root).status_code == 404
    assert served.request("DELETE", "/admin/experts/some/none", **root).status_code == 404
    assert served.get("/admin/experts/moe", **root).status_code == 404
    assert served.request("DELETE", "/admin/experts/some/legal", **root).status_code == 200
    assert served.request("DELETE", "/admin/experts/some/legal", **root).status_code == 409
    assert served.post("/admin/experts/some/legal/promote", **root).status_code == 409
    assert add(served).status_code == 409


def test_random_addresses_depend_on_the_seed_alone_and_are_as_long_as_the_anchors(served):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert add(served, name=name, seed=seed).status_code == 200
    keys = served.store.view(ScopeId("tenant", "alice")).keys_of(2)
    lengths = np.linalg.norm(keys, axis=1)
    assert np.array_equal(keys[8:11], keys[11:14])
    assert not np.array_equal(keys[8:11], keys[14:17])
    np.testing.assert_allclose(lengths[8:], lengths[:8].mean(), rtol=1e-5)


def test_16_bit_files_are_taken(served, tmp_path):
    make_file(tmp_path / "experts", dtype=torch.bfloat16)
    assert add(served).status_code == 200
