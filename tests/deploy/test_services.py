"""The services of docker-compose.yml as plain processes: the same commands in the same environment, with loopback in
place of its network and free ports in place of its own.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from redis_server import RedisServer

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PANELS = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "libration.json").read_text())["panels"]
ALERTS = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"]
TEXT = (ROOT / "docs" / "gravity.md").read_text()
PATIENCE_S = 300


def wait_until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


class Service:
    """One service of ours; `here` says what of its network, files and ports is where on this machine."""

    def __init__(self, name: str, here: dict[str, str], folder: Path) -> None:
        self._log = folder / f"{name}.log"
        entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, re.MULTILINE)[-1])
        program, *arguments = entry + COMPOSE[name]["command"]
        environment = {"LIBRATION_DATA_DIR": str(folder / name)} | COMPOSE[name]["environment"]
        for there, replacement in here.items():
            environment = {key: value.replace(there, replacement) for key, value in environment.items()}
        for port in ("LIBRATION_SERVER__PORT", "LIBRATION_WORKER__PORT"):
            environment |= {port: "0"} if port in environment else {}
        command = [str(Path(sys.executable).with_name(program)), *arguments]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)
        self._health = COMPOSE[name].get("healthcheck", {}).get("test") or _image_health()

    def address(self) -> str:
        """Where it listens, once it does."""
        found: list[str] = []

        def announced() -> list[str]:
            assert self.process.poll() is None, self.log()
            found[:] = re.findall(r"http://127\.0\.0\.1:\d+", self.log())
            return found

        wait_until(announced)
        return found[0]

    def log(self) -> str:
        return self._log.read_text()

    def is_healthy(self) -> bool:
        """By the command that its container is asked with."""
        kind, program, *arguments = self._health
        assert (kind, program) == ("CMD", "python")
        arguments = [re.sub(r"http://127\.0\.0\.1:\d+", self.address(), each) for each in arguments]
        return subprocess.run([sys.executable, *arguments], capture_output=True, check=False).returncode == 0

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


def _image_health() -> list[str]:
    (command,) = re.findall(r"HEALTHCHECK.*?CMD (\[.*?\])$", DOCKERFILE, re.MULTILINE | re.DOTALL)
    return ["CMD", *json.loads(command)]


@pytest.fixture
def services(
    tmp_path: Path, base_cache: Path, redis: RedisServer, secrets: Path
) -> Iterator[dict[str, Service]]:
    """server-1, server-2, worker-1, worker-2."""
    here = {"/run/secrets": str(secrets), "redis:6379": f"127.0.0.1:{redis.port}", "0.0.0.0": "127.0.0.1"}
    started: dict[str, Service] = {}
    try:
        for name in (name for name, service in COMPOSE.items() if "build" in service):
            (tmp_path / name).mkdir()
            (tmp_path / name / "cache").symlink_to(base_cache)
            started[name] = Service(name, here, tmp_path)
            started[name].address()  # one after the other: the first converts the base weights for all
        yield started
    finally:
        for service in started.values():
            if service.process.poll() is None:
                service.process.kill()
                service.process.wait()


def authorised(secrets: Path, key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {(secrets / key).read_text()}"}


def chat(server: httpx.Client, content: str, **more: object) -> dict:
    messages = [{"role": "user", "content": content}]
    body = {"model": "some", "messages": messages, "temperature": 0, "max_tokens": 8, **more}
    response = server.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def version(server: httpx.Client) -> int:
    return server.get("/v1/keys/some").json()["version"]


def metrics_of(page: str) -> set[str]:
    return set(re.findall(r"^# TYPE (\S+)", page, re.MULTILINE))


def asked_metrics() -> set[str]:
    """The metrics that the dashboard shows and the alerts watch."""
    asked = [target["expr"] for panel in PANELS for target in panel.get("targets", [])]
    asked += [rule["expr"] for group in ALERTS for rule in group["rules"]]
    return {name.removesuffix("_bucket") for name in re.findall(r"libration_\w+", " ".join(asked))}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_chat_through_both_replicas_teaches_one_tenant(services, secrets) -> None:
    at = {name: service.address() for name, service in services.items()}
    admin, scraper = (authorised(secrets, key) for key in ("admin_api_key", "metrics_api_key"))
    clients = [
        httpx.Client(base_url=at[name], headers=admin, timeout=PATIENCE_S)
        for name in ("server-1", "server-2")
    ]
    with clients[0] as first, clients[1] as second:
        reached = 0
        for teacher in (first, second):
            chat(teacher, TEXT[:4000])
            wait_until(lambda: version(first) == version(second) > reached)  # noqa: B023 - called at once
            reached = version(first)
        pinned = {"key_version": reached, "plasticity": "read"}
        answers = [chat(server, "Who are you?", **pinned)["choices"] for server in (first, second)]
        assert answers[0] == answers[1]
    assert all(service.is_healthy() for service in services.values())
    known = metrics_of(httpx.get(f"{at['server-1']}/metrics", headers=scraper).text)
    known |= metrics_of(httpx.get(f"{at['worker-1']}/metrics").text)
    assert asked_metrics() <= known
    assert [service.end() for service in services.values()] == [0, 0, 0, 0]
    logs = "".join(service.log() for service in services.values())
    assert not any(path.read_text() in logs for path in secrets.iterdir())
