"""Where a value comes from, and what is refused."""

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
