"""Where a value comes from, and what is refused."""

import json

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from server.cli import main
from server.settings import load_settings


def write(folder, text):
    path = folder / "libration.toml"
    path.write_text(text)
    return path


def test_the_command_line_beats_the_environment_beats_the_file_beats_the_default(tmp_path, monkeypatch):
    path = write(tmp_path, "[server]\nport = 1111\nhost = 'localhost'\n[engine]\nmax_running = 2\n")
    assert load_settings(None).server.port == 8000
    assert load_settings(path).server.port == 1111
    monkeypatch.setenv("LIBRATION_SERVER__PORT", "2222")
    assert load_settings(path).server.port == 2222
    settings = load_settings(path, server={"port": 3333})
    assert (settings.server.port, settings.server.host, settings.engine.max_running) == (3333, "localhost", 2)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("prot = 1", "prot"),
        ("[server]\nprot = 1", "server.prot"),
        ("[endpoints.a]\nvariant = 'tree'", "endpoints.a.variant"),
        ("[endpoints.a]\nvariant = 'some'\n[endpoints.a.gravity]\ntrust_radius = -1", "endpoints.a.gravity"),
        ("[endpoints.'A B']\nvariant = 'dense'", "endpoints.A B"),
        ("[server]\nport = 70000", "server.port"),
        ("[endpoints.a]\nvariant = 'moe'\nplasticity = 'learn'", "endpoints.a"),
        ("[endpoints.a]\nvariant = 'dense'\nweights = 'x'", "endpoints.a"),
        ("[endpoints.a]\nvariant = 'ffn'", "endpoints.a"),
        ("[endpoints.a]\nvariant = 'moe'\nlearn_scope = 'global'", "endpoints.a"),
        ("[endpoints.a]\nvariant = 'moe'\nvalue_offsets = {enabled = true}", "endpoints.a"),
        ("[endpoints.a]\nvariant = 'some'\nvalue_offsets = {bound = 1.5}", "endpoints.a.value_offsets.bound"),
        ("[endpoints.a]\nvariant = 'some'\nlearn_scope = 'everybody'", "endpoints.a.learn_scope"),
        ("[key_store]\nsession_eviction = 'forget'", "key_store.session_eviction"),
        ("[key_store]\nbackend = 'redis'", "needs url"),
        ("[key_store]\nurl = 'redis://localhost'", "only with backend = 'redis'"),
        ("[key_store]\nbackend = 'redis'\nurl = 'http://localhost'", "key_store.url"),
        ("[key_store]\nbackend = 'redis'\nurl = 'redis://:word@localhost'", "key_store.url"),
        ("[key_store]\nbackend = 'redis'\nurl = 'redis://a'\ntls_ca_file = 'x'", "only with a rediss:// url"),
        (
            "[key_store]\nbackend = 'redis'\nurl = 'redis://a'\npassword = 'x'\npassword_file = 'y'",
            "either 'password' or",
        ),
        ("[key_store]\nbackend = 'redis'\nurl = 'redis://a'\nshards = 0", "key_store.shards"),
        ("[worker]\nlease_s = 0", "worker.lease_s"),
        ("[feedback]\nkeep_s = 0", "feedback.keep_s"),
        ("[feedback]\nkeep_answers = 0", "feedback.keep_answers"),
        ("[[server.api_keys]]\nkey = 'x'\nlearned_tokens_per_hour = 0", "learned_tokens_per_hour"),
        ("[guard]\nmin_overlap = 1.5", "guard.min_overlap"),
        ("[guard]\nmax_loss_increase = nan", "guard.max_loss_increase"),
        ("[guard]\ntenant_every_versions = 0", "guard.tenant_every_versions"),
    ],
)
def test_a_fault_in_the_file_is_named(tmp_path, text, where):
    path = write(tmp_path, text)
    with pytest.raises(ValidationError):
        load_settings(path)
    result = CliRunner().invoke(main, ["config", "check", "--config", str(path)])
    assert result.exit_code == 1
    assert where in result.output


def test_a_missing_or_broken_file_is_an_error_not_a_default(tmp_path):
    runner = CliRunner()
    missing = runner.invoke(main, ["config", "check", "--config", str(tmp_path / "no.toml")])
    assert (missing.exit_code, "not found" in missing.output) == (1, True)
    broken = runner.invoke(main, ["config", "check", "--config", str(write(tmp_path, "= 3"))])
    assert broken.exit_code == 1


def test_machines_are_told_every_fault_with_its_place(tmp_path):
    runner = CliRunner()
    path = write(tmp_path, "prot = 1\n[server]\nport = 70000\n")
    checked = runner.invoke(main, ["config", "check", "--json", "--config", str(path)])
    told = json.loads(checked.stdout)
    assert (checked.exit_code, told["valid"]) == (1, False)
    assert {fault["where"] for fault in told["faults"]} == {"prot", "server.port"}
    missing = runner.invoke(main, ["config", "check", "--json", "--config", str(tmp_path / "no.toml")])
    assert (missing.exit_code, json.loads(missing.stdout)["faults"][0]["where"]) == (1, "file")
    valid = runner.invoke(main, ["config", "check", "--json"])
    assert (valid.exit_code, json.loads(valid.stdout)) == (0, {"valid": True, "faults": []})


def test_files_that_are_named_and_not_there_are_faults_of_the_configuration(tmp_path):
    path = write(
        tmp_path,
        "[[server.api_keys]]\nkey = 'x'\n[[server.api_keys]]\nkey_file = '/no/key'\n"
        "[endpoints.a]\nvariant = 'some'\nweights = '/no/weights'\n",
    )
    load_settings(path)
    checked = CliRunner().invoke(main, ["config", "check", "--config", str(path)])
    assert checked.exit_code == 1
    assert "server.api_keys.1.key_file: there is no /no/key" in checked.output
    assert "endpoints.a.weights: there is no /no/weights" in checked.output
    path.write_text(f"data_dir = '{tmp_path / 'not-made-yet'}'\nexperts_dir = '{tmp_path / 'nor-this'}'\n")
    assert CliRunner().invoke(main, ["config", "check", "--config", str(path)]).exit_code == 0


def test_secrets_are_not_shown(tmp_path):
    path = write(tmp_path, "[[server.api_keys]]\nkey = 'sk-very-secret'\ntenant = 'acme'\n")
    result = CliRunner().invoke(main, ["config", "show", "--config", str(path)])
    assert result.exit_code == 0
    assert "acme" in result.output
    assert "very-secret" not in result.output


def test_listening_off_loopback_without_api_keys_is_refused():
    result = CliRunner().invoke(main, ["serve", "--host", "0.0.0.0"])
    assert result.exit_code == 1
    assert "without API keys" in result.output


def test_secrets_of_redis_come_from_files_and_are_not_shown(tmp_path, monkeypatch):
    (tmp_path / "word").write_text("very-secret\n")
    monkeypatch.setenv("LIBRATION_KEY_STORE__PASSWORD_FILE", str(tmp_path / "word"))
    path = write(
        tmp_path,
        "[key_store]\nbackend = 'redis'\nurl = 'rediss://host:6379/0'\nhmac_secret = 'very-secret-too'\n",
    )
    settings = load_settings(path).key_store
    assert (settings.redis_password(), settings.hmac_key()) == ("very-secret", b"very-secret-too")
    result = CliRunner().invoke(main, ["config", "show", "--config", str(path)])
    assert result.exit_code == 0
    assert "very-secret" not in result.output
