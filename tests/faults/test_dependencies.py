"""An install leaves a user's environment current, and its lower bounds leave out versions that run what they read."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
BASE = {requirement.name: requirement for requirement in map(Requirement, PROJECT["dependencies"])}
JOBS = {requirement.name: requirement for requirement in map(Requirement, PROJECT["optional-dependencies"]["jobs"])}
# The last versions that must not be installed: known holes, and for urllib3 the series that old requests pin.
VULNERABLE = {
    "torch": "2.5.1",
    "pillow": "10.2.0",
    "pyyaml": "5.3.1",
    "requests": "2.31.0",
    "urllib3": "1.99",
    "idna": "3.6",
}


@pytest.mark.parametrize("name", ["torch", "pillow", "pyyaml"])
def test_lower_bounds_leave_out_vulnerable_versions(name: str) -> None:
    assert VULNERABLE[name] not in (BASE | JOBS)[name].specifier


def test_packages_that_pin_others_are_extras() -> None:
    assert not {"torchattacks", "learn2learn", "requests", "urllib3", "idna", "chardet"} & {
        name.lower() for name in BASE | JOBS
    }


def test_the_core_needs_few_packages() -> None:
    assert {*BASE} == {"torch", "einops", "safetensors", "numpy", "regex", "pyyaml", "filelock", "rich", "xxhash"}


def test_every_dependency_has_a_lower_bound_which_the_hosted_checks_install() -> None:
    texts = [*PROJECT["dependencies"], *(text for extra in PROJECT["optional-dependencies"].values() for text in extra)]
    named = [requirement for requirement in map(Requirement, texts) if requirement.name != "vismt"]
    assert [str(one) for one in named if not {"==", ">="} & {part.operator for part in one.specifier}] == []
    assert "--resolution lowest-direct" in (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf8")


def test_no_extra_holds_a_package_at_a_vulnerable_version() -> None:
    for extra, texts in PROJECT["optional-dependencies"].items():
        named = {requirement.name.lower(): requirement for requirement in map(Requirement, texts)}
        assert "torchattacks" not in named, extra  # it pins requests 2.25.1 and with it idna 2
        for name in VULNERABLE.keys() & named.keys():
            assert VULNERABLE[name] not in named[name].specifier, f"{extra}: {named[name]}"


def test_the_checks_install_torchattacks_without_its_dependencies() -> None:
    for file in (".ci/run", ".github/workflows/ci.yml", "CONTRIBUTING.md", "docs/install.md"):
        text = (ROOT / file).read_text(encoding="utf8")
        assert re.findall("pip install .*torchattacks", text) == ["pip install --no-deps torchattacks"], file


@pytest.mark.campaign
@pytest.mark.parametrize("extras", ["", "[test]", "[dev,docs]", "[all]"])
def test_an_install_downgrades_nothing(tmp_path: Path, extras: str) -> None:
    """Resolve an install in an empty environment; nothing is installed."""
    report = tmp_path / "report.json"
    options = ["--dry-run", "--ignore-installed", "--quiet", "--no-input", "--report", str(report)]
    packages = [f"{ROOT}{extras}", "requests"]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *options, *packages], capture_output=True, text=True)
    if done.returncode and re.search("connection|resolve host|No matching distribution|timed out", done.stderr, re.I):
        pytest.skip(f"the package index cannot be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    items = json.loads(report.read_text(encoding="utf8"))["install"]
    versions = {item["metadata"]["name"].lower(): Version(item["metadata"]["version"]) for item in items}
    for name in ("requests", "urllib3", "idna", "pillow", "torch"):
        assert versions[name] > Version(VULNERABLE[name]), f"{name} {versions[name]}"
    assert "torchattacks" not in versions
