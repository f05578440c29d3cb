"""Fixtures of all tests. One intra-op thread, because the tests run in several processes."""

import os

import pytest
import torch

from vismt import console
from vismt.paths import cache_root

torch.set_num_threads(1)


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
    from vismt.jobs.classification import figures as classification_figures
    from vismt.jobs.dense import figures as dense_figures
    from vismt.jobs.fewshot import episode_figure
    from vismt.jobs.fewshot import figures as fewshot_figures
    from vismt.report import figures, plotting, routers, study_figures

    saved = []

    def keep(figure, path):
        saved.append(figure)
        figure.canvas.draw()
        return plotting.save(figure, path)

    for module in (
        classification_figures,
        dense_figures,
        episode_figure,
        fewshot_figures,
        figures,
        routers,
        study_figures,
    ):
        monkeypatch.setattr(module, "save", keep)
    return saved
