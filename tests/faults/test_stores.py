"""Damaged stores, changed models and data, and resumes on another base: computed again or refused, never other numbers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from helpers.amt_parts import backbone, drawn
from helpers.damage import damage_bytes
from helpers.faults import SOUND, cases, many, tried
from helpers.own_images import Pictures, write_folder
from helpers.tiny import tiny_vit
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import vismt
from vismt.base.errors import UserError
from vismt.base.identity import Identity, weights_digest
from vismt.base.objects import name_of
from vismt.data.images import open_images
from vismt.data.pixels import Pixels
from vismt.integrations.method_driver import MethodDriver
from vismt.llm.corda.covariance import load_covariances, save_covariances
from vismt.metatune.features import FeatureStore, features, number
from vismt.multitask.emtal.clusters import cluster_model

IMAGES = drawn(torch.arange(4).repeat_interleave(2), 3)
COVARIANCES = {"a": torch.arange(16.0).view(4, 4), "b": torch.eye(3)}


def pixels(folder: Path) -> torch.Tensor:
    return Pixels(open_images(folder / "pictures"), 8).raw(torch.arange(24))


def stored_features(folder: Path) -> torch.Tensor:
    net, index = backbone().requires_grad_(False).eval(), torch.arange(8)
    with FeatureStore("drawn") as store, torch.no_grad():
        return features(net, number(IMAGES, store, index))


def experts(folder: Path) -> torch.Tensor:
    return torch.cat(cluster_model(tiny_vit(), 4))


def covariances(folder: Path) -> torch.Tensor:
    place = folder / "cache" / "covariances"
    if not place.exists():
        save_covariances(COVARIANCES, place)
    return torch.cat([value.flatten() for value in load_covariances(place).values()])


STORES: dict[str, Callable[[Path], torch.Tensor]] = {
    "pixels": pixels,
    "features": stored_features,
    "experts": experts,
    "covariances": covariances,
}


def damaged(path: Path, random: Random) -> None:
    """Damage a file of a store, or put zeros or a named pipe in its place."""
    action = random.choice(["bytes", "bytes", "zeros", "zeros from", "pipe"])
    data = path.read_bytes()
    if action == "bytes":
        damage_bytes(path, random)
    elif action == "pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        start = random.randrange(len(data)) if action == "zeros from" else 0
        path.write_bytes(data[:start] + bytes(len(data) - start))


def trials(store: str, folder: Path, seeds: Iterable[int]) -> Iterator[str]:
    """Damage a store below `folder` once for each seed; yield what became of its numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VISMT_CACHE", str(folder / "cache"))
        write_folder(folder / "pictures")
        make = STORES[store]
        expected = make(folder)
        (cache,) = (folder / "cache").iterdir()
        whole = {
            path: path.read_bytes() for path in cache.iterdir() if path.is_file() and not path.name.startswith(".")
        }
        for seed in seeds:
            for path, content in whole.items():
                if path.is_dir():
                    path.rmdir()
                path.unlink(missing_ok=True)
                path.write_bytes(content)
            random = Random(seed)
            damaged(random.choice(sorted(whole)), random)
            yield tried(lambda: torch.equal(make(folder), expected))


@cases(quick=15, campaign=300)
@pytest.mark.parametrize("store", STORES)
def test_damaged_stores(store: str, tmp_path: Path, cases: int) -> None:
    assert set(trials(store, tmp_path, range(cases))) <= set(SOUND)


@cases(quick=20, campaign=2000)
def test_every_value_of_a_model_and_a_data_set_counts(cases: int) -> None:
    vit, names = tiny_vit(), set()
    whole, data = str(Identity(vit)), name_of(Pictures(), {})

    @many(cases)
    @given(st.randoms(use_true_random=False))
    def check(random: Random) -> None:
        value = random.choice([*vit.parameters()]).data.view(-1).view(torch.int32)
        place, bit = random.randrange(len(value)), 1 << random.randrange(31)
        value[place] ^= bit
        names.add(str(Identity(vit)))
        value[place] ^= bit
        assert whole not in names and str(Identity(vit)) == whole
        pictures = Pictures()
        image, _ = random.choice(pictures.examples)
        place = random.randrange(16), random.randrange(16)
        red, *others = image.getpixel(place)
        image.putpixel(place, (red ^ 1, *others))
        assert name_of(pictures, {}) != data

    check()


def changed(vit: nn.Module, random: Random) -> None:
    """Multiply a frozen weight of a layer, or change one value of one that is not adapted."""
    layers = [module for name, module in vit.named_modules() if isinstance(module, nn.Linear) and "head" not in name]
    if random.random() < 0.5:
        random.choice(layers).weight.data *= random.choice([-1, 0.9, 1.1, 2])
    else:
        value = random.choice([vit.pos_embed, vit.norm.bias, *(block.norm1.weight for block in vit.blocks)]).data.view(
            -1
        )
        value[random.randrange(len(value))] += 1e-3


@cases(quick=15, campaign=500)
def test_resumes_on_another_base(cases: int) -> None:
    """What both callbacks compare; tests/integrations/test_hf.py and tests/integrations/test_lightning.py run the trainers."""

    def belonging(change: Callable[[nn.Module], object]) -> list[dict]:
        vit = tiny_vit()
        change(vit)
        vismt.adapt(vit, "lora", rank=2)
        return MethodDriver(vit).belonging()

    saved = belonging(lambda vit: None)
    MethodDriver.check_resumed(saved, belonging(lambda vit: None))

    @many(cases)
    @given(st.randoms(use_true_random=False))
    def check(random: Random) -> None:
        with pytest.raises(UserError, match="of another base model"):
            MethodDriver.check_resumed(saved, belonging(lambda vit: changed(vit, random)))

    check()


def test_a_resume_is_of_the_same_base_whatever_the_training_changed() -> None:
    vit = tiny_vit()
    vismt.adapt(vit, "pissa", rank=2)
    driver = MethodDriver(vit)
    saved, before = driver.belonging(), weights_digest(vit)
    with torch.no_grad():
        for parameter in vit.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    assert weights_digest(vit) != before
    MethodDriver.check_resumed(saved, driver.belonging())
