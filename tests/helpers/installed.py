"""A clone and environments of a user, in which vismt is installed as he does it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def started(*call: str | Path, folder: Path) -> str:
    """Return what a new process prints. It finds vismt as a user's does, by its installation and the working folder."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = list(map(str, call))
    result = subprocess.run(words, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


# Runs each call in a fork: importing the libraries takes longer than most commands. vismt is imported by the fork, as installed.
SERVER = """
import json, os, runpy, sys
import accelerate, matplotlib.figure, timm, torch, transformers
for line in sys.stdin:
    folder, printed, *words = json.loads(line)
    if not os.fork():
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    sys.exit()
os.chdir(folder)
for stream, path in enumerate((os.devnull, f"{printed}.out", f"{printed}.err")):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), stream)
if words[0] == "-c":
    code, words[1:2] = words[1], []
    sys.argv = words
    exec(code)
else:
    sys.argv, sys.path[0] = words, os.path.dirname(words[0])
    runpy.run_path(words[0], run_name="__main__")
"""


@functools.cache
def _server(interpreter: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([interpreter, "-c", SERVER], env=environment, cwd=interpreter.parent, **pipes)


def served(call: Path, *words: str | Path, folder: Path) -> str:
    """Return what a script of an environment, or its interpreter, prints to words; see `started`."""
    server = _server(call.parent / "python")
    printed = call.parent / "printed"
    script = [] if call.name == "python" else [call]
    server.stdin.write(json.dumps([*map(str, (folder, printed, *script, *words))]) + "\n")
    server.stdin.flush()
    code = server.stdout.readline()
    assert code == "0\n", printed.with_suffix(".err").read_text()
    return printed.with_suffix(".out").read_text()


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
