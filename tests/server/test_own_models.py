"""Checkpoints of one's own, served over HTTP: frozen as they are, or with routing that learns."""

import asyncio
import base64
import io
import json
import re
import time
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.testing import assert_close

from model.checkpoints.experts import write_experts
from model.errors import CheckpointError
from server.app import create_app
from server.build import build
from server.cli import main
from server.metrics import Metrics
from server.settings import load_settings
from server.state import ServerState

PROSE = "The import statement combines two operations; it searches for the named module. " * 12
CODE = "for (i = 0; i < n; i++) { total += values[i]; } return total;\n" * 9


class Own:
    """A running server of some checkpoints, asked without a socket."""

    def __init__(self, parts, app):
        self.parts, self.registry, self.app = parts, parts.registry, app

    def request(self, method, path, **options):
        async def send():
            transport = httpx.ASGITransport(self.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def complete(self, model, prompt, **fields):
        body = {"model": model, "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 2} | fields
        response = self.request("POST", "/v1/completions", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def version(self, model):
        (row,) = [r for r in self.request("GET", "/v1/keys").json()["data"] if r["endpoint"] == model]
        return row["version"], row["drift"]["max"]


@pytest.fixture
def serving(tmp_path):
    """serving(endpoints): a server of these."""

    @contextmanager
    def served(endpoints, **settings):
        metrics = Metrics()
        settings = {"engine": {"dtype": "float32", "threads": 1}, "guard": {"enabled": False}} | settings
        configured = load_settings(None, data_dir=tmp_path / "data", endpoints=endpoints, **settings)
        parts = build(configured, metrics.observers())
        metrics.watch(parts.registry, "0.0.test")
        state = ServerState(
            parts.registry,
            metrics,
            "0.0.test",
            "fp",
            time.time(),
            tmp_path / "snapshots",
            tmp_path / "experts",
        )
        parts.start()
        try:
            yield Own(parts, create_app(state))
        finally:
            parts.stop(timeout_s=5)

    return served


def plastic(folder, **gravity):
    return {"model": folder, "plastic": True, "gravity": {"window_tokens": 64} | gravity}


def learn(server, model, text, wait_until, windows=1):
    before, _ = server.version(model)
    server.complete(model, text, max_tokens=1)
    wait_until(lambda: server.version(model)[0] >= before + windows)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),
        ("olmoe", {}),
        ("olmoe", {"norm_topk_prob": True}),
        ("qwen2_moe", {}),
        ("qwen3_moe", {"mlp_only_layers": [1]}),
    ],
)
def test_frozen_it_answers_as_the_original_bit_for_bit_and_learning_it_moves(
    serving, checkpoint, wait_until, family, changes
):
    folder, reference = checkpoint(family, **changes)
    with serving({"original": {"model": folder}, "moving": plastic(folder)}) as server:
        original = server.complete("original", PROSE[:200], echo=True)["choices"]
        for plasticity in ("off", "read"):
            moving = server.complete("moving", PROSE[:200], echo=True, plasticity=plasticity)
            assert (
                moving["choices"] == original
            )  # every log-probability is equal as printed, to the last digit
        tokens = server.registry.get("original").tokenizer.encode(PROSE[:200], add_special_tokens=True)
        with torch.inference_mode():
            expected = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
        told = torch.tensor(original[0]["logprobs"]["token_logprobs"][1 : len(tokens)])
        assert_close(told, expected[range(len(tokens) - 1), tokens[1:]], atol=1e-4, rtol=0)

        learn(server, "moving", PROSE, wait_until)
        version, drift = server.version("moving")
        assert version >= 1
        assert 0 < drift <= 1
        moved = server.complete("moving", PROSE[:200], echo=True, plasticity="read")["choices"]
        assert moved != original
        assert server.complete("original", PROSE[:200], echo=True)["choices"] == original
        assert server.complete("moving", PROSE[:200], echo=True, plasticity="off")["choices"] == original
        pinned = server.complete("moving", PROSE[:200], echo=True, key_version=0)["choices"]
        assert pinned == original


@pytest.mark.parametrize(
    ("family", "rule"), [("mixtral", "gradient"), ("olmoe", "gradient"), ("mixtral", "literal")]
)
def test_every_rule_moves_the_keys_of_a_checkpoint(serving, checkpoint, wait_until, family, rule):
    with serving({"own": plastic(checkpoint(family)[0], rule=rule)}) as server:
        learn(server, "own", CODE, wait_until)
        _, drift = server.version("own")
        assert 0 < drift <= 1


def test_two_bases_live_beside_each_other_with_an_engine_each(serving, checkpoint):
    llama, mixtral = checkpoint("llama")[0], checkpoint("mixtral")[0]
    endpoints = {"llama": {"model": llama}, "mixtral": plastic(mixtral), "same": {"model": mixtral}}
    with serving(endpoints) as server:
        served = server.registry.endpoints
        assert list(served) == ["llama", "mixtral", "same"]
        assert [e.variant for e in served.values()] == ["dense", "some", "moe"]
        assert len(server.registry.runners) == 2
        assert served["mixtral"].runner is served["same"].runner is not served["llama"].runner
        blocks = [served["same"].runner.engine.variants[name].blocks[1] for name in ("mixtral", "same")]
        assert len({b.experts.stacked["up_proj"].data_ptr() for b in blocks}) == 1  # in memory once
        answers = [server.complete(name, "Hello")["choices"][0]["text"] for name in endpoints]
        assert answers[1] == answers[2] != answers[0]


