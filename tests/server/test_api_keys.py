"""API keys made by hand: what the file keeps, and what a running server makes of every change."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from click.testing import CliRunner

from server.api_key_file import (
    FILE_NAME,
    ApiKeyFileError,
    create_api_key,
    digest_of,
    read_api_keys,
    revoke_api_key,
)
from server.auth import ApiKey, ApiKeys, StoredApiKeys
from server.cli import main
from server.refusals import Unauthenticated
from server.settings import ApiKeyLimits

LEARN = {"model": "some", "prompt": "x" * 31, "max_tokens": 1}


def api(folder, *arguments):
    return CliRunner().invoke(main, ["keys", "--data-dir", str(folder), "api", *map(str, arguments)])


def printed(folder, *arguments):
    result = api(folder, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def path(tmp_path):
    return tmp_path / FILE_NAME


@pytest.fixture
def make(path):
    """make(name, **limits): the secret of a new API key."""
    return lambda name, **limits: create_api_key(path, name, ApiKeyLimits(**limits), None, 1.0)[1]


@pytest.fixture
def served(serve, tmp_path, path):
    with serve(tmp_path, api_keys=ApiKeys(stored=StoredApiKeys(path)), public_metrics=False) as running:
        yield running


def as_(secret):
    return {"headers": {"Authorization": f"Bearer {secret}"}}


def test_a_key_is_printed_once_and_kept_as_a_digest(tmp_path, path):
    made = api(tmp_path, "create", "alice", "--tenant", "acme", "--requests-per-minute", 60)
    assert made.exit_code == 0, made.output
    secret = made.stdout.strip()
    assert len(secret) > 40
    assert "shown this once" in made.stderr
    (kept,) = read_api_keys(path)
    assert (kept.name, kept.tenant, kept.level, kept.requests_per_minute) == ("alice", "acme", "user", 60)
    assert kept.digest == digest_of(secret)
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert {each.name for each in tmp_path.iterdir()} == {FILE_NAME, "api_keys.lock"}


def test_keys_are_listed_and_revoked_by_name_or_id(tmp_path):
    first = printed(tmp_path, "create", "first", "--level", "admin", "--days", 1)
    second = printed(tmp_path, "create", "second", "--plasticity", "read")
    assert first["api_key"] != second["api_key"]
    rows = printed(tmp_path, "list")
    assert [(row["name"], row["level"], row["plasticity"]) for row in rows] == [
        ("first", "admin", None),
        ("second", "user", "read"),
    ]
    assert rows[0]["expires_at"] - rows[0]["created_at"] == pytest.approx(86_400)
    assert "digest" not in rows[0]
    table = api(tmp_path, "list").output.splitlines()
    assert table[1].split()[:5] == [first["id"], "first", "default", "admin", "-"]
    assert printed(tmp_path, "revoke", first["id"])["name"] == "first"
    assert "is revoked" in api(tmp_path, "revoke", "second").output
    assert printed(tmp_path, "list") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "taken"], "there is an API key named 'taken'"),
        (["create", "Not A Name"], "name"),
        (["create", "other", "--tenant", "a/b"], "tenant"),
        (["create", "other", "--requests-per-minute", "0"], "requests-per-minute"),
        (["revoke", "nobody"], "there are: taken"),
    ],
)
def test_what_cannot_be_done_is_told_and_changes_nothing(tmp_path, path, make, arguments, message):
    make("taken")
    before = path.read_bytes()
    result = api(tmp_path, *arguments)
    assert result.exit_code != 0
    assert message in result.output
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["", "{", '{"api_keys": [{}]}', '{"api_keys": [], "format": 2}', "[]"])
def test_a_file_that_cannot_be_understood_is_named_and_left_alone(tmp_path, path, content):
    path.write_text(content)
    for arguments in (["list"], ["create", "alice"], ["revoke", "alice"]):
        result = api(tmp_path, *arguments)
        assert (result.exit_code, FILE_NAME in result.output) == (1, True)
    assert path.read_text() == content
    with pytest.raises(ApiKeyFileError):
        StoredApiKeys(path)


def test_keys_made_at_once_are_all_kept(path, make):
    names = [f"key-{n}" for n in range(16)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(make, names))
    assert {each.name for each in read_api_keys(path)} == set(names)
    assert {each.digest for each in read_api_keys(path)} == {digest_of(secret) for secret in made}


def test_the_first_key_closes_a_running_server_and_the_last_one_does_not_open_it(served, path, make):
    assert served.get("/v1/models").status_code == 200
    alice, root = make("alice"), make("root", level="admin")
    assert served.get("/v1/models").status_code == 401
    assert served.get("/v1/models", **as_(alice)).status_code == 200
    assert served.get("/admin/keys/some/audit", **as_(alice)).status_code == 403
    assert served.get("/admin/keys/some/audit", **as_(root)).status_code == 200
    revoke_api_key(path, "alice")
    assert served.get("/v1/models", **as_(alice)).status_code == 401
    assert served.get("/v1/models", **as_(root)).status_code == 200
    revoke_api_key(path, "root")
    assert served.get("/v1/models").status_code == 401


def test_requests_learn_for_the_tenant_of_their_key_and_as_the_key_says(served, make):
    reader, teacher = make("reader", tenant="acme", plasticity="read"), make("teacher", tenant="acme")

    def told(secret, **fields):
        answer = served.post("/v1/completions", LEARN | fields, **as_(secret))
        assert answer.status_code == 200, answer.text
        report = answer.json()["libration"]
        return report["plasticity"], report["learned_tokens"], report["scope"]

    assert told(teacher) == ("learn", 30, "tenant:acme")
    assert told(reader) == ("read", 0, "tenant:acme")
    assert told(reader, plasticity="learn") == ("learn", 30, "tenant:acme")
    assert told(reader, model="dense") == ("off", 0, None)
    always = make("always", tenant="acme", plasticity="learn")
    assert told(always, key_version=0)[:2] == ("read", 0)


def test_a_key_makes_so_many_requests_a_minute(served, make):
    slow, fast = make("slow", requests_per_minute=2), make("fast")
    assert [served.get("/v1/models", **as_(slow)).status_code for _ in range(3)] == [200, 200, 429]
    refused = served.get("/v1/models", **as_(slow))
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(refused.headers["Retry-After"]) <= 30
    assert served.get("/v1/models", **as_(fast)).status_code == 200
    assert served.get("/health/live", **as_(slow)).status_code == 200
    page = served.get("/metrics", **as_(fast)).text
    assert 'libration_requests_rejected_total{reason="rate_limit_exceeded"} 2.0' in page


def test_what_a_key_has_spent_stays_spent_when_another_key_is_made(served, make):
    slow = make("slow", requests_per_minute=1, learned_tokens_per_hour=40)
    assert served.post("/v1/completions", LEARN, **as_(slow)).status_code == 200
    make("other")
    assert served.get("/v1/models", **as_(slow)).status_code == 429


def test_a_broken_file_leaves_the_keys_that_were_there_and_is_seen(path, make, log_lines):
    secret = make("alice", tenant="acme")
    api_keys = ApiKeys(stored=StoredApiKeys(path))
    good = path.read_bytes()
    for breaking in (lambda: path.write_text("{"), path.unlink):
        breaking()
        assert api_keys.identify(f"Bearer {secret}").tenant == "acme"
        with pytest.raises(Unauthenticated):
            api_keys.identify(None)
        assert api_keys.fault is not None
    assert sum("the API key file cannot be read" in line for line in log_lines) == 1
    path.write_bytes(good)
    assert api_keys.identify(f"Bearer {secret}").tenant == "acme"
    assert api_keys.fault is None


def test_a_key_stops_working_when_it_expires(path):
    now = 1000.0
    _, secret = create_api_key(path, "alice", ApiKeyLimits(), 1.0, now)
    at = {"now": now + 86_399}
    api_keys = ApiKeys([ApiKey.of("configured", "ops", "admin")], StoredApiKeys(path), lambda: at["now"])
    assert api_keys.identify(f"Bearer {secret}").level == "user"
    at["now"] += 1
    with pytest.raises(Unauthenticated, match="expired"):
        api_keys.identify(f"Bearer {secret}")
    assert api_keys.identify("Bearer configured").tenant == "ops"


def test_a_key_that_was_made_lets_the_server_listen_off_loopback(tmp_path, monkeypatch, make):
    served = []
    monkeypatch.setattr("server.start.serve_until_signal", lambda settings, *_: served.append(settings))
    command = ["serve", "--host", "0.0.0.0", "--data-dir", str(tmp_path)]
    assert CliRunner().invoke(main, command).exit_code == 1
    make("alice")
    assert CliRunner().invoke(main, command).exit_code == 0
    assert served[0].server.host == "0.0.0.0"
