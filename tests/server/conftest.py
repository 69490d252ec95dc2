"""A whole server around a tiny random model that reads and writes bytes."""

import asyncio
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import TypeAdapter

from keystore.backends.embedded import EmbeddedBackend
from keystore.canary import Guard, GuardConfig
from keystore.records import GravityConfig
from keystore.store import KeyStore
from model.tokenizer import TextTokenizer
from server.added_experts import AddedExperts
from server.app import create_app
from server.build import Parts
from server.canary_probe import CanaryProbe
from server.canary_text import canary_windows
from server.engine import engine
from server.engine.choosing import Choice, choose
from server.engine.engine import Engine
from server.engine.runner import EngineRunner
from server.engine.scheduler import SchedulerConfig
from server.engine.sequence import Sequence
from server.expert_files import plastic_blocks
from server.http_protocol import BoundedHttp
from server.logs import JsonLines
from server.metrics import Metrics
from server.plasticity import Teacher
from server.registry import Endpoint, Plasticity, Registry
from server.schemas import answers, key_answers
from server.state import ServerState
from server.value_offsets import OffsetLimits, ValueOffsets

CONTEXT = 4096
FROZEN = ("moe", "mom", "fm-moe")  # variants without routing keys


def check_described(app: FastAPI, response: httpx.Response) -> None:
    """Fails for a status, a header, a media type or a body that the API's description of the route lacks."""
    operation = _operation(app, response.request.method, response.request.url.path)
    if operation is None:
        if response.request.url.path == app.openapi_url:
            return
        assert response.status_code in (401, 403, 404, 405, 413, 429), response.status_code
        return
    assert str(response.status_code) in operation["responses"], f"{response.status_code} is not described"
    described = operation["responses"][str(response.status_code)]
    media_type = response.headers["content-type"].partition(";")[0]
    schema = described["content"][media_type]["schema"]
    for name, header in described["headers"].items():
        assert re.search(header["schema"].get("pattern", ""), response.headers[name]), (
            name,
            response.headers,
        )
    if response.status_code == 200 and media_type == "application/json":
        answer_type(schema["$ref"].rpartition("/")[2]).validate_json(response.content, strict=True)


@cache
def answer_type(name: str) -> TypeAdapter:
    return TypeAdapter(vars(answers).get(name) or vars(key_answers)[name])


def _operation(app: FastAPI, method: str, path: str) -> dict | None:
    paths = app.openapi()["paths"]
    for template in sorted(paths, key=lambda each: each.count("{")):
        pattern = re.sub(r"\\\{\w+\\\}", "[^/]+", re.escape(template))
        if re.fullmatch(pattern, path) and method.lower() in paths[template]:
            return paths[template][method.lower()]
    return None


