"""Fixtures of all tests. One thread each, because the tests run in several processes."""

import base64
import gc
import os
import shutil
import signal
import sys

import pytest
from helpers.installed import clone_in, environment_in, pip

from vismt.base import console
from vismt.storage.paths import cache_root

# Torch is imported when the files of tests are: the process that hands them out does without it. Without compiled files each
# process that tests start would compile vismt again.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell that started the tests in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="1pt" height="1pt"/>'
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mP4DwABAQEAHLCMmQAAAABJRU5ErkJggg==")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Leave what the collection makes out of later garbage collections, and have few of those: each walks over all objects."""
    gc.disable()
    collected = yield
    gc.enable()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    return collected


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def unsynced():
    """Do not wait for the disk: no test cuts the power."""
    os.fsync = lambda handle: None


@pytest.fixture(scope="session", autouse=True)
def painting():
    """Save figures as one pixel, since painting takes half the time of a small run; return what paints them."""
    from matplotlib.figure import Figure

    def save(figure, file, **options):
        content = {"png": PIXEL, "svg": SVG}.get(options["format"])
        return paint(figure, file, **options) if content is None else file.write(content)

    paint, Figure.savefig = Figure.savefig, save
    return paint


@pytest.fixture(scope="session", autouse=True)
def grouped():
    """Find the near-duplicates of the digits and crops once: every run that divides them compares all of their images."""
    from vismt.data import near_duplicates

    def once(read, labels, name):
        if name not in ("digits", "photo_crops"):
            return find(read, labels, name)
        key = name, bytes(labels.numpy()), bytes(read(0).numpy())
        if key not in found:
            found[key] = find(read, labels, name)
        return found[key].clone()

    find, near_duplicates.near_duplicates, found = near_duplicates.near_duplicates, once, {}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel of a clone, which is gone."""
    folder = tmp_path_factory.mktemp("wheel")
    clone = clone_in(folder)
    pip("wheel", clone, "-w", folder)
    shutil.rmtree(clone)
    (path,) = folder.glob("vismt-*.whl")
    return path


@pytest.fixture(scope="session")
def program(wheel, tmp_path_factory):
    """The command `vismt` of an environment in which the wheel is installed."""
    interpreter = environment_in(tmp_path_factory.mktemp("user") / "env")
    pip("--python", interpreter, "install", wheel)
    return interpreter.parent / "vismt"


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Return the finished run of a job (`helpers.tiny_runs.CONFIGS`), made once for all processes; only `to` may be written.

    The copy `to` of the run has its name. That no test changed a run is checked at the end.
    """
    from helpers.tiny_runs import contents, finished_run

    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "finished"
    found = {}

    def find(job, to=None):
        if job not in found:
            run = finished_run(job, root / job)
            found[job] = run, contents(run)
        run = found[job][0]
        return run if to is None else shutil.copytree(run, to / run.name)

    yield find
    assert all(contents(run) == content for run, content in found.values())


@pytest.fixture
def painted(monkeypatch, painting):
    """Paint the figures that the test saves."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", painting)


@pytest.fixture(scope="session", autouse=True)
def stores(tmp_path_factory):
    """Keep decoded images and features of tests out of the user's cache folder, whose assets they use."""
    folder = tmp_path_factory.mktemp("cache")
    for used in cache_root().glob("*"):
        if used.name not in ("pixels", "features"):
            (folder / used.name).symlink_to(used)
    os.environ["VISMT_CACHE"] = str(folder)


@pytest.fixture(autouse=True)
def loud():
    """Leave no console quiet for the next test."""
    console.set_quiet(False)
    yield
    console.set_quiet(False)


@pytest.fixture
def drawn(monkeypatch):
    """The figures saved during the test, each after its layout."""
    from vismt.jobs.fewshot import figures as fewshot_figures
    from vismt.jobs.multitask import figures as multitask_figures
    from vismt.report import arm_figures, figures, plotting, routers, tiles

    saved = []

    def keep(figure, path):
        saved.append(figure)
        figure.canvas.draw()
        return plotting.save_figure(figure, path)

    for module in (multitask_figures, fewshot_figures, figures, routers, arm_figures, tiles):
        monkeypatch.setattr(module, "save_figure", keep)
    return saved
