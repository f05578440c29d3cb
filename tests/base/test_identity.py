"""Identities of models, data and code: everything that decides a number counts, and nothing else."""

from __future__ import annotations

import functools
import importlib
import linecache
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.lm_parts import save_lm
from helpers.own_images import Pictures
from helpers.tiny import tiny_vit
from PIL import Image
from timm.layers import Mlp
from timm.models.vision_transformer import Attention
from torch import nn

import vismt
from vismt.base.errors import UserError
from vismt.base.identity import Identity, version, weights_digest
from vismt.base.objects import name_of

SCALE = {"factor": 2.0}


def scaled(x, by=1.0):
    return x * SCALE["factor"] * by


class Net(nn.Module):
    """A module of a user, with what modules have: settings, buffers, modules in a list, a function of its file."""

    power = 1

    def __init__(self, **settings) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 48, 8)
        self.norm = nn.BatchNorm1d(48)
        self.drop = nn.Dropout(0.1)
        self.settings = {"slope": 0.1, **settings}
        self.offsets = [torch.zeros(3), np.zeros(2)]
        self.register_buffer("table", torch.zeros(2000), persistent=False)
        self.requires_grad_(False)

    def forward(self, images):
        return self.finish(self.norm(self.conv(images).mean((2, 3))))

    def finish(self, x):
        return F.leaky_relu(scaled(x), self.settings["slope"]) ** self.power


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def on_instance(model: Net) -> None:
    model.finish = lambda x: x


CHANGES: dict[str, Callable[[Any, pytest.MonkeyPatch], object]] = {
    "one value of many": lambda model, _: model.conv.weight.view(-1)[5000].add_(1e-6),
    "through .data": lambda model, _: model.conv.bias.data.mul_(2),
    "sign of zero": lambda model, _: model.norm.bias.neg_(),
    "a buffer": lambda model, _: model.norm.running_mean.add_(1),
    "a buffer that is not saved": lambda model, _: model.table[1999].add_(1),
    "dtype": lambda model, _: model.double(),
    "eps": lambda model, _: setattr(model.norm, "eps", 1e-3),
    "dropout": lambda model, _: setattr(model.drop, "p", 0.2),
    "stride": lambda model, _: setattr(model.conv, "stride", (2, 2)),
    "a setting in a dict": lambda model, _: model.settings.update(slope=0.2),
    "a tensor that is no buffer": lambda model, _: model.offsets[0].add_(1),
    "an array": lambda model, _: model.offsets[1].__setitem__(0, 1),
    "a submodule replaced": lambda model, _: setattr(model, "drop", nn.Identity()),
    "a method on the instance": lambda model, _: on_instance(model),
    "forward on the instance": lambda model, _: setattr(model.norm, "forward", torch.tanh),
    "a method of a library's class": lambda _, patch: patch.setattr(nn.Conv2d, "forward", lambda self, x: x),
    "a hook": lambda model, _: model.norm.register_forward_hook(lambda module, inputs, output: output * 2),
    "a hook before": lambda model, _: model.norm.register_forward_pre_hook(lambda module, inputs: None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_all_that_decides_an_output_counts(name: str, monkeypatch) -> None:
    model = net()
    before = str(Identity(model))
    assert str(Identity(net())) == before
    with torch.no_grad():
        CHANGES[name](model, monkeypatch)
    assert str(Identity(model)) != before
    monkeypatch.undo()


VIT_CHANGES: dict[str, Callable[[Any, pytest.MonkeyPatch], object]] = {
    "_pos_embed on the instance": lambda vit, _: setattr(vit, "_pos_embed", lambda x: x.flatten(1, 2)),
    "forward_intermediates on the instance": lambda vit, _: setattr(
        vit, "forward_intermediates", functools.partial(vit.forward_intermediates, norm=False)
    ),
    "Mlp.forward": lambda _, patch: patch.setattr(Mlp, "forward", lambda self, x: self.fc2(self.fc1(x))),
    "Attention.forward": lambda _, patch: patch.setattr(Attention, "forward", lambda self, x, **options: x),
    "scale of attention": lambda vit, _: setattr(vit.blocks[0].attn, "scale", 1.0),
    "eps": lambda vit, _: setattr(vit.norm, "eps", 0.5),
    "pool": lambda vit, _: setattr(vit, "global_pool", "avg"),
}


@pytest.mark.parametrize("name", VIT_CHANGES)
def test_code_and_settings_of_a_model_of_timm_count(name: str, monkeypatch) -> None:
    vit = tiny_vit()
    before = Identity(vit)
    assert before.unknown is None and before.foreign is None and str(Identity(tiny_vit())) == str(before)
    VIT_CHANGES[name](vit, monkeypatch)
    after = Identity(vit)
    assert str(after) != str(before)
    assert after.foreign or name in ("scale of attention", "eps", "pool")
    monkeypatch.undo()


def test_what_does_not_decide_an_output_does_not_count() -> None:
    model = net()
    before = str(Identity(model))
    model.eval().requires_grad_(True)
    model(torch.rand(2, 3, 8, 8))
    assert str(Identity(model)) == before
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    assert str(Identity(model)) == before


def test_weights_beside_a_model_and_skipped_modules() -> None:
    model, other = net(), net()
    with torch.no_grad():
        other.conv.weight.mul_(2)
    weights = {"conv.weight": other.conv.weight}
    assert str(Identity(model, weights)) != str(Identity(model, {})) != str(Identity(other, {}))
    assert str(Identity(model, skip=[model.conv])) == str(Identity(other, skip=[other.conv]))
    assert weights_digest(model) != weights_digest(other)


def test_values_of_an_unreadable_object_have_no_identity(tmp_path) -> None:
    with (tmp_path / "x").open("w") as file:
        for value in (file, (number for number in range(3)), {"deep": [file]}, functools.partial(print, file=file)):
            assert Identity(value).unknown
    nested: list = []
    for _ in range(5000):
        nested = [nested]
    assert Identity(nested).unknown
    itself: list = [1]
    itself.append(itself)
    assert Identity(itself).unknown is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (1, True),
        (1, 1.0),
        ("1", 1),
        (("ab", "c"), ("a", "bc")),
        ([[1], 2], [1, [2]]),
        ({"a": 1}, {"a": 2}),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
        (np.zeros(4, np.float32), np.zeros(2, np.float64)),
        (np.array(["a", None], dtype=object), np.array(["b", None], dtype=object)),
        (Image.new("L", (4, 2), 3), Image.new("L", (2, 4), 3)),
        (functools.partial(scaled, by=1), functools.partial(scaled, by=2)),
    ],
)
def test_values_that_look_alike(one, other) -> None:
    assert str(Identity(one)) != str(Identity(other))


