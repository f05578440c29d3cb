"""A method and a job of an installed package, and a method of a module beside the configuration, in `vismt run`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from contract.test_new_job import CONFIG
from helpers.installed import ROOT, pip

PACKAGE = ROOT / "tests" / "helpers" / "own_package"


def vismt(*words: str | Path, folder: Path, site: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as its script does, which has not the working folder on its path; site: a folder of packages."""
    code = "import sys; sys.path.remove(''); from vismt.cli import main; sys.exit(main())"
    path = os.pathsep.join(map(str, filter(None, [site, ROOT, ROOT / "tests"])))
    environment = {**os.environ, "PYTHONPATH": path}
    call = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(call, capture_output=True, text=True, check=False, cwd=folder, env=environment)


@pytest.mark.slow
def test_an_installed_method_and_job_run_in_workers(tmp_path: Path) -> None:
    site = tmp_path / "site"
    shutil.copytree(PACKAGE, tmp_path / "own_package")  # a build writes into its folder
    pip("install", "--target", site, tmp_path / "own_package")
    config = CONFIG | {"adapt": {"method": "orthogonal", "rank": 2}}
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(config))
    ran = vismt("run", "toy.yaml", "--workers", "2", "--quiet", folder=tmp_path, site=site)
    assert ran.returncode == 0, ran.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    adapters = [json.loads(path.read_text()) for path in folder.rglob("adapter.json")]
    assert len(adapters) == 6 and {about["method"] for about in adapters} == {"orthogonal"}
    assert (folder / "report.html").exists()
    listed = vismt("list", folder=tmp_path, site=site).stdout
    assert "orthogonal" in listed and "toy" in listed
    # without the package
    ran = vismt("report", folder, folder=tmp_path)
    assert ran.returncode == 2 and "task 'toy' is not known" in ran.stderr


@pytest.mark.slow
def test_a_method_of_a_module_beside_the_configuration_runs_in_workers(tmp_path: Path) -> None:
    shutil.copy(PACKAGE / "own_vismt_parts" / "orthogonal.py", tmp_path / "mine.py")
    adapt = {"method": "orthogonal", "rank": 2}
    config = {
        "task": "multitask",
        "module": "mine",
        "model": {"name": "test_vit", "img_size": 32, "pretrained": False},
        "tasks": [{"name": "digits", "train": ["digits"], "test_share": 0.05, "validation_share": 0.03, "limit": 20}],
        "arms": {"own": {"adapt": adapt}, "lora": {}},
        "batch": 16,
        "train": {"steps": 2},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    ran = vismt("run", "mine.yaml", "--workers", "2", "--quiet", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    adapters = {path.parents[2].name: json.loads(path.read_text()) for path in folder.rglob("adapter.json")}
    assert {arm: about["method"] for arm, about in adapters.items()} == {"own": "orthogonal", "lora": "lora"}
    # where the module is not found
    (tmp_path / "elsewhere").mkdir()
    ran = vismt("evaluate", folder, folder=tmp_path / "elsewhere")
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1
    assert "cannot import 'mine'" in ran.stderr and "run in the folder that contains it" in ran.stderr