@dataclass
class Served:
    """A running server and ways to look into it."""

    app: FastAPI
    state: ServerState
    parts: Parts

    @property
    def engine(self) -> Engine:
        return self.runner.engine

    @property
    def runner(self) -> EngineRunner:
        return self.state.registry.runners[0]

    @property
    def store(self) -> KeyStore:
        return self.parts.stores[0]

    @property
    def idle(self) -> bool:
        return self.engine.idle and self.engine.cache.reserved_tokens == 0

    def client(self, **options) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(self.app)
        return httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30, **options)

    def request(self, method: str, path: str, **options) -> httpx.Response:
        """One request without a socket."""

        async def send() -> httpx.Response:
            async with self.client() as client:
                return await client.request(method, path, **options)

        response = asyncio.run(send())
        check_described(self.app, response)
        return response

    def post(self, path: str, body: object = None, **options) -> httpx.Response:
        return self.request("POST", path, **({"json": body} if body is not None else {}), **options)

    def get(self, path: str, **options) -> httpx.Response:
        return self.request("GET", path, **options)


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> float:
    """Seconds until the condition held; the limit is for what never happens, not for what is slow."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, "it did not happen in time"
        time.sleep(0.002)
    return time.monotonic() - started


@pytest.fixture(name="wait_until", scope="session")
def wait_until_fixture() -> Callable[..., float]:
    return wait_until


@pytest.fixture(scope="session")
def canary(tokenizer) -> Callable[[], torch.Tensor]:
    """canary(): the windows that a guard measures on, when none are configured."""
    return lambda: canary_windows(tokenizer, None, CONTEXT)


@pytest.fixture(scope="session")
def serve(make_tiny, tokenizer, canary) -> Callable[..., contextmanager]:
    """serve(path, scheduler, kv_cache_tokens, **state): a server as a context manager."""

    @contextmanager
    def serving(
        path: Path,
        scheduler: SchedulerConfig | None = None,
        kv_cache_tokens: int = 65_536,
        prefix_cache_tokens: int = 4096,
        gravity: GravityConfig | None = None,
        guard: GuardConfig | None = None,
        learn_scope: str = "tenant",
        value_offsets: OffsetLimits | None = None,
        versions_on_disk: int = 64,
        start: bool = True,
        **state: object,
    ) -> Iterator[Served]:
        tiny = make_tiny(torch.float32, vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT)
        gravity = gravity or GravityConfig(window_tokens=64)
        frozen = {name: make_tiny(torch.float32, name).variant for name in FROZEN}
        anchors = {layer: block.get_parameter("anchors").numpy() for layer, block in tiny.blocks.items()}
        metrics = Metrics()
        store = KeyStore(
            "tiny",
            anchors,
            gravity,
            EmbeddedBackend(path / "keys.sqlite3"),
            num_experts_per_tok=2,
            plastic_layers=[2],
            versions_on_disk=versions_on_disk,
            guard=guard and Guard(CanaryProbe(tiny.model, tiny.blocks, [2], canary()), guard),
        )
        made = Engine(
            tiny.model,
            {"some": tiny.variant} | frozen,
            scheduler or SchedulerConfig(prefill_chunk=64, step_tokens=128),
            kv_cache_tokens,
            {"some": frozenset([2])},
            time.monotonic,
            metrics.observers(),
            prefix_cache_tokens,
        )
        runner = EngineRunner(made, 1)
        teacher = Teacher(tiny.model, store, gravity, tiny.blocks, frozenset([2]))
        experts = AddedExperts(
            store, plastic_blocks(tiny.blocks, [2]), tiny.variant.usage, runner, path / "experts-some"
        )
        experts.put_back()
        offsets = value_offsets and ValueOffsets(tiny.model, value_offsets)
        if offsets is not None:
            store.news.replaced.add(offsets.drop)
        dense = Endpoint("dense", "dense", 1, tokenizer, runner, CONTEXT, 256, None, None)
        some = replace(
            dense,
            name="some",
            variant="some",
            usage=tiny.variant.usage,
            plasticity=Plasticity(store, teacher, experts, "learn", learn_scope, offsets),
        )
        others = {
            name: replace(dense, name=name, variant=name, usage=variant.usage)
            for name, variant in frozen.items()
        }
        registry = Registry({"some": some, **others, "dense": dense}, (runner,))
        parts = Parts(registry, (), (store,))
        metrics.watch(registry, "0.0.test")
        server_state = ServerState(
            registry,
            metrics,
            "0.0.test",
            "fp-test",
            time.time(),
            path / "snapshots",
            path / "experts",
            **state,
        )
        if start:
            parts.start()
        try:
            yield Served(create_app(server_state), server_state, parts)
        finally:
            if start:
                parts.stop(timeout_s=2)
            else:
                store.close()

    return serving


@pytest.fixture(scope="module")
def served(serve, tmp_path_factory) -> Iterator[Served]:
    """One server for all tests of a module that leave it as it was."""
    with serve(tmp_path_factory.mktemp("served")) as running:
        yield running


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    config = uvicorn.Config(
        app,
        port=0,
        http=BoundedHttp,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=5,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(name="listening", scope="session")
def listening_fixture() -> Callable[[FastAPI], contextmanager]:
    """listening(app): the app on a real socket; gives its URL."""
    return listening


@pytest.fixture(scope="module")
def url(served: Served) -> Iterator[str]:
    with listening(served.app) as address:
        yield address


@pytest.fixture
def log_lines() -> Iterator[list[str]]:
    """Every line that the JSON log would hold."""
    lines: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(JsonLines().format(record))

    keeper = Keeper(logging.DEBUG)
    root = logging.getLogger()
    before = root.level
    root.addHandler(keeper)
    root.setLevel(logging.DEBUG)
    yield lines
    root.removeHandler(keeper)
    root.setLevel(before)


@pytest.fixture
def write(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """write(text): whatever is asked, the model answers with this text and then ends."""

    def scripted(text: str) -> None:
        script = [*tokenizer.encode(text), 256]

        def choose_scripted(sequences: list[Sequence], logits: torch.Tensor) -> Iterator[Choice]:
            rows = torch.zeros_like(logits)
            for row, sequence in zip(rows, sequences, strict=True):
                row[script[min(len(sequence.generated), len(script) - 1)]] = 100.0
            return choose(sequences, rows)

        monkeypatch.setattr(engine, "choose", choose_scripted)

    return scripted


@pytest.fixture
def chunks() -> Callable[[httpx.Response], list[dict]]:
    """chunks(response): the objects of a stream that ended properly."""

    def parsed(response: httpx.Response) -> list[dict]:
        assert response.headers["content-type"].startswith("text/event-stream"), response.text
        events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert events[-1] == "[DONE]", events[-1]
        return [json.loads(event) for event in events[:-1]]

    return parsed
