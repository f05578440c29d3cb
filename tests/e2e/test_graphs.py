"""Exports as graphs: what the written files answer against timm, transformers and the run; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from helpers import pyramids
from helpers.tiny_runs import refused
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.cli import main
from vismt.jobs import graphs, open_run
from vismt.jobs.graphs import NAMES, PREPROCESSING, Named, image_graph, write_graph
from vismt.jobs.multitask.config import trained_tasks


@pytest.fixture(scope="module")
def runs(finished, tmp_path_factory) -> dict[str, Path]:
    """A run of each job."""
    return {job: finished(job, tmp_path_factory.mktemp(job)) for job in ("dense", "fewshot", "lm", "multitask")}


@pytest.fixture(scope="module")
def classifier(runs: dict[str, Path]) -> Path:
    return exported(runs["multitask"], "torch")


def exported(run: Path, form: str) -> Path:
    assert main(["export", str(run), "--format", form, "--quiet"]) == 0
    return run / f"export-{form}-adapted-seed-0"


def answers(folder: Path, *inputs: Tensor) -> list[Tensor]:
    """Return the outputs of a written graph, in the order of preprocessing.json."""
    if (folder / NAMES["torch"]).exists():
        return list(torch.export.load(folder / NAMES["torch"]).module()(*inputs))
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(folder / NAMES["onnx"], providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    assert [item.name for item in session.get_outputs()] == list(
        json.loads((folder / PREPROCESSING).read_text())["outputs"]
    )
    return [torch.from_numpy(found) for found in session.run(None, dict(zip(names, (x.numpy() for x in inputs))))]


@pytest.mark.parametrize("form", ["torch", pytest.param("onnx", marks=pytest.mark.slow)])
@torch.no_grad()
def test_graphs_of_image_jobs_take_pixels_and_batches_of_any_size(
    runs: dict[str, Path], classifier: Path, form: str
) -> None:
    images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(7))
    (logits,) = answers(classifier if form == "torch" else exported(runs["multitask"], form), images)
    assert main(["export", str(runs["multitask"]), "--quiet"]) == 0
    folder = runs["multitask"] / "export-timm-adapted-seed-0"
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    mean, std = (torch.tensor(pyramids.ABOUT[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert torch.allclose(logits, model((images - mean) / std), atol=1e-5)

    folder = exported(runs["fewshot"], form)
    about = json.loads((folder / PREPROCESSING).read_text())
    assert about["outputs"]["features"]["block"] == 0 and about["input"]["shape"] == ["batch", 3, 32, 32]
    assert about["largest_difference"] < 1e-5
    (features,) = answers(folder, images)
    job = open_run(runs["fewshot"]).job
    assert torch.allclose(features, job.models(0).task("adapted").backbone(images), atol=1e-5)
    assert not torch.allclose(features, job.models(0).task("frozen").backbone(images), atol=1e-3)

    job = open_run(runs["dense"]).job
    net, images = job.final(job.study.find("adapted")), torch.rand(1, 3, 32, 48)
    found = answers(exported(runs["dense"], form), images)
    for task, maps in zip(trained_tasks(job.config), found, strict=True):
        assert maps.shape == (1, task.channels, 32, 48)
        assert torch.allclose(maps, task.resized(net(images)[task.name], (32, 48)), atol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_the_graph_of_a_language_model_is_transformers(runs: dict[str, Path], capsys) -> None:
    transformers = pytest.importorskip("transformers")
    folder = exported(runs["lm"], "torch")
    assert (folder / "tokenizer.json").exists()
    assert main(["export", str(runs["lm"]), "--format", "transformers", "--quiet"]) == 0
    lm = transformers.AutoModelForCausalLM.from_pretrained(runs["lm"] / "export-transformers-adapted-seed-0").eval()
    ids = torch.randint(256, (3, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    (logits,) = answers(folder, ids, mask)
    assert torch.allclose(logits[0], lm(ids[:1]).logits[0], atol=1e-5)
    assert torch.allclose(logits[1, 4:], lm(ids[1:2, 4:]).logits[0], atol=1e-5)  # padding is not seen
    error = refused(capsys, "export", runs["lm"], "--format", "onnx", "--quiet")
    assert "for ONNX write --format transformers" in error


def test_the_folder_of_a_graph_is_not_overwritten_by_another_model(
    runs: dict[str, Path], classifier: Path, capsys
) -> None:
    before = (classifier / NAMES["torch"]).read_bytes()
    assert main(["export", str(runs["fewshot"]), "--format", "torch", "--to", str(classifier), "--quiet"]) == 2
    assert (classifier / NAMES["torch"]).read_bytes() == before
    assert "holds a model of adapted-seed-0 of the run multitask" in capsys.readouterr().err


class Noisy(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) + torch.rand(1)


class Branching(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) if float(images.sum()) > 3 else images.amax((2, 3))


@pytest.mark.slow
def test_attention_of_five_axes_has_a_graph_of_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    hiera = timm.create_model("tiny_hiera", num_classes=3).eval()
    write_graph(image_graph(Named(hiera), (64, 64), {"logits": {}}), "onnx", tmp_path)
    assert (tmp_path / NAMES["onnx"]).exists()


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Noisy(), "'mean' differs from the model's by"),
        (Branching(), "torch cannot capture Named as a graph .*other format"),
    ],
)
def test_a_graph_that_would_answer_differently_is_not_written(net: nn.Module, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        write_graph(image_graph(Named(net), (8, 8), {"mean": {}}), "torch", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_onnx_needs_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    graph = image_graph(Named(nn.Sequential(nn.Flatten(), nn.Linear(192, 2))), (8, 8), {"logits": {}})
    with monkeypatch.context() as patch:
        patch.setattr(graphs, "ONNX_BYTES", 100)
        with pytest.raises(UserError, match="a file of ONNX holds less than 2; use --format torch"):
            write_graph(graph, "onnx", tmp_path)
        patch.setattr(graphs, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r'pip install "vismt\[onnx\]"'):
            write_graph(graph, "onnx", tmp_path)
    found = graphs.find_spec
    monkeypatch.setattr(graphs, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    write_graph(graph, "onnx", tmp_path)
    assert "not compared with the model" in capsys.readouterr().out
    assert json.loads((tmp_path / PREPROCESSING).read_text())["largest_difference"] is None
    for name in ("onnx", "torch"):
        write_graph(graph, name, tmp_path)
        assert str(Path(graphs.__file__).parent).encode() not in (tmp_path / NAMES[name]).read_bytes()


def test_a_graph_that_onnxruntime_does_not_run_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object) -> None:
        raise RuntimeError("INVALID_ARGUMENT:\nanother batch")

    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *_, **__: SimpleNamespace(run=run))
    graph = image_graph(Named(nn.Sequential(nn.Flatten(), nn.Linear(192, 2))), (8, 8), {"logits": {}})
    with pytest.raises(UserError, match=r"INVALID_ARGUMENT: another batch.*other format") as error:
        write_graph(graph, "onnx", tmp_path)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
