"""The files for Kubernetes and Slurm match the API schemas and the code: commands, settings, ports and time limits.

Nothing is applied to a cluster here.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prometheus_client import CollectorRegistry

from server.metrics import JobMetrics
from server.routes import operations
from tests.harness.deployment import ROOT, ZETA, existing_settings, image_environment
from zeta.cli.durations import seconds_of

FOLDER = ROOT / "deploy/kubernetes"
KUBERNETES = "1.33"  # validated with this version and the newest one
NOT_IN_THE_API = ("kustomization.yaml",)
FILES = sorted(file.name for file in FOLDER.iterdir() if file.name not in NOT_IN_THE_API)
SLURM = ROOT / "deploy/slurm/zeta-worker.sbatch"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def resource(kind: str, name: str) -> dict[str, Any]:
    found = [document for file in FILES for document in documents(file)]
    (resource,) = [one for one in found if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return resource


def pod(kind: str, name: str) -> dict[str, Any]:
    return resource(kind, name)["spec"]["template"]["spec"]


PODS = (("Job", "migrate"), ("Deployment", "server"), ("StatefulSet", "worker"))


@pytest.mark.parametrize("version", [KUBERNETES, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", FILES)
def test_each_manifest_matches_the_schema_of_the_api(name: str, version: str) -> None:
    for document in documents(name):
        kubernetes_validate.validate(document, version, strict=True)


def test_the_kustomization_contains_each_file_except_the_optional_one() -> None:
    (kustomization,) = documents("kustomization.yaml")
    assert sorted(kustomization["resources"]) == [name for name in FILES if name != "autoscaling.yaml"]


@pytest.mark.parametrize(("kind", "name"), PODS)
def test_each_container_runs_an_existing_command_with_existing_settings(kind: str, name: str) -> None:
    (container,) = pod(kind, name)["containers"]
    program, *arguments = container["args"]
    assert program == "zeta"
    subprocess.run([ZETA, *arguments, "--help"], check=True, capture_output=True, timeout=60)
    names = {variable["name"] for variable in container["env"]}
    assert {name for name in names if name.startswith("ZETA_")} <= existing_settings()


@pytest.mark.parametrize(("kind", "name"), PODS)
def test_no_container_runs_as_root_or_gains_rights(kind: str, name: str) -> None:
    spec = pod(kind, name)
    assert spec["securityContext"]["runAsNonRoot"]
    assert not spec["automountServiceAccountToken"]
    (container,) = spec["containers"]
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_a_worker_gets_neither_the_database_url_nor_the_api_key() -> None:
    spec = pod("StatefulSet", "worker")
    (container,) = spec["containers"]
    assert not {"ZETA_DATABASE_URL_FILE", "ZETA_API_KEY_FILE"} & {variable["name"] for variable in container["env"]}
    secrets = [volume["secret"]["secretName"] for volume in spec["volumes"] if "secret" in volume]
    assert secrets == ["zeta-worker"]


def test_a_worker_that_is_deleted_has_time_to_save_its_runs() -> None:
    spec = pod("StatefulSet", "worker")
    (grace,) = [
        variable["value"] for variable in spec["containers"][0]["env"] if variable["name"] == "ZETA_STOP_GRACE_SECONDS"
    ]
    assert spec["terminationGracePeriodSeconds"] >= int(grace) + 20


def test_ports_and_probes_match_the_server() -> None:
    (container,) = pod("Deployment", "server")["containers"]
    port = int(image_environment()["ZETA_PORT"])
    assert [one["containerPort"] for one in container["ports"]] == [port]
    assert [one["port"] for one in resource("Service", "server")["spec"]["ports"]] == [port]
    assert resource("NetworkPolicy", "server")["spec"]["ingress"] == [{"ports": [{"port": port}]}]
    paths = {getattr(route, "path", None) for route in operations.router.routes}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        assert container[probe]["httpGet"]["path"] in paths


def test_workers_are_scaled_by_an_existing_metric() -> None:
    registry = CollectorRegistry()
    JobMetrics(registry)
    (metric,) = resource("HorizontalPodAutoscaler", "worker")["spec"]["metrics"]
    assert metric["external"]["metric"]["name"] in {family.name for family in registry.collect()}


def test_the_worker_in_a_slurm_allocation_stops_before_its_end(tmp_path: Path) -> None:
    text = SLURM.read_text()
    hours, minutes, seconds = map(int, re.search(r"--time=(\d+):(\d+):(\d+)", text).groups())  # type: ignore[union-attr]
    grace = int(re.search(r"ZETA_STOP_GRACE_SECONDS=(\d+)", text)[1])  # type: ignore[index]
    limit = seconds_of(re.search(r"--for (\S+)", text)[1], "--for")  # type: ignore[index]
    assert limit + grace + 20 <= hours * 3600 + minutes * 60 + seconds

    # `srun` starts the command in the allocation; here, it prints the command and its settings.
    (tmp_path / "srun").write_text('#!/bin/sh\necho "$@" "$ZETA_WORKER_NAME" "$ZETA_REDIS_URL"\n')
    (tmp_path / "srun").chmod(0o755)
    (tmp_path / "zeta.env").write_text("export ZETA_REDIS_URL=redis://head:6379/0\n")
    environment = {
        "PATH": f"{tmp_path}:{Path(str(shutil.which('sh'))).parent}",
        "SLURM_JOB_ID": "17",
        "TMPDIR": str(tmp_path),
        "ZETA_ENVIRONMENT": str(tmp_path / "zeta.env"),
    }
    done = subprocess.run(["bash", str(SLURM)], env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "--ntasks=1 zeta worker --for 3h55m slurm-17 redis://head:6379/0\n"
    assert (tmp_path / "zeta-17").stat().st_mode & 0o777 == 0o700
