"""Locks of folders: who has one is named, and a process that ends frees it."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from vismt.base.errors import UserError
from vismt.storage.locks import HOLDER, locked


def hold(folder: Path, ready: Event, *, with_child: bool) -> None:
    """Hold a folder's lock; with_child: beside a child that lives on for a moment, as the workers of a data loader do."""
    with locked(folder):
        if with_child and os.fork() == 0:
            time.sleep(1)
            os._exit(0)
        ready.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[BaseProcess]:
    context = get_context("fork")
    ready = context.Event()
    process = context.Process(
        target=hold, args=(tmp_path, ready), kwargs={"with_child": getattr(request, "param", False)}
    )
    process.start()
    assert ready.wait(20)
    yield process
    process.kill()
    process.join()


def test_a_second_process_learns_who_has_the_folder(tmp_path: Path, holder: BaseProcess) -> None:
    who = f"process {holder.pid} on {os.uname().nodename}"
    with pytest.raises(UserError, match=f"'{tmp_path}' is in use by {who};"), locked(tmp_path):
        raise AssertionError
    assert holder.is_alive()


@pytest.mark.parametrize("holder", [False, True], indirect=True, ids=["alone", "with a child"])
def test_a_killed_process_frees_the_folder(tmp_path: Path, holder: BaseProcess) -> None:
    holder.kill()
    holder.join()
    assert (tmp_path / HOLDER).exists()
    with locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / HOLDER).read_text()
    assert not (tmp_path / HOLDER).exists()


def test_a_lock_can_be_waited_for(tmp_path: Path, holder: BaseProcess) -> None:
    threading.Timer(0.3, holder.kill).start()
    with locked(tmp_path, wait_s=30):
        holder.join(10)
        assert not holder.is_alive()


def test_a_lock_is_free_again_after_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with pytest.raises(KeyError), locked(folder):
        raise KeyError
    with locked(folder):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"), locked(tmp_path / "file"):
        pass
