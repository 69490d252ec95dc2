"""Other people's clients, in a virtual environment of their own, against one real server with API keys.

They see nothing but loopback: whatever asks a hub or phones home fails at once.
"""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from openai import OpenAI

ROOT = Path(__file__).parents[3]
VENV = ROOT / ".venv-clients"
TIMEOUT_S = 900
API_KEYS = [
    {"key": "user-key", "tenant": "acme"},
    {"key": "admin-key", "tenant": "ops", "level": "admin"},
    {"key": "once-a-minute", "tenant": "acme", "requests_per_minute": 1},
]
NOWHERE = "http://127.0.0.1:9"

Run = Callable[..., str]


@pytest.fixture(scope="session")
def server(launch, tmp_path_factory) -> Iterator:
    """One server for every client; each test leaves it as it was, but for what `some` learns."""
    running = launch(
        tmp_path_factory.mktemp("clients") / "server", LIBRATION_SERVER__API_KEYS=json.dumps(API_KEYS)
    )
    yield running
    running.end()


@pytest.fixture(scope="session")
def connect(server) -> Callable[..., OpenAI]:
    """connect(path, api_key): a client of the server."""
    return lambda path="/v1", api_key="user-key": OpenAI(
        base_url=server.url + path, api_key=api_key, max_retries=0, timeout=300
    )


@pytest.fixture
def run(tmp_path) -> Run:
    """run(*command): what a command of the clients' environment prints; it has to succeed."""
    assert (VENV / "bin" / "python").exists(), "the clients are not installed: run `make clients`"

    def ran(program: str, *arguments: object, cwd: Path = tmp_path) -> str:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "LANG": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LANGSMITH_TRACING": "false",
            "OPENAI_API_KEY": "user-key",
            "HTTP_PROXY": NOWHERE,
            "HTTPS_PROXY": NOWHERE,
            "NO_PROXY": "127.0.0.1",
        }
        command = [str(VENV / "bin" / program), *map(str, arguments)]
        print("$", program, *arguments)
        done = subprocess.run(
            command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        print(done.stdout, done.stderr, sep="\n")
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    return ran
