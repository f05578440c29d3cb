"""The few-shot protocol: n episodes, clean and under attack, one JSON line each; resumes at the episode where it stopped.

Support images stay clean, the query images are attacked against the task's fixed classifier, and episode i is the same for
every model that runs the same sampler, so methods can be compared in pairs (intervals.py).
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
from vismt.metatune.labelled import Episode
from vismt.metatune.panel import Outcome, write_panel
from vismt.records import Records
from vismt.seeds import mix_seed
from vismt.stats import DomainRow, domain_average, domain_table, mean_interval, paired_bootstrap

__all__ = [
    "DomainRow",
    "domain_average",
    "domain_table",
    "mean_interval",
    "paired_bootstrap",
    "run_protocol",
]


class Task(Protocol):
    """Anything that turns a support set into a classifier of query images (ProtoNet, a pool with merging, ...)."""

    def classifier(self, support_images: Tensor, support_labels: Tensor) -> nn.Module: ...


class Sampler(Protocol):
    """Episodes by number, the least number of ways in one, and a JSON-able account of its rules."""

    min_ways: int

    def __getitem__(self, index: int) -> Episode: ...

    def describe(self) -> Mapping[str, object]: ...


class Attack(Protocol):
    """A change of the query images (`vismt.robustness.attacks.AttackSpec`, or a corruption).

    One that needs the episode's support has `prepare(support_images, support_labels)`, which gives what perturbs in its
    place; it is called once an episode (`vismt.robustness.transfer.Transfer`).
    """

    seed: int

    def describe(self, num_classes: int | None = None) -> str: ...

    def settings(self) -> Mapping[str, object]: ...

    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, *, num_classes: int, seed: int) -> Tensor: ...


class PixelStore(Protocol):
    """Images float (b, 3, h, w) in [0, 1] by int64 index (b,)."""

    def __getitem__(self, index: Tensor) -> Tensor: ...


def run_protocol(
    proto: Task,
    pixels: PixelStore,
    sampler: Sampler,
    *,
    episodes: int,
    attacks: Sequence[Attack] = (),
    records: Path | None = None,
    panel: Path | None = None,
    device: torch.device | str | None = None,
    data: str = "data",
    fingerprint: str = "",
    label: str | None = None,
    batch: int = 256,
) -> dict[str, Tensor]:
    """Query accuracy of every episode, by condition: "clean" first, then each attack's text; float64 (episodes,) in [0, 1].

    records: a JSON-lines file; its first line holds the protocol and its hash, then one line per episode, written as it
    ends; a classifier with a `mixture` (P,) of experts has it on the line too. An existing file of the same protocol is
    continued (a torn last line is dropped), one of another is refused.
    panel: an .npz of episode 0's images and predictions, at most 5 support and 5 query images per class.
    fingerprint: the caller's name for these weights; data: the set's name; both are part of the hash. batch: images at a
    time. A module is put in eval mode meanwhile. Raises UserError for fewer than 2 episodes, equal attacks, records that
    do not fit or cannot be written.
    """
    if episodes < 2:
        raise UserError(f"evaluate {data}: {episodes} episodes have no confidence interval: ask for 2 or more.")
    conditions = ["clean", *(attack.describe(sampler.min_ways) for attack in attacks)]
    if len(set(conditions)) < len(conditions):
        raise UserError(f"evaluate {data}: two attacks are called alike in {conditions[1:]}: leave one out.")
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
    run = _Run(proto, pixels, sampler, dict(zip(conditions[1:], attacks, strict=True)), device, batch)
    known = Records(records, settings, conditions, key="episode")
    missing = [index for index in range(episodes) if index not in known]
    label = label or f"{data} episodes"
    if 0 < len(missing) < episodes:
        console.stage("resume", f"{label}: {episodes - len(missing)} of {episodes} are on record")
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with known, console.bar("eval", label, episodes, episodes - len(missing)) as bar:
            for index in missing:
                outcome = run(index)
                known.add({"episode": index, **outcome.record()})
                if index == 0 and panel is not None:
                    write_panel(panel, outcome, getattr(pixels, "classes", None))
                bar.advance()
        if panel is not None and not panel.exists():
            write_panel(panel, run(0), getattr(pixels, "classes", None))
    finally:
        for part, training in modes.items():
            part.training = training
    rows = [known[index] for index in range(episodes)]
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in conditions}


@dataclass
class _Run:
    """What one episode needs."""

    proto: Task
    pixels: PixelStore
    sampler: Sampler
    attacks: dict[str, Attack]
    device: torch.device | str
    batch: int

    def __call__(self, index: int) -> Outcome:
        episode = self.sampler[index]
        support = self.pixels[episode.support]
        query = self.pixels[episode.query]
        task = support.to(self.device), episode.support_labels.to(self.device)
        classifier = self.proto.classifier(*task).eval()
        predictions = {"clean": self._predict(classifier, query)}
        first = None
        for name, attack in self.attacks.items():
            changer = attack.prepare(*task) if hasattr(attack, "prepare") else attack
            changed = []
            for part, (images, labels) in enumerate(
                zip(query.split(self.batch), episode.query_labels.split(self.batch), strict=True)
            ):
                images, labels = images.to(self.device), labels.to(self.device)
                seed = mix_seed(attack.seed, index, part)
                changed.append(changer.perturb(classifier, images, labels, num_classes=episode.ways, seed=seed))
            adversarial = torch.cat(changed)
            first = adversarial if first is None else first
            predictions[name] = self._predict(classifier, adversarial)
        return Outcome(episode, support, query, predictions, first, getattr(classifier, "mixture", None))

    @torch.no_grad()
    def _predict(self, classifier: nn.Module, images: Tensor) -> Tensor:
        return torch.cat([classifier(part.to(self.device)).argmax(1).cpu() for part in images.split(self.batch)])