def test_an_image_counts_with_its_palette() -> None:
    images = [Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4), "P") for _ in range(2)]
    images[0].putpalette(list(range(48)))
    images[1].putpalette(list(range(1, 49)))
    assert images[0].tobytes() == images[1].tobytes() and str(Identity(images[0])) != str(Identity(images[1]))


def test_a_set_has_no_order() -> None:
    assert str(Identity({"a", "b", "c"})) == str(Identity({"c", "b", "a"})) != str(Identity({"a", "b"}))


def test_own_code_counts_by_its_source_file(tmp_path, monkeypatch) -> None:
    """Also without a file, as in a notebook, where the text counts."""
    monkeypatch.syspath_prepend(tmp_path)
    seen = []
    for number, text in enumerate(("return 1", "return 2", "return 1")):
        (tmp_path / "own_code.py").write_text(f"class Own:\n    def f(self):\n        {text}\n")
        os.utime(tmp_path / "own_code.py", (number, number))
        monkeypatch.delitem(sys.modules, "own_code", raising=False)
        importlib.invalidate_caches()
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        seen.append(Identity(importlib.import_module("own_code").Own()))
    assert str(seen[0]) == str(seen[2]) != str(seen[1]) and all(one.foreign == "Own" for one in seen)
    for text in ("1", "2", "1"):
        scope: dict[str, Any] = {"__name__": "__main__"}
        linecache.cache["<cell>"] = len(text), None, [f"def f(): return {text}\n"], "<cell>"
        exec(compile(f"def f(): return {text}\n", "<cell>", "exec"), scope)
        seen.append(Identity(scope["f"]))
    assert str(seen[3]) == str(seen[5]) != str(seen[4]) and seen[3].unknown is None
    exec("def f(): return 1", scope)
    assert Identity(scope["f"]).unknown == "the source of f"


