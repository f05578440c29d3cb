"""The few-shot protocol: n episodes, clean and under attack, one JSON line each; resumes at the episode where it stopped.

Support images stay clean, the query images are attacked against the task's fixed classifier, and episode i is the same for
every model that runs the same sampler, so methods can be compared in pairs (vismt.stats).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from vismt import console
from vismt.errors import UserError
from vismt.metatune.episode_outcome import EpisodeOutcome, write_panel
from vismt.metatune.labelled import Episode
from vismt.records import Records
from vismt.seeds import mix_seed


class FewShotModel(Protocol):
    """A model that turns a support set into a classifier of query images (ProtoNet, a pool with merging, ...)."""

    def classifier(self, support_images: Tensor, support_labels: Tensor) -> nn.Module: ...


class Sampler(Protocol):
    """Episodes by number, the least number of ways in an episode, and a JSON-able description of the rules."""

    min_ways: int

    def __getitem__(self, index: int) -> Episode: ...

    def describe(self) -> Mapping[str, object]: ...


class QueryCondition(Protocol):
    """What a protocol records of a change of the query images: its seed, its text and its settings."""

    @property
    def seed(self) -> int: ...

    def describe(self, num_classes: int | None = None) -> str: ...

    def settings(self) -> Mapping[str, object]: ...


class Perturbs(Protocol):
    """An object that changes images (b, 3, h, w) in [0, 1] with labels (b,)."""

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, *, num_classes: int, seed: int) -> Tensor: ...


class QueryPerturbation(QueryCondition, Perturbs, Protocol):
    """A change of the query images: an attack or a corruption of `vismt.robustness`."""


class PreparedPerturbation(QueryCondition, Protocol):
    """A change of the query images that needs the episode's support (`vismt.robustness.transfer.Transfer`).

    `prepare` is called once an episode and returns the object that perturbs the images.
    """

    def prepare(self, support: Tensor, labels: Tensor) -> Perturbs: ...


class PixelStore(Protocol):
    """Images float (b, 3, h, w) in [0, 1] by int64 index (b,)."""

    def __getitem__(self, index: Tensor) -> Tensor: ...


def run_protocol(
    proto: FewShotModel,
    pixels: PixelStore,
    sampler: Sampler,
    *,
    episodes: int,
    attacks: Sequence[QueryPerturbation | PreparedPerturbation] = (),
    records: Path | None = None,
    panel: Path | None = None,
    device: torch.device | str | None = None,
    data: str = "data",
    fingerprint: str = "",
    label: str | None = None,
    batch: int = 256,
) -> dict[str, Tensor]:
    """Evaluate a few-shot model on episodes, clean and under attack.

    Args:
        proto: Turns a support set into a classifier of query images. A module is put in eval mode and restored.
        pixels: The images of the data set.
        sampler: Draws the episodes.
        episodes: Number of episodes, at least 2.
        attacks: Attacks and corruptions of the query images, with different texts.
        records: A JSON-lines file. Its first line holds the protocol and its hash; every episode adds a line when it ends,
            with the `mixture` (P,) of a classifier that has one. A file of the same protocol is continued (a torn last line
            is dropped), a file of another protocol is refused.
        panel: An .npz of episode 0's images and predictions, at most 5 support and 5 query images of each class.
        device: Where the classifiers run; by default the device of `proto`.
        data: The data set's name, part of the protocol's hash.
        fingerprint: The caller's name for the weights, part of the protocol's hash.
        label: Text of the progress bar.
        batch: Query images in one forward pass.

    Returns:
        Query accuracy in [0, 1] of every episode, float64 (episodes,), by condition: "clean", then each attack's text.

    Raises:
        UserError: Fewer than 2 episodes, two attacks with the same text, or records that do not fit or cannot be written.
    """
    if episodes < 2:
        raise UserError(f"evaluate {data}: {episodes} episodes have no confidence interval: use 2 or more.")
    conditions = ["clean", *(attack.describe(sampler.min_ways) for attack in attacks)]
    if len(set(conditions)) < len(conditions):
        raise UserError(f"evaluate {data}: two conditions have the same text in {conditions[1:]}: leave one out.")
    settings = {
        "data": data,
        "fingerprint": fingerprint,
        "sampler": dict(sampler.describe()),
        "conditions": conditions,
        "attacks": [dict(attack.settings()) for attack in attacks],
    }
    module = proto if isinstance(proto, nn.Module) else nn.Module()
    if device is None:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
    run = _EpisodeRunner(proto, pixels, sampler, dict(zip(conditions[1:], attacks, strict=True)), device, batch)
    log = Records(records, settings, conditions, key="episode")
    missing = [index for index in range(episodes) if index not in log]
    label = label or f"{data} episodes"
    if 0 < len(missing) < episodes:
        console.stage("resume", f"{label}: {episodes - len(missing)} of {episodes} are on record")
    modes = {submodule: submodule.training for submodule in module.modules()}
    module.eval()
    try:
        with log, console.bar("eval", label, episodes, episodes - len(missing)) as bar:
            for index in missing:
                outcome = run(index)
                log.add({"episode": index, **outcome.record()})
                if index == 0 and panel is not None:
                    write_panel(panel, outcome, getattr(pixels, "classes", None))
                bar.advance()
        if panel is not None and not panel.exists():
            write_panel(panel, run(0), getattr(pixels, "classes", None))
    finally:
        for submodule, training in modes.items():
            submodule.training = training
    rows = [log[index] for index in range(episodes)]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in conditions}


@dataclass
class _EpisodeRunner:
    """Runs one episode: the classifier of its support, and the predictions on its queries under every condition."""

    proto: FewShotModel
    pixels: PixelStore
    sampler: Sampler
    attacks: dict[str, QueryPerturbation | PreparedPerturbation]
    device: torch.device | str
    batch: int

    def __call__(self, index: int) -> EpisodeOutcome:
        episode = self.sampler[index]
        support = self.pixels[episode.support]
        query = self.pixels[episode.query]
        task = support.to(self.device), episode.support_labels.to(self.device)
        classifier = self.proto.classifier(*task).eval()
        predictions = {"clean": self._predict(classifier, query)}
        first = None
        for name, attack in self.attacks.items():
            prepared = attack.prepare(*task) if hasattr(attack, "prepare") else attack
            perturbed = []
            for part, (images, labels) in enumerate(
                zip(query.split(self.batch), episode.query_labels.split(self.batch), strict=True)
            ):
                images, labels = images.to(self.device), labels.to(self.device)
                seed = mix_seed(attack.seed, index, part)
                perturbed.append(prepared.perturb(classifier, images, labels, num_classes=episode.ways, seed=seed))
            adversarial = torch.cat(perturbed)
            first = adversarial if first is None else first
            predictions[name] = self._predict(classifier, adversarial)
        return EpisodeOutcome(episode, support, query, predictions, first, getattr(classifier, "mixture", None))

    @torch.no_grad()
    def _predict(self, classifier: nn.Module, images: Tensor) -> Tensor:
        return torch.cat([classifier(part.to(self.device)).argmax(1).cpu() for part in images.split(self.batch)])
