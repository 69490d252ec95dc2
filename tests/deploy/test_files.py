"""What `deploy/` and `docker-compose.yml` say, checked offline: by their schemas, and by what this project asks of them."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from server.settings import Settings, load_settings

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
MANIFESTS = sorted((ROOT / "deploy" / "k8s").glob("*.yaml"))
KUBERNETES = "1.31"  # the oldest that the manifests are for
OURS = ("server-1", "server-2", "worker-1", "worker-2")


def run_tool(name: str, *arguments: object) -> None:
    command = [str(Path(sys.executable).with_name(name)), *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def workloads() -> Iterator[tuple[str, dict]]:
    """Name and pod of every Deployment and StatefulSet."""
    for path in MANIFESTS:
        for manifest in yaml.safe_load_all(path.read_text()):
            if manifest["kind"] in ("Deployment", "StatefulSet"):
                yield manifest["metadata"]["name"], manifest["spec"]["template"]["spec"]


def environments() -> Iterator[tuple[str, dict[str, str]]]:
    """Where Libration runs, and its environment there."""
    for name in OURS:
        yield name, COMPOSE["services"][name]["environment"]
    for name, pod in workloads():
        (container,) = pod["containers"]
        if name != "redis":
            yield f"k8s {name}", {each["name"]: each["value"] for each in container["env"]}


def test_the_compose_file_fits_its_schema() -> None:
    run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml")


def test_the_dockerfile_passes_hadolint() -> None:
    run_tool("hadolint", "Dockerfile")


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_manifests_fit_kubernetes(path) -> None:
    run_tool("kubernetes-validate", "-k", KUBERNETES, "--strict", path)


def test_the_image_runs_as_nobody_by_a_command_that_gets_signals() -> None:
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    final = lines[max(number for number, line in enumerate(lines) if line.startswith("FROM")) :]
    assert "USER 10001:10001" in final
    assert 'ENTRYPOINT ["libration"]' in final
    assert any(line.startswith("HEALTHCHECK") for line in final)


def test_the_locks_of_the_image_pin_what_the_projects_lock_pins_each_with_its_hashes() -> None:
    lock = {
        line
        for line in (ROOT / "requirements.lock").read_text().splitlines()
        if line and not line.startswith("#")
    }
    hashed = (ROOT / "deploy" / "locks" / "serving.lock").read_text().splitlines()[1:]
    assert {line.partition(" ")[0] for line in hashed} == lock, "run deploy/make_locks.py"
    build = (ROOT / "deploy" / "locks" / "build.lock").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"\S+==\S+( --hash=sha256:[0-9a-f]{64})+", line) for line in hashed + build)


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_container_is_confined(name) -> None:
    service = COMPOSE["services"][name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert "healthcheck" in service or name not in ("redis", "worker-1", "worker-2")


def test_every_pod_is_confined_and_probed() -> None:
    for name, pod in workloads():
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"], name
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }, name
        assert {"readinessProbe", "livenessProbe"} <= container.keys(), name
        assert container["resources"]["limits"]["memory"], name


def test_only_servers_and_workers_reach_redis() -> None:
    assert COMPOSE["networks"]["store"]["internal"]
    on_store = [name for name, each in COMPOSE["services"].items() if "store" in each.get("networks", [])]
    assert on_store == [*OURS, "redis"]
    assert "ports" not in COMPOSE["services"]["redis"]


def test_every_environment_is_a_configuration_that_the_settings_take(monkeypatch) -> None:
    for where, environment in environments():
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            settings = load_settings(None)
        assert settings.key_store.backend == "redis", where
        for name in environment:
            section, _, field = name.removeprefix("LIBRATION_").lower().partition("__")
            assert section in Settings.model_fields, (where, name)
            given, default = getattr(settings, section), Settings.model_fields[section].get_default()
            assert getattr(given, field) is not None, (where, name)
            assert field in given.model_fields_set - default.model_fields_set, (where, name)


def test_a_secret_is_only_ever_a_file_of_those_that_are_mounted() -> None:
    for where, environment in environments():
        assert not any(re.search(r"(PASSWORD|SECRET|KEY)$", name) for name in environment), where
        named = set(re.findall(r"/run/secrets/([\w.]+)", " ".join(environment.values())))
        if where in OURS:
            assert named == set(COMPOSE["services"][where]["secrets"])
        else:
            pod = dict(workloads())[where.removeprefix("k8s ")]
            (volume,) = [each for each in pod["volumes"] if "secret" in each]
            assert named == {each["path"] for each in volume["secret"]["items"]}


def test_make_secrets_makes_every_secret_that_is_mounted(tmp_path) -> None:
    subprocess.run([sys.executable, ROOT / "deploy" / "make_secrets.py", tmp_path / "secrets"], check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "secrets").iterdir()}
    assert {Path(each["file"]).name for each in COMPOSE["secrets"].values()} == made.keys()
    assert (tmp_path / "secrets").stat().st_mode & 0o777 == 0o700
    assert len(set(made.values())) == len(made)
    assert re.findall("#([A-Z_]+)", made["users.acl"]) == []
    assert not any(made[name] in made["users.acl"] for name in made if name != "users.acl")
    assert "/deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()


def test_prometheus_asks_every_server_and_worker() -> None:
    config = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    targets = [
        target.partition(":")[0]
        for job in config["scrape_configs"]
        for group in job["static_configs"]
        for target in group["targets"]
    ]
    assert sorted(targets) == sorted(OURS)


def test_the_dashboard_asks_the_prometheus_that_is_provisioned() -> None:
    sources = yaml.safe_load(
        (ROOT / "deploy" / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text()
    )
    board = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "libration.json").read_text())
    assert {panel["datasource"]["uid"] for panel in board["panels"] if panel["type"] != "row"} == {
        each["uid"] for each in sources["datasources"]
    }
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