def test_our_own_version_is_that_of_the_source_files() -> None:
    assert len(version("vismt")) == 32 and version("vismt") != version("vismt.data")
    assert torch.__version__.startswith(version("torch")) and version("no_such_package") == ""


@pytest.mark.slow
def test_other_processes_have_the_same_identity(tmp_path) -> None:
    save_lm(tmp_path / "lm")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from vismt.base.identity import Identity\n"
        "from helpers.tiny import tiny_vit; from test_identity import net\n"
        "lm = AutoModelForCausalLM.from_pretrained(sys.argv[1]).base_model\n"
        "print(*(Identity(m) for m in (tiny_vit(), net(), lm)), Identity(lm).unknown)"
    )
    seen = set()
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "lm"],
            capture_output=True,
            text=True,
            env={
                **__import__("os").environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": ":".join([str(Path(__file__).parent), *sys.path]),
            },
        )
        assert run.returncode == 0, run.stderr
        seen.add(run.stdout)
    assert len(seen) == 1 and seen.pop().endswith(" None\n")


# ---- studies of objects -----------------------------------------------------------------------------------------------


class Features(nn.Module):
    """The mean colour of an image, in a power."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power
        self.scale = nn.Parameter(torch.ones(3000), requires_grad=False)

    def forward(self, images):
        return images.mean((2, 3)).pow(self.power) * self.scale[-1]


STUDY = {"ways": 3, "shots": 1, "queries": 2, "episodes": 3, "img_size": 16}


def late(model: Features) -> Features:
    """Change one of the last weights."""
    model.scale.data[-1] = 2
    return model


def other_picture(place: int, label: int | None = None) -> Pictures:
    pictures = Pictures()
    image, old = pictures.examples[place]
    pictures.examples[place] = (Image.new("RGB", image.size), old) if label is None else (image, label)
    return pictures


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (lambda: Features(2.0), Pictures),
        (lambda: late(Features()), Pictures),
        (Features, lambda: other_picture(14)),
        (Features, lambda: other_picture(14, 0)),
        (Features, lambda: Pictures(as_tensors=True)),
    ],
)
def test_a_folder_is_not_continued_with_another_object(model, data, tmp_path) -> None:
    vismt.evaluate_fewshot(Features(), Pictures(), folder=tmp_path / "run", **STUDY)
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    with pytest.raises(UserError, match="holds a run of another configuration; give another folder"):
        vismt.evaluate_fewshot(model(), data(), folder=tmp_path / "run", **STUDY)
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == before


def test_a_folder_is_continued_with_the_same_object(tmp_path, capsys) -> None:
    first = vismt.evaluate_fewshot(Features(), Pictures(), folder=tmp_path / "run", **STUDY)
    again = vismt.evaluate_fewshot(Features().eval(), Pictures(), folder=tmp_path / "run", **STUDY)
    assert [row.value for row in again] == [row.value for row in first]


def test_an_object_without_identity_has_a_name_of_its_own(capsys) -> None:
    model = Features()
    model.rows = iter(lambda: 1, 2)
    names = {name_of(model, {}), name_of(model, {})}
    assert len(names) == 2
    assert (
        "Features has no readable content (callable_iterator): its folder cannot be continued"
        in capsys.readouterr().out
    )


def test_augmentation_does_not_change_a_name_nor_the_generators() -> None:
    class Augmented(Pictures):
        def __getitem__(self, i):
            image, label = super().__getitem__(i)
            return image, label, float(torch.rand(())), float(np.random.rand())

    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    names = {name_of(Augmented(), {})}
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    torch.rand(3), np.random.rand(3)
    assert names == {name_of(Augmented(), {})}


def test_labels_and_classes_beside_the_examples_count() -> None:
    names = set()
    for attributes in ({}, {"targets": [0] * 24}, {"classes": ("a", "b", "c")}):
        pictures = Pictures()
        vars(pictures).update(attributes)
        names |= {name_of(pictures, {}), name_of(torch.utils.data.Subset(pictures, range(20)), {})}
    assert len(names) == 6
