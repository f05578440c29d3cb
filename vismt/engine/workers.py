"""Where the units of a study run: in local processes or on a Ray cluster.

A unit is a call of a function that writes its result to the run folder. It may run in any process that sees the folder, and a
unit that runs again continues from its own files. A unit that fails is run once more, and is named if it fails again.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import signal
import socket
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess

import torch

from vismt.base import console
from vismt.base.errors import UserError

Call = tuple[Callable[..., None], tuple[object, ...]]
RAY = "ray"
STEP_END_S = 10  # less than WORKERS_END_S of storage/locks.py


class Workers(ABC):
    """Processes that run units. Use as a context manager."""

    count: int

    @abstractmethod
    def submit(self, function: Callable[..., None], *arguments: object) -> Future[None]:
        """Start a call in a worker as soon as one is free."""

    @abstractmethod
    def close(self) -> None:
        """Stop the workers."""

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, units: Mapping[str, Call]) -> None:
        """Run every unit, by name. Run units that fail once more. Raise UserError with the errors of units that failed twice."""
        failed = self._attempt(units)
        if failed:
            console.stage("workers", f"{len(failed)} of {len(units)} failed and run again: {', '.join(failed)}")
            failed = self._attempt({name: units[name] for name in failed})
        if failed:
            details = "; ".join(f"{name}: {error}" for name, error in failed.items())
            raise UserError(
                f"workers: {len(failed)} of {len(units)} units failed twice; the others are kept. {details}"
            )

    def _attempt(self, units: Mapping[str, Call]) -> dict[str, str]:
        errors = {}
        with console.bar("workers", f"{self.count} at a time", len(units)) as progress:
            names = {self.submit(function, *arguments): name for name, (function, arguments) in units.items()}
            for future in as_completed(names):
                error = future.exception()
                if error is not None:
                    errors[names[future]] = " ".join(f"{error}".split()) or type(error).__name__
                progress.advance()
                progress.note(names[future])
        return errors


class LocalWorkers(Workers):
    """`count` spawned processes of this machine, which share its threads and use its GPUs in turn."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free: queue.SimpleQueue[tuple[int, ProcessPoolExecutor]] = queue.SimpleQueue()
        for slot in range(count):
            self._free.put((slot, self._process(slot)))
        self._threads = ThreadPoolExecutor(count)

    def submit(self, function: Callable[..., None], *arguments: object) -> Future[None]:
        return self._threads.submit(self._call, function, arguments)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._free.empty():
            self._free.get()[1].shutdown()

    def _process(self, slot: int) -> ProcessPoolExecutor:
        """Return one process. If it is killed, no other unit is lost."""
        threads = max(1, torch.get_num_threads() // self.count)
        gpus = torch.cuda.device_count()
        context = multiprocessing.get_context("spawn")
        arguments = (threads, slot % gpus if gpus else None)
        return ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=arguments)

    def _call(self, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
        slot, process = self._free.get()
        try:
            process.submit(function, *arguments).result()
        except BrokenProcessPool as error:
            process = self._process(slot)
            raise UserError("its process ended without an answer (killed, or out of memory)") from error
        finally:
            self._free.put((slot, process))


class RayWorkers(Workers):
    """Tasks of a Ray cluster at `address`, whose machines share the run folder's file system. "" is a cluster on this machine.

    A unit declares one GPU, if the cluster has any, and an equal share of the CPUs. Otherwise it declares as many CPUs as torch
    uses here. A unit whose machine or process is lost is run again elsewhere.
    """

    def __init__(self, address: str = "") -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError('workers: ray is not installed; pip install "vismt[ray]".') from error
        try:
            if ":" in address:  # "HOST:PORT" or "ray://HOST:PORT" (Ray itself would try for minutes)
                host, _, port = address.removeprefix("ray://").rpartition(":")
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            where = f"at '{address}'" if address else "on this machine"
            raise UserError(f"workers: no Ray cluster answers {where} ({' '.join(str(error).split())}).") from error
        self._ray = ray
        available = ray.cluster_resources()
        gpus = int(available.get("GPU", 0))
        cpus = int(available.get("CPU", 1))
        self._cpus = max(1, cpus // gpus) if gpus else min(cpus, torch.get_num_threads())
        self._gpus = min(gpus, 1)
        self.count = gpus or max(1, cpus // self._cpus)

    def submit(self, function: Callable[..., None], *arguments: object) -> Future[None]:
        remote = self._ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_retries=1)(_run)
        return remote.remote(self._cpus, function, arguments).future()

    def close(self) -> None:
        self._ray.shutdown()


def make_workers(text: str, units: int) -> Workers:
    """Return the workers of a text "N", "ray" or "ray:ADDRESS".

    units: Number of units of the study's largest round. Raise UserError for another text, more workers than units, and a
    cluster that cannot be reached.
    """
    name, _, address = text.partition(":")
    if name == RAY:
        return RayWorkers(address)
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise UserError(f"workers: '{text}'; give a number of processes, ray, or ray:ADDRESS.")
    if int(text) > units:
        raise UserError(f"workers: {text} processes for {units} units; give at most {units}.")
    return LocalWorkers(int(text))


def _start(threads: int, gpu: int | None) -> None:
    """Prepare a worker process.

    gpu: The only GPU that it may see, None for none.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:  # the tasks of Ray end with its cluster
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    if gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    torch.set_num_threads(threads)
    console.set_quiet(True)
    warnings.filterwarnings("ignore")


def _end_with(parent: BaseProcess) -> None:
    """End this process as soon as its parent has ended in any way. An unfinished unit goes on from its files.

    A training has some seconds to finish and save its step.
    """
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(STEP_END_S)
    os._exit(1)


def _run(threads: int, function: Callable[..., None], arguments: tuple[object, ...]) -> None:
    """Run a unit in a Ray worker. Ray gives the worker its GPU."""
    _start(threads, None)
    function(*arguments)
