"""The files in the guides to clusters: they can be read, and the commands in them are those that vitnas takes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from nas.cli.app import app

GUIDES = Path(__file__).parents[2] / "docs/guides"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)


def blocks(page: str, language: str, start: str = "") -> list[str]:
    code = [body for name, body in FENCE.findall((GUIDES / f"{page}.md").read_text()) if name == language]
    return [body for body in code if body.startswith(start)]


def check(words: list[str]) -> dict[str, Any]:
    """The options of a vitnas command, which must be ones that it takes."""
    import typer

    command = typer.main.get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    return command.make_context(words[0], words[1:]).params


def test_kubernetes_jobs_run_vitnas_on_the_storage_of_their_secret() -> None:
    jobs = [job for body in blocks("kubernetes", "yaml") for job in yaml.safe_load_all(body)]
    assert jobs
    for job in jobs:
        assert (job["apiVersion"], job["kind"], job["spec"]["completionMode"]) == ("batch/v1", "Job", "Indexed")
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "vitnas"}}]
        assert container["resources"]["requests"].items() <= container["resources"]["limits"].items()
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
        assert (mounts["work"], str(check(container["args"])["out"])) == (container["workingDir"], "runs")


def test_compose_services_run_vitnas_on_their_database() -> None:
    (body,) = blocks("compose", "yaml")
    document = yaml.safe_load(body)
    services = {name: each for name, each in document["services"].items() if name != "db"}
    assert services
    database = document["services"]["db"]["environment"]
    for service in services.values():
        check(shlex.split(service["command"]))
        password, user, name = database["POSTGRES_PASSWORD"], database["POSTGRES_USER"], database["POSTGRES_DB"]
        assert service["environment"]["VITNAS_STORAGE"] == f"postgresql://{user}:{password}@db/{name}"
        assert service["depends_on"] == {"db": {"condition": "service_healthy"}}


@pytest.mark.parametrize("body", blocks("slurm", "sh", "#!"), ids=lambda body: shlex.split(body)[-1])
def test_a_slurm_script_hands_the_storage_to_vitnas(body: str, tmp_path: Path) -> None:
    """Run as the array's task is, with an srun and a vitnas that tell what they get."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text("PATH=$PWD/.venv/bin:$PATH\n")
    (tmp_path / ".venv/bin/srun").write_text('#!/bin/bash\nexec "${@:2}"\n')
    (tmp_path / ".venv/bin/vitnas").write_text('#!/bin/bash\necho "$VITNAS_STORAGE" "$@"\n')
    for name in ("srun", "vitnas"):
        os.chmod(tmp_path / ".venv/bin" / name, 0o755)
    (tmp_path / "vitnas.env").write_text("VITNAS_STORAGE=postgresql://me:a%2Fb@host/studies\n")
    ran = subprocess.run(["bash", "-e"], input=body, cwd=tmp_path, capture_output=True, text=True, check=True)
    told = ran.stdout
    storage, *words = shlex.split(told)
    assert storage == "postgresql://me:a%2Fb@host/studies"
    check(words)


@pytest.mark.parametrize("page", sorted(GUIDES.glob("*.md")), ids=lambda page: page.stem)
def test_no_command_holds_a_password(page: Path) -> None:
    code = "".join(body for _, body in FENCE.findall(page.read_text()))
    assert not re.search(r"^.*(?:vitnas|kubectl|docker|srun) .*://[^\s@/$]*:[^\s@]*@", code.replace("\\\n", " "), re.M)