@pytest.mark.parametrize("own", ["frozen", "moving"])
def test_routes_are_told_followed_and_counted(serving, checkpoint, own):
    folder = checkpoint("olmoe")[0]
    with serving({"frozen": {"model": folder}, "moving": plastic(folder)}) as server:
        fields = {"echo": True, "max_tokens": 0, "return_routed_experts": True, "plasticity": "off"}
        first = server.complete(own, PROSE[:100], **fields)["choices"][0]
        routes = np.load(io.BytesIO(base64.b64decode(first["routed_experts"])), allow_pickle=False)
        assert routes.shape[1:] == (3, 2)
        again = server.complete(own, PROSE[:100], routed_experts=first["routed_experts"], **fields)
        assert again["choices"][0] == first
        assert server.registry.get(own).usage.counts.sum() == 2 * (len(routes) + 1) * 6
        usage = server.request("GET", f"/v1/keys/{own}/usage")
        assert usage.status_code == 200, usage.text


def test_experts_that_settle_in_one_scope_change_no_gate_of_another(
    serving, checkpoint, tmp_path, wait_until
):
    """Gates over all experts are over those that a scope sees."""
    folder = checkpoint("olmoe")[0]
    shapes = {"gate_proj": (2, 128, 64), "up_proj": (2, 128, 64), "down_proj": (2, 64, 128)}
    matrices = {name: torch.randn(shape) * 0.3 for name, shape in shapes.items()}
    (tmp_path / "experts").mkdir()
    write_experts(tmp_path / "experts" / "new.safetensors", {2: matrices}, {})
    learning = plastic(folder, rule="gradient", settling_warmup_tokens=0)
    with serving({"own": learning}) as server:
        before = server.complete("own", PROSE[:100], echo=True, plasticity="read")["choices"]
        body = {"file": "new.safetensors", "name": "new", "scope": "tenant:default", "seed": 0}
        added = server.request("POST", "/admin/experts/own", json=body)
        assert added.status_code in (200, 201), added.text
        with_new = server.complete("own", PROSE[:100], echo=True, plasticity="read")["choices"]
        assert with_new != before
        assert server.complete("own", PROSE[:100], echo=True, plasticity="off")["choices"] == before
        learn(server, "own", CODE, wait_until)
        again = server.complete("own", PROSE[:100], echo=True, plasticity="off")["choices"]
        assert again == before


def test_a_chat_ends_at_any_of_the_end_tokens(serving, checkpoint):
    with serving({"own": {"model": checkpoint("llama", eos_token_id=[1, 2])[0]}}) as server:
        endpoint = server.registry.get("own")
        assert {endpoint.eos_token_id, *endpoint.end_token_ids} == {1, 2}
        for token in (1, 2):
            bias = {str(token): 100}
            answer = server.complete("own", "Hi", logit_bias=bias, logprobs=None)["choices"][0]
            assert (answer["finish_reason"], answer["text"]) == ("stop", "")
            ignoring = server.complete("own", "Hi", logit_bias=bias, ignore_eos=True, logprobs=None)
            assert ignoring["choices"][0]["finish_reason"] == "length"
            waiting = server.complete("own", "Hi", logit_bias=bias, min_tokens=8, logprobs=None)
            assert waiting["choices"][0]["finish_reason"] == "length"


def test_a_conversation_uses_the_checkpoints_own_template(serving, checkpoint):
    folder = checkpoint("mixtral")[0]
    messages = [{"role": "user", "content": "Hi"}]
    with serving({"own": {"model": folder}}) as server:
        body = {"model": "own", "messages": messages, "max_tokens": 4, "temperature": 0}
        chat = server.request("POST", "/v1/chat/completions", json=body)
        assert chat.status_code == 200, chat.text
        text = "<|user|>Hi</s><|assistant|>"  # `<s>` comes with a text
        assert (
            chat.json()["choices"][0]["message"]["content"]
            == server.complete("own", text, max_tokens=4)["choices"][0]["text"]
        )
        shown = server.request("POST", "/tokenize", json={"model": "own", "prompt": text}).json()
        asked = server.request("POST", "/tokenize", json={"model": "own", "messages": messages}).json()
        assert shown["tokens"] == asked["tokens"]


def test_a_context_is_no_longer_than_the_sliding_window(serving, checkpoint):
    with serving({"own": {"model": checkpoint("mistral", sliding_window=64)[0]}}) as server:
        assert server.registry.get("own").max_model_len == 64
        body = {"model": "own", "prompt": list(range(4, 100)), "max_tokens": 4}
        refused = server.request("POST", "/v1/completions", json=body)
        assert refused.status_code == 400
        assert "64" in refused.json()["error"]["message"]


