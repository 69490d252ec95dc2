"""schemathesis against a live server: what it makes up from the API's description is answered as described."""

import subprocess
from pathlib import Path

import pytest

from server.auth import ApiKey, ApiKeys

SCHEMATHESIS = Path(__file__).parents[2] / ".venv-clients" / "bin" / "schemathesis"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_schemathesis_finds_nothing(serve, listening, tmp_path):
    api_keys = ApiKeys([ApiKey.of("root-key", "ops", "admin")])
    with serve(tmp_path, api_keys=api_keys) as served, listening(served.app) as url:
        command = [SCHEMATHESIS, "run", f"{url}/openapi.json", "--header", "Authorization: Bearer root-key"]
        command += ["--exclude-path-regex", "/events$"]  # never ends
        command += ["--checks", ",".join(CHECKS), "--phases", "coverage,fuzzing", "--max-examples", "10"]
        command += ["--seed", "1", "--request-timeout", "120", "--max-response-time", "120"]
        command += ["--warnings", "off", "--continue-on-failure", "--no-color"]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=1700, cwd=tmp_path, check=False
        )
        assert done.returncode == 0, done.stdout[-20_000:] + done.stderr
        assert "No issues found" in done.stdout or "passed" in done.stdout
        assert served.state.registry.runners[0].engine.counters.failed_steps == 0
