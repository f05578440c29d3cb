"""The processes and the machine of a run: accelerate's state, and the hardware and versions that run.json records."""

from __future__ import annotations

import atexit
import datetime
import gc
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

import vismt
from vismt.base.errors import UserError, require_known
from vismt.storage.paths import CHECKOUT

PRECISIONS = ("no", "bf16", "fp16")
# The other processes wait at a barrier while the first process evaluates.
WAIT = datetime.timedelta(days=2)


def processes() -> PartialState:
    """Return the state of this process among the processes of the launch (torchrun, accelerate launch), with its device."""
    sharded()  # before anything that reads its variable
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return PartialState(cpu=_cpu_only())
    _leave_at_exit()
    return PartialState(cpu=_cpu_only(), timeout=WAIT)


@cache
def sharded() -> bool:
    """Return whether `accelerate launch` asks for FSDP. Each process then trains a part of every weight (sharding.py).

    Raise UserError for version 1, and for settings of accelerate that a configuration makes itself.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"FSDP: version {version}; set fsdp_version to 2 in the configuration of accelerate launch.")
    for name, other in (
        ("ACTIVATION_CHECKPOINTING", "train.checkpointing: true"),
        ("OFFLOAD_PARAMS", "more processes"),
    ):
        if os.environ.get(f"FSDP_{name}", "false").lower() == "true":
            raise UserError(f"FSDP: fsdp_{name.lower()} is not used; set it to false and take {other}.")
    # accelerate would wrap the model by rules for stock models. transformers would load no weights in processes other than
    # the first, and methods compute start values from weights there.
    os.environ["ACCELERATE_USE_FSDP"] = "false"
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def net_device() -> torch.device:
    """Return where a net is before it is trained: on the device of this process, or on the CPU if it will be sharded."""
    return torch.device("cpu") if sharded() else processes().device


def accelerator(precision: str = "no", trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """Return the accelerator for a CPU, one GPU or several processes (torchrun, accelerate launch), as the environment says.

    trackers: Names of accelerate's trackers. folder: Folder for their files.

    Raise UserError for an unknown precision, and for fp16 without a GPU.
    """
    require_known("train.precision:", [precision], PRECISIONS)
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision: fp16 needs a GPU; use bf16 or no on a CPU.")
    processes()
    # accelerate keeps the first precision for the life of the process, and a second run may need another.
    AcceleratorState._reset_state()
    return Accelerator(cpu=_cpu_only(), mixed_precision=precision, log_with=[*trackers] or None, project_dir=folder)


@cache
def _leave_at_exit() -> None:
    atexit.register(leave)


def leave() -> None:
    """Destroy the process group before the interpreter ends. Without a group, do nothing.

    Gloo's threads live as long as anything references the group (for example a DistributedDataParallel in a cycle). A thread
    that outlives the interpreter aborts the process.
    """
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()


def hardware() -> str:
    """Return one line about processor or GPU, threads and processes."""
    device, count = processes().device, processes().num_processes
    if device.type == "cuda":
        return f"{count} x {torch.cuda.get_device_name(device)}"
    return f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {count} process(es)"


def reset_peak_memory() -> None:
    """Make `peak_memory` measure from now on."""
    if processes().device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> dict[str, float]:
    """Return {"memory_mb": the largest allocation of the GPU, or on Linux the largest resident memory of the process}.

    If neither is known, return {}.
    """
    if processes().device.type == "cuda":
        return {"memory_mb": torch.cuda.max_memory_allocated() / 2**20}
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return {"memory_mb": int(found[1]) / 2**10} if found else {}
    return {}


@cache
def versions() -> dict[str, str]:
    """Return the versions of Python, of vismt and of the packages that results depend on, as installed at the first call."""
    installed = {"python": platform.python_version(), "vismt": vismt.__version__}
    for name in ("torch", "torchvision", "timm", "numpy", "torchattacks", "transformers", "peft"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


@cache
def git_revision() -> str:
    """Return the commit of the checkout at the first call, with "+" if tracked files differ. Outside a checkout it is ""."""
    try:
        revision = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{revision}+" if changed else revision


def _git(*arguments: str) -> str:
    process = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True, timeout=10, check=True)
    return process.stdout.strip()


def _cpu_only() -> bool:
    """Return whether the machine has no accelerator, so that several processes communicate over the CPU."""
    others = (torch.backends.mps.is_available(), hasattr(torch, "xpu") and torch.xpu.is_available())
    return not (torch.cuda.is_available() or any(others))


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
