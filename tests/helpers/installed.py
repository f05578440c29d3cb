"""A clone and environments of a user, in which vismt is installed as he does it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def started(*call: str | Path, folder: Path) -> str:
    """Return what a new process prints; it finds vismt as a user's does, by its installation and the working folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = list(map(str, call))
    result = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def environment_in(folder: Path) -> Path:
    """Make a virtual environment that has the libraries of this one, but not its vismt; return its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python3.*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin" / "python"


def pip(*arguments: str | Path) -> None:
    """Run pip without the network."""
    call = [sys.executable, "-m", "pip", *map(str, arguments), "--no-build-isolation", "--no-deps", "--quiet"]
    subprocess.run(call, check=True)


def clone_in(folder: Path) -> Path:
    """Return a copy of the checkout in a folder named vismt, as `git clone` makes it."""
    ignored = shutil.ignore_patterns(".git", "runs", "*.egg-info", "build", "__pycache__", ".*_cache")
    return shutil.copytree(ROOT, folder / "vismt", ignore=ignored)
