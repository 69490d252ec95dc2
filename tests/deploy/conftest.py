"""A Redis as `deploy/` configures it, with secrets made for the test."""

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from redis_server import RedisServer

from keystore.backends.redis_client import RedisClient

ROOT = Path(__file__).parents[2]


class DeployedRedis(RedisServer):
    """With the configuration and the users of `deploy/redis`, asked as its health check asks."""

    def __init__(self, folder: Path, secrets: Path) -> None:
        wanted = (ROOT / "deploy" / "redis" / "redis.conf").read_text().replace("/run/secrets", str(secrets))
        super().__init__(
            folder, *(line for line in wanted.splitlines() if not re.match("bind|port|dir", line))
        )

    def client(self, **settings: object) -> RedisClient:
        services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
        command = services["redis"]["healthcheck"]["test"]
        user, password = (command[command.index(option) + 1] for option in ("--user", "--pass"))
        return super().client(**({"username": user, "password": password} | settings))


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    """Files as `deploy/make_secrets.py` makes them."""
    folder = tmp_path / "secrets"
    subprocess.run([sys.executable, ROOT / "deploy" / "make_secrets.py", folder], check=True)
    return folder


@pytest.fixture
def redis(tmp_path: Path, secrets: Path) -> Iterator[DeployedRedis]:
    """Running, with a log on disk before it answers."""
    server = DeployedRedis(tmp_path / "redis", secrets)
    try:
        server.start()
        yield server
    finally:
        if server.process is not None:
            server.stop(signal.SIGKILL)