def test_keys_learned_for_other_weights_are_refused(serving, checkpoint, tmp_path, wait_until):
    with serving({"own": plastic(checkpoint("mixtral")[0])}) as server:
        learn(server, "own", PROSE, wait_until)
    settings = load_settings(
        None,
        data_dir=tmp_path / "data",
        endpoints={"own": plastic(checkpoint("mixtral", num_local_experts=6)[0])},
    )
    with pytest.raises(Exception, match=r"(?i)model"):
        build(settings, Metrics().observers())


def test_learned_keys_are_there_after_a_restart_and_for_the_command_line(
    serving, checkpoint, tmp_path, wait_until
):
    folder = checkpoint("olmoe")[0]
    with serving({"own": plastic(folder)}) as server:
        learn(server, "own", PROSE, wait_until)
        moved = server.complete("own", PROSE[:100], echo=True, plasticity="read", key_version=1)["choices"]
    with serving({"own": plastic(folder)}) as server:
        again = server.complete("own", PROSE[:100], echo=True, plasticity="read", key_version=1)["choices"]
        assert again == moved
    config = tmp_path / "libration.toml"
    config.write_text(f'[endpoints.own]\nmodel = "{folder}"\nplastic = true\n')
    options = ["--config", str(config), "--data-dir", str(tmp_path / "data")]
    done = CliRunner().invoke(main, ["keys", *options, "rollback", "own", "0"])
    assert done.exit_code == 0, done.output


def test_a_text_can_be_streamed_through_a_plastic_checkpoint(checkpoint, tmp_path):
    (tmp_path / "text.txt").write_text(CODE * 4)
    config = tmp_path / "libration.toml"
    config.write_text(f'[endpoints.own]\nmodel = "{checkpoint("olmoe")[0]}"\nplastic = true\n')
    options = [
        "--config",
        str(config),
        "--endpoint",
        "own",
        "--data-dir",
        str(tmp_path / "data"),
        "--threads",
        "1",
    ]
    job = ["stream", str(tmp_path / "text.txt"), "--window", "64", "--max-tokens", "512", "--json"]
    done = CliRunner().invoke(main, [*job, *options])
    assert done.exit_code == 0, done.output
    report = json.loads(done.output[done.output.index("{") :])
    frozen, _, direct = report["rules"]
    assert (frozen["drift"], report["tokens"]) == (0.0, 512)
    assert 0 < direct["drift"] <= 1


@pytest.mark.parametrize(
    ("family", "endpoint", "message"),
    [
        ("llama", {"plastic": True}, "has no experts whose routing could move"),
        (
            "mixtral",
            {"variant": "moe", "weights": "blocks"},
            "has experts of its own: leave out variant 'moe'",
        ),
    ],
)
def test_what_a_checkpoint_cannot_be_is_refused_at_the_start(checkpoint, tmp_path, family, endpoint, message):
    endpoints = {"own": endpoint | {"model": checkpoint(family)[0]}}
    settings = load_settings(None, data_dir=tmp_path / "data", endpoints=endpoints)
    with pytest.raises(ValueError, match=re.escape(message)):
        build(settings, Metrics().observers())


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ({"variant": "checkpoint"}, "name it in model"),
        ({"model": "m", "weights": "w"}, "served as it is: leave out weights"),
        ({"model": "m", "variant": "some"}, "are for its own base: leave out variant 'some'"),
        ({"model": "m", "variant": "dense"}, "leave out variant 'dense'"),
        ({"variant": "moe", "plastic": True}, "not for variant 'moe'"),
        ({"model": "m", "gravity": {"rule": "direct"}}, "has no routing keys: leave out gravity"),
    ],
)
def test_an_endpoint_that_contradicts_itself_is_refused_by_the_configuration(endpoint, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_settings(None, endpoints={"own": endpoint})


def test_a_model_on_the_command_line_is_an_endpoint_with_its_folders_name(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("server.start.serve_until_signal", lambda settings, *_: seen.append(settings))
    folder = tmp_path / "Tiny Mixtral-8x7B_v0.1"
    done = CliRunner().invoke(main, ["serve", "--model", str(folder), "--plastic"])
    assert done.exit_code == 0, done.output
    ((name, endpoint),) = seen[0].endpoints.items()
    assert name == "tiny-mixtral-8x7b_v0.1"
    assert (endpoint.model, endpoint.plastic, endpoint.variant) == (folder, True, "checkpoint")


def test_plastic_without_a_model_is_a_mistake_of_the_command_line():
    done = CliRunner().invoke(main, ["serve", "--plastic"])
    assert done.exit_code == 2
    assert "give --model too" in done.output


def test_a_folder_that_is_not_there_is_named(tmp_path):
    settings = load_settings(
        None, data_dir=tmp_path / "data", endpoints={"own": {"model": tmp_path / "none"}}
    )
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "none"))):
        build(settings, Metrics().observers())
