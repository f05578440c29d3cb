"""Studies from Python: numbers are those of the jobs, data and models come in every documented form."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
from pathlib import Path
from statistics import stdev

import pytest
import torch
from helpers.own_images import ByColour, Pictures, picture, write_folder, write_table
from helpers.tiny import tiny_vit
from torch import nn
from torch.utils.data import TensorDataset
from torchvision.datasets import ImageFolder

import vismt
from vismt.backbones.any_module import ModuleBackbone
from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError
from vismt.base.objects import registered
from vismt.data.images import open_images
from vismt.data.pixels import Pixels
from vismt.jobs import open_run
from vismt.metatune import EpisodeSampler, ProtoNet, run_protocol
from vismt.robustness import AttackSpec, evaluate_classifier
from vismt.storage.lines import read_lines
from vismt.uncertainty.intervals import student_quantile

EPISODES = {"ways": 3, "shots": 1, "queries": 3, "episodes": 4}


class Features(nn.Module):
    """A backbone that timm did not make: the channels of a convolution at one pixel, so that it is often wrong."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, 6, 3)
        self.last = nn.Linear(6, 6)

    def forward(self, images):
        return self.last(self.conv(images).relu()[:, :, 0, 0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("mine") / "pictures")


def value(results, condition: str = "clean", arm: str | None = None, data: str | None = None) -> float:
    rows = [
        row
        for row in results
        if (row.condition, row.metric) == (condition, "accuracy")
        and arm in (None, row.arm)
        and data in (None, row.data)
    ]
    assert len(rows) == 1, rows
    return rows[0].value


def clusters(spread: float = 2.0) -> TensorDataset:
    """Feature vectors of 6 classes, of which each has a direction of its own."""
    labels = torch.arange(6).repeat_interleave(60)
    noise = torch.randn(len(labels), 8, generator=torch.Generator().manual_seed(0))
    return TensorDataset(noise + spread * torch.nn.functional.one_hot(labels, 8), labels)


def test_several_heads_on_precomputed_features_with_both_intervals(tmp_path: Path) -> None:
    heads = ["prototypes", "ridge"]
    options = {"ways": 3, "shots": 1, "queries": 5, "episodes": 40}
    results = vismt.evaluate_fewshot(
        {"net": nn.Identity()}, {"mine": clusters()}, **options, head=heads, folder=tmp_path
    )
    rows = {(row.arm, row.metric): row for row in results if "accuracy" in row.metric}
    assert {arm for arm, _ in rows} == {"net", "net+ridge"} and {row.data for row in results} == {"mine"}
    for arm in ("net", "net+ridge"):
        ours, usual = rows[arm, "accuracy"], rows[arm, "accuracy (interval over episodes)"]
        values = [line["clean"] for line in read_lines(tmp_path / "records" / f"{usual.stem}.jsonl")]
        assert usual.value == pytest.approx(ours.value) and usual.further and not ours.further
        half = student_quantile(0.975, 39) * stdev(values) / 40**0.5
        assert usual.high - usual.value == pytest.approx(half) and usual.interval == "sampler"
        assert ours.interval == "images" and ours.n == usual.n == 40 and 0.4 < ours.value < 1
    # The same numbers from the vectors themselves: the nearest prototype by cosine, episode by episode.
    features, labels = clusters().tensors
    sampler = EpisodeSampler(labels, ways=3, shots=1, queries=5, seed=1, parts=5, groups=None)
    right = []
    for number in range(40):
        episode = sampler[number]
        support, query = (torch.nn.functional.normalize(features[at], dim=1) for at in (episode.support, episode.query))
        answers = episode.support_labels[(query @ support.T).argmax(1)]
        right.append((answers == episode.query_labels).double().mean())
    assert float(torch.stack(right).mean()) == pytest.approx(rows["net", "accuracy"].value, abs=1e-6)
    assert (
        "It is smaller because it takes the episodes as independent" in results.report().with_suffix(".md").read_text()
    )
    usual = vismt.evaluate_fewshot(nn.Identity(), clusters(), **options, sampling="with_replacement")
    assert [row.interval for row in usual if row.metric.startswith("accuracy")] == ["sampler"]


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        (nn.Identity(), {"head": ["prototypes", "rigde"]}, "head: no head 'rigde'. Near: 'ridge'"),
        (nn.Identity(), {"head": []}, "name at least one"),
        (nn.Identity(), {"sampling": "part"}, "'part' is not known. Near: 'parts'"),
        (nn.Identity(), {"attacks": ["pgd"]}, "it has features and no pixels"),
        (
            nn.Conv2d(3, 4, 3),
            {"img_size": 8},
            "features of 8 numbers, which the model does not take; give nn.Identity()",
        ),
    ],
)
def test_what_features_and_heads_cannot_be(model: nn.Module, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        vismt.evaluate_fewshot(model, clusters(), **{**EPISODES, **changes})


def test_features_are_not_taken_for_images_nor_images_for_features(folder: Path) -> None:
    with pytest.raises(UserError, match=r"it has images, and nn.Identity\(\) is for precomputed features"):
        vismt.evaluate_fewshot(nn.Identity(), folder, **EPISODES)
    with pytest.raises(UserError, match=r"cannot be decoded \(it has shape \(8,\)"):
        vismt.audit(Features(), clusters(), attacks=["fgsm"], img_size=8)
    broken = TensorDataset(torch.tensor([[1.0, float("nan")]] * 4), torch.tensor([0, 0, 1, 1]))
    with pytest.raises(UserError, match="a feature is NaN or infinite"):
        vismt.evaluate_fewshot(nn.Identity(), broken, **EPISODES)


def test_fewshot_is_the_protocol_on_the_stock_model(folder: Path) -> None:
    model = tiny_vit()
    results = vismt.evaluate_fewshot(model, folder, **EPISODES, attacks=["fgsm"], epsilon="8/255")
    images = open_images(folder)
    sampler = EpisodeSampler(images.labels, ways=3, shots=1, queries=3, seed=1, names=images.classes)
    spec = AttackSpec("fgsm", 8 / 255)
    wanted = run_protocol(ProtoNet(Backbone(model)), Pixels(images, 16), sampler, episodes=4, attacks=[spec])
    assert value(results) == pytest.approx(float(wanted["clean"].mean()))
    assert value(results, spec.label) == pytest.approx(float(wanted[spec.describe(3)].mean()))
    assert {(row.data, row.arm, row.n, row.unit) for row in results} == {
        ("pictures", "VisionTransformer", 4, "episodes")
    }


def test_episodes_of_other_images_with_the_same_labels_are_others(folder: Path, tmp_path: Path) -> None:
    def examples(images: Path, size: int = 16) -> str:
        return next(iter(vismt.evaluate_fewshot(Features(), images, **EPISODES, img_size=size))).examples

    other = write_folder(tmp_path / folder.name)
    assert examples(other) == examples(folder) == examples(folder, 8)
    picture((0, 0, 0), 7).save(other / "red" / "00.png")
    assert examples(other) != examples(folder)


def test_fewshot_has_probabilities_and_sets_of_other_classes(folder: Path) -> None:
    other = {"noise": Pictures(count=9)}
    results = vismt.evaluate_fewshot(Features(), folder, **EPISODES, head="laplace", ood=other, img_size=16)
    rows = {(row.condition, row.metric): row for row in results}
    quality = {("clean", metric) for metric in ("accuracy", "ECE-15", "NLL in nats", "Brier")}
    assert set(rows) == {*quality, ("against noise", "AUROC")}
    assert {row.arm for row in results} == {"Features+laplace"} and rows["against noise", "AUROC"].n == 4
    plain = vismt.evaluate_fewshot(Features(), folder, **EPISODES, img_size=16)
    assert {(row.condition, row.metric) for row in plain} == quality


def test_any_module_is_a_backbone_and_models_are_compared_on_the_same_episodes(folder: Path) -> None:
    models = {"a": Features(0), "b": Features(1), "a again": Features(0)}
    results = vismt.evaluate_fewshot(models, folder, **EPISODES, img_size=16)
    assert value(results, arm="a") == value(results, arm="a-again") != value(results, arm="b")
    images = open_images(folder)
    sampler = EpisodeSampler(images.labels, ways=3, shots=1, queries=3, seed=1)
    net = ProtoNet(ModuleBackbone(models["b"], 16))
    assert value(results, arm="b") == pytest.approx(
        float(run_protocol(net, Pixels(images, 16), sampler, episodes=4)["clean"].mean())
    )
    with pytest.raises(UserError, match="Features does not say the size of its images; give img_size"):
        vismt.evaluate_fewshot(Features(), folder, **EPISODES)


def test_every_form_of_data_has_the_same_numbers(folder: Path) -> None:
    model = Features()
    forms = {
        "table": write_table(folder),
        "pillow": Pictures(),
        "tensors": Pictures(as_tensors=True),
        "torchvision": ImageFolder(str(folder)),
        "subset": torch.utils.data.Subset(Pictures(count=9), [i for i in range(27) if i % 9 < 8]),
    }
    by_name = {name: str(data) if isinstance(data, Path) else data for name, data in forms.items()}
    results = vismt.evaluate_fewshot(model, by_name, **EPISODES, img_size=16)
    expected = value(vismt.evaluate_fewshot(model, folder, **EPISODES, img_size=16))
    values = {row.data: row.value for row in results if row.metric == "accuracy"}
    assert values == dict.fromkeys(["table", "pillow", "tensors", "torchvision", "subset"], expected)


def test_audit_is_the_evaluation_of_the_classifier(folder: Path) -> None:
    results = vismt.audit(
        ByColour(), folder, attacks=["fgsm"], corruptions=["contrast"], epsilon="60/255", img_size=16, batch=12
    )
    images = open_images(folder)
    batches = [(Pixels(images, 16)[torch.arange(24)], images.labels)]
    clean, attacked = evaluate_classifier(ByColour(), batches, [AttackSpec("fgsm", 60 / 255)], num_classes=3)
    assert value(results) == clean.value == 1
    assert value(results, "FGSM linf 60/255") == attacked.value < 1
    assert sum(row.family == "contrast" for row in results) == 5
    assert {row.arm for row in results} == {"ByColour"}


def test_audit_of_a_timm_model_normalises_its_images(folder: Path) -> None:
    model = tiny_vit(num_classes=3)
    results = vismt.audit(model, folder, attacks=())
    images = open_images(folder)
    mean, std = (torch.tensor(model.pretrained_cfg[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        right = model((Pixels(images, 16)[torch.arange(24)] - mean) / std).argmax(1) == images.labels
    assert value(results) == pytest.approx(float(right.float().mean()))


def test_meta_tuning_changes_a_copy(folder: Path) -> None:
    model = tiny_vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"rank": 2, "steps": 3, "lr": 0.05, "ways": 3, "shots": 1, "queries": 3, "episodes": 4}
    results = vismt.meta_tune(model, Pictures(), folder, **settings)
    assert {row.arm for row in results} == {"frozen", "adapted"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    tuned = results.model().state_dict()
    assert set(tuned) == set(before)
    assert not torch.equal(tuned["blocks.0.attn.qkv.weight"], before["blocks.0.attn.qkv.weight"])
    again = vismt.meta_tune(model, Pictures(), folder, **settings)
    assert [row.value for row in again] == [row.value for row in results]


def test_the_adapter_of_a_study_takes_every_key_of_adapt(folder: Path) -> None:
    adapt = {"targets": r"blocks\..*qkv", "alpha": 4.0, "options": {"rslora": True}}
    settings = {"rank": 2, "steps": 1, "ways": 3, "shots": 1, "queries": 2, "episodes": 2}
    results = vismt.meta_tune(tiny_vit(), Pictures(), folder, adapt=adapt, **settings)
    with registered(results.objects):
        specs = open_run(results.folder).job.adapted().vismt_record.specs
    assert [spec.path for spec in specs] == [f"blocks.{i}.attn.qkv" for i in range(2)]
    assert {spec.settings.scale for spec in specs} == {4.0 / 2**0.5}
    with pytest.raises(UserError, match=r"config: unknown key 'adapt\.target'\. Near: 'targets'"):
        vismt.meta_tune(tiny_vit(), Pictures(), folder, adapt={"target": "qkv"}, **settings)


@pytest.mark.slow
def test_meta_tuning_of_a_pool(folder: Path) -> None:
    model = tiny_vit()
    settings = {"rank": 2, "steps": 2, "ways": 3, "shots": 1, "queries": 2, "episodes": 3}
    name = "blocks.0.attn.qkv.weight"
    one = vismt.meta_tune(model, Pictures(), folder, levels=[2], **settings)
    assert torch.equal(one.model().state_dict()[name], one.model("expert:2").state_dict()[name])
    results = vismt.meta_tune(model, Pictures(), folder, levels=[1, 4], **settings)
    assert {row.arm for row in results} == {"frozen", "merged"}
    weights = {name_: results.model(name_).state_dict()[name] for name_ in ("frozen", "average", "1", "expert:4")}
    assert torch.equal(weights["frozen"], model.state_dict()[name])
    mean = (weights["1"] + weights["expert:4"]) / 2
    assert torch.allclose(weights["average"], mean, atol=1e-6) and not torch.allclose(weights["1"], weights["expert:4"])
    for asked, words in (
        ("merged", "'merged' is the experts, merged for each task by"),
        (None, "'merged' is the experts"),
        ("expert:3", "it has no single adapter 'expert:3'"),
    ):
        with pytest.raises(UserError, match=words + r".*; name one expert \(1, 4\), or average") as caught:
            results.model(asked)
        assert "--" not in str(caught.value)


def test_a_study_from_a_mapping(folder: Path, tmp_path: Path) -> None:
    config = {
        "task": "multitask",
        "model": {"name": "test_vit", "img_size": 32, "pretrained": False},
        "adapt": {"method": "lora", "rank": 2},
        "tasks": [{"name": "colours", "train": [Pictures()], "test": [folder]}],
        "batch": 4,
        "train": {"steps": 2, "lr": 1.0e-2},
    }
    results = vismt.train(config, tmp_path / "run")
    assert {(row.data, row.n) for row in results} == {("colours", 24)}
    assert results.folder == tmp_path / "run" and (tmp_path / "run" / "results.jsonl").exists()
    assert [row.value for row in vismt.train(config, tmp_path / "run")] == [row.value for row in results]
    with pytest.raises(UserError, match="holds a run of another configuration; give another folder"):
        vismt.train({**config, "seed": 1}, tmp_path / "run")
    with pytest.raises(UserError, match=r"config: unknown key 'adpt'\. Near: 'adapt'"):
        vismt.train({**config, "adpt": None})
    with pytest.raises(UserError, match=r"'<Pictures \w{8}>' is a Python object, which is not given here"):
        open_run(tmp_path / "run").job.check_data()


def test_results_are_a_table_and_a_report(folder: Path, tmp_path: Path) -> None:
    results = vismt.evaluate_fewshot(Features(), folder, **EPISODES, img_size=16)
    lines = repr(results).splitlines()
    assert lines[0].split()[:2] == ["data", "task"] and len(lines) == 5
    assert re.search(r"pictures .* 3-way 1-shot .* clean .* Features .* \d+\.\d ± \d+\.\d .* 4 episodes", lines[1])
    page = results.report(tmp_path / "report")
    assert page == tmp_path / "report" / "report.html" and "3-way 1-shot" in page.read_text()
    assert results.report(tmp_path / "report") == page
    with pytest.raises(UserError, match="holds a run of another configuration"):
        vismt.evaluate_fewshot(Features(1), folder, **EPISODES, img_size=16).report(tmp_path / "report")


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import vismt
from helpers.own_images import ByColour
results = vismt.audit(ByColour(), {data!r}, attacks=["fgsm"], images=6, img_size=16)
print("page", results.report())
"""


@pytest.mark.slow
def test_a_printed_path_is_there_when_the_script_has_ended(folder: Path, tmp_path: Path) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent), data=str(folder))
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    (page,) = re.findall(r"^page (.*)$", run.stdout, re.M)
    assert re.fullmatch(r"runs/robustness-[0-9a-f]{10}/report\.html", page) and (tmp_path / page).is_file()
    for path in re.findall(r"[\w./-]+/[\w./-]+\.(?:html|md|csv|jsonl|svg)\b", run.stdout):
        assert (tmp_path / path).exists(), path


def test_the_predictions_of_a_temporary_run_stay(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    results = vismt.evaluate_fewshot(Features(), folder, **EPISODES, img_size=16)
    files = vismt.predict(results, folder / "red", support=folder).files
    page = results.report()
    assert vismt.predict(results, folder / "red", support=folder).files == files  # the folder is the run's
    del results
    gc.collect()
    assert page.is_file() and files[0].is_file() and files[0].parent.parent == page.parent


def test_results_as_a_table_of_pandas(folder: Path) -> None:
    pandas = pytest.importorskip("pandas")
    results = vismt.evaluate_fewshot(Features(), folder, **EPISODES, img_size=16)
    table = results.to_pandas()
    assert isinstance(table, pandas.DataFrame) and list(table["value"]) == [row.value for row in results]


def test_user_errors(folder: Path, tmp_path: Path) -> None:
    normalised = Pictures(as_tensors=True)
    normalised.examples = normalised.examples[:6]
    cases = [
        (
            lambda: vismt.evaluate_fewshot("vit_tiny_patch16_22", folder),
            "'vit_tiny_patch16_22' is neither an asset nor",
        ),
        (lambda: vismt.evaluate_fewshot(Features(), tmp_path / "none", img_size=16), "none': no such file or folder"),
        (lambda: vismt.evaluate_fewshot(Features(), folder, attacks="pgd", img_size=16), "attacks: 'pgd' is a text"),
        (lambda: vismt.audit(Features(), folder, img_size=16), "has 6 outputs, .* has 3 classes"),
        (lambda: vismt.audit(nn.Conv2d(3, 4, 3), folder, img_size=16), "Conv2d gives no class scores"),
        (lambda: vismt.evaluate_fewshot({}, folder), "name at least one model"),
        (lambda: vismt.evaluate_fewshot({"name": "vit", "img_size": 42}, folder), "img_size is 42; give a model"),
        (lambda: vismt.evaluate_fewshot(Features(), Scaled(), **EPISODES, img_size=16), "values from .* needed .0, 1"),
        (lambda: vismt.evaluate_fewshot(Features(), Named(), **EPISODES, img_size=16), "must be a whole number from 0"),
        (lambda: vismt.evaluate_fewshot(Features(), iter([]), img_size=16), "has no length or no index"),
        (
            lambda: vismt.evaluate_fewshot(Features(), folder, n_way=5),
            "^evaluate_fewshot: no argument 'n_way'. Near: 'ways'.$",
        ),
        (lambda: vismt.meta_tune("vit", folder, folder, learning_rate=1), "no argument 'learning_rate'. Near: 'lr'.$"),
        (
            lambda: vismt.audit(Features(), folder, zzz=1),
            "no argument 'zzz'. Known: 'attacks', 'batch', .*, 'seed'.$",
        ),
        (lambda: vismt.train({}, foldr="x"), "train: no argument 'foldr'. Near: 'folder'"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()


def test_a_null_character_in_a_path_is_a_user_error(folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {**EPISODES, "img_size": 16}
    results = vismt.evaluate_fewshot(Features(), folder, **given)
    model = tiny_vit()
    vismt.adapt(model, "lora", targets=["qkv"], rank=2)
    for call in (
        lambda: vismt.evaluate_fewshot(Features(), folder, **given, folder="a\0b"),
        lambda: results.report("a\0b"),
        lambda: vismt.predict(results, folder / "red", support=folder, to="a\0b"),
        lambda: vismt.predict(results, "a\0b", support=folder),
        lambda: vismt.save_adapter(model, "a\0b"),
        lambda: vismt.export_peft(model, "a\0b"),
    ):
        with pytest.raises(UserError, match="null"):
            call()
    assert {path.name for path in tmp_path.iterdir()} <= {"runs"}


class Scaled(Pictures):
    """Images that were normalised."""

    def __getitem__(self, i):
        label = super().__getitem__(i)[1]
        return torch.full((3, 4, 4), -1.5), label


class Named(Pictures):
    """Labels that are texts."""

    def __getitem__(self, i):
        image, label = super().__getitem__(i)
        return image, self.classes[label]
