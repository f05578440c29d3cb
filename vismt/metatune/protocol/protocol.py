"""The few-shot protocol: n episodes, clean and under attack, with a JSON line for each. It resumes at the block where it stopped.

Support images stay clean. The query images are attacked against the fixed classifier of the task. Episode i is the same for every
model that runs the same sampler, so that methods can be compared in pairs (vismt.uncertainty.intervals).

Episodes are run in blocks of fixed numbers, so that an attack can pack the queries of several tasks (episode_runner.py). An
interrupted block is run again as a whole. Processes that share an evaluation (vismt/base/ranks.py) run a block each, and the
first process writes the records in order. Features of clean images under weights that no task changes are computed once
(features.py), which does not change accuracies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vismt.base import console, ranks
from vismt.base.errors import UserError, require_known
from vismt.data.set_entries import row_name
from vismt.lowrank.contexts import evaluating
from vismt.metatune.features import FeatureStore
from vismt.metatune.functional import report_lost
from vismt.metatune.protocol.episode_outcome import (
    SCALED,
    UNSCALED,
    EpisodeOutcome,
    lost_field,
    right_field,
    write_episode_panel,
)
from vismt.metatune.protocol.episode_runner import (
    EpisodeRunner,
    FewShotModel,
    OutsidePixels,
    PixelStore,
    QueryPerturbation,
    Sampler,
    parts_of,
)
from vismt.storage.records import SHARE, Field, Header, Records, Row
from vismt.uncertainty.features import Feature, feature_settings
from vismt.uncertainty.probability_metrics import group_fields

_BATCH = 256  # query images in one forward pass


def run_protocol(
    proto: FewShotModel,
    pixels: PixelStore,
    sampler: Sampler,
    *,
    episodes: int,
    attacks: Sequence[QueryPerturbation] = (),
    records: Path | None = None,
    panel: Path | None = None,
    device: torch.device | str | None = None,
    data: str = "data",
    fingerprint: str = "",
    examples: str = "",
    label: str | None = None,
    model: str = "",
    batch: int = _BATCH,
    worst: Mapping[str, Sequence[str]] | None = None,
    features: Literal["auto", "off"] = "auto",
    probabilities: bool = False,
    temperature: float | None = None,
    asked: Sequence[Feature] = (),
    outside: Mapping[str, OutsidePixels] | None = None,
) -> dict[str, Tensor]:
    """Evaluate a few-shot model on episodes, clean and under attack.

    Args:
        proto: Model that turns a support set into a classifier of query images. A module is put in eval mode and restored.
        pixels: Images of the data set.
        sampler: Sampler of the episodes.
        episodes: Number of episodes, at least 2. If the sampler has a length, at most so many episodes run.
        attacks: Attacks and corruptions of the query images, with different texts.
        records: JSON-lines file. Its first line holds the weights, the protocol and the settings. Every episode adds a line. The
            line has the `mixture` (P,) of a classifier with a mixture. "<condition> right" is a text with 1 for each right and 0
            for each wrong query. "<condition> lost" is the number of queries that an attack counted as broken and that are right
            here, by rounding. A file of the same protocol is continued (a torn last line is dropped). A file of another protocol
            is refused.
        panel: .npz file for images and predictions of episode 0, at most 5 support and 5 query images of each class.
        device: Device on which the classifiers run, by default the device of `proto`.
        data: Name of the data set, part of the records' header.
        fingerprint: The caller's name for the weights, part of the records' header.
        examples: Text that tells the images from others of the same labels, part of the records' header.
        label: Text of the progress bar.
        model: Name of the model in the panel.
        batch: Number of query images in one forward pass.
        worst: Texts of the attacks of each worst case, by its text. A query counts as right there if it is right when clean and
            under each of these attacks.
        features: "auto" computes the features of an image once if that is exact, and "off" in every episode.
        probabilities: Whether the quality of the softmax of the clean logits is recorded.
        temperature: Temperature that divides the clean logits for a second record of this quality. None for no second record.
        asked: Features of the evaluation, which compute scores of the clean queries (vismt/evaluation).
        outside: Images of other classes by entry, for features that ask for them. Each episode draws as many of them as it has
            queries, the same images for every model. A sampler with parts divides these images too, so that episodes of two parts
            share none.

    Returns:
        Query accuracy in [0, 1] of every episode, float64 (episodes,), by condition: "clean", the text of each attack, then each
        worst case. `probabilities` adds the fields of `vismt.uncertainty.probability_metrics.group_row`, such as "clean nll" and
        "clean gaps" (episodes, 15), each a mean over the queries of an episode. `temperature` adds the same fields as "tempered
        nll" and so on. `asked` adds the mean over the queries of every quantity, by its field.

    Raises:
        UserError: For fewer than 2 episodes, two attacks with the same text, or records that do not fit or cannot be written.
    """
    questions = EpisodeQuestions(
        sampler, attacks, worst or {}, probabilities, temperature, asked, outside or {}, data, features
    )
    log = questions.records(records, fingerprint, examples)
    return questions.answered(proto, pixels, log, episodes, label or f"{data} episodes", panel, model, device, batch)


@dataclass(frozen=True)
class EpisodeQuestions:
    """What is recorded of every episode. The fields are arguments of `run_protocol`."""

    sampler: Sampler
    attacks: Sequence[QueryPerturbation] = ()
    worst: Mapping[str, Sequence[str]] = field(default_factory=dict)
    probabilities: bool = False
    temperature: float | None = None
    asked: Sequence[Feature] = ()
    outside: Mapping[str, OutsidePixels] = field(default_factory=dict)
    data: str = "data"
    features: Literal["auto", "off"] = "auto"

    def __post_init__(self) -> None:
        if len({"clean", *self.conditions}) <= len(self.attacks):
            texts = [attack.describe(self.sampler.min_ways) for attack in self.attacks]
            raise UserError(f"evaluate {self.data}: two conditions have the same text in {texts}: leave one out.")
        require_known(f"evaluate {self.data}: features", [self.features], ("auto", "off"))
        parts = parts_of(self.sampler)
        for name, images in self.outside.items():
            if len(images) < max(1, parts):
                raise UserError(
                    f"evaluate {self.data}: {len(images)} images in '{name}', for episodes in {parts} parts: add images."
                )

    @property
    def conditions(self) -> dict[str, QueryPerturbation]:
        """The attacks and corruptions by their texts."""
        return {attack.describe(self.sampler.min_ways): attack for attack in self.attacks}

    @property
    def forms(self) -> dict[str, float]:
        """Temperature of each form of the clean logits whose probabilities are recorded."""
        unscaled = {UNSCALED: 1.0} if self.probabilities else {}
        return unscaled if self.temperature is None else {**unscaled, SCALED: self.temperature}

    def records(self, path: Path | None, weights: str, examples: str) -> Records:
        """Open the records in a file. weights, examples: Fields of `vismt.storage.records.Header`."""
        settings = {
            "conditions": ["clean", *self.conditions],
            "attacks": [dict(attack.settings()) for attack in self.attacks],
            "probabilities": self.probabilities,
            "temperature": self.temperature,
            "outside": [*map(row_name, self.outside)],
            "features": feature_settings(self.asked),
        }
        protocol = {"data": self.data, "sampler": dict(self.sampler.describe())}
        bits = dict.fromkeys(map(right_field, ["clean", *self.conditions, *self.worst]), Field(bits=True))
        lost = dict.fromkeys(map(lost_field, self._searches()), Field(0, whole=True))
        fields = {**self._columns(), **bits, **lost, "mixture": Field(several=True, optional=True)}
        return Records(path, Header(weights, examples, protocol, settings), fields, key="episode")

    def answered(
        self,
        proto: FewShotModel,
        pixels: PixelStore,
        log: Records,
        episodes: int,
        label: str,
        panel: Path | None = None,
        model: str = "",
        device: torch.device | str | None = None,
        batch: int = _BATCH,
    ) -> dict[str, Tensor]:
        """Return what `run_protocol` returns, reading finished episodes from `log`. Arguments and errors are as there."""
        if isinstance(self.sampler, Sized):
            episodes = min(episodes, len(self.sampler))
        if episodes < 2:
            raise UserError(f"evaluate {self.data}: {episodes} episodes have no confidence interval: use 2 or more.")
        module, device = _placed(proto, device)
        stores = _stores({"": pixels, **self.outside}, read=any(index not in log for index in range(episodes)))
        if self.features == "off":
            stores = {}
        run = EpisodeRunner(
            proto, pixels, self.sampler, device, self.conditions, self.worst, self.outside, stores, batch, self.asked
        )

        def write(outcome: EpisodeOutcome) -> None:
            if panel is not None:
                write_episode_panel(panel, outcome, model, getattr(pixels, "classes", None))

        def rows_of(number: int) -> list[Row]:
            outcomes = run(blocks[number])
            if 0 in outcomes:
                write(outcomes[0])
            return [{"episode": index, **outcome.record(self.forms)} for index, outcome in outcomes.items()]

        blocks = run.blocks(episodes)
        with evaluating(module), ExitStack() as stack:
            for store in stores.values():
                stack.enter_context(store)
            rows = log.complete(blocks, rows_of, label)
            if panel is not None and ranks.rank() == 0 and not panel.exists():
                write(run(range(1))[0])
        report_lost(rows, {name: lost_field(name) for name in self._searches()})
        return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in self._columns()}

    def _searches(self) -> list[str]:
        """Return the texts of the attacks that tell which images they break."""
        return [name for name, attack in self.conditions.items() if hasattr(attack, "search")]

    def _columns(self) -> dict[str, Field]:
        """Return the fields with one number or several numbers for each episode."""
        shares = dict.fromkeys(["clean", *self.conditions, *self.worst], SHARE)
        asked = {of.field: Field() for feature in self.asked for of in feature.quantities()}
        return {**shares, **asked, **group_fields(self.forms)}


def clean_logits(
    proto: FewShotModel, pixels: PixelStore, sampler: Sampler, episodes: int, label: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits (m, N), on the CPU, and the labels (m,) of the clean queries of each episode. label: Text of the bar."""
    module, device = _placed(proto, None)
    stores = _stores({"": pixels}, read=True)
    run = EpisodeRunner(proto, pixels, sampler, device, stores=stores, batch=_BATCH)
    with evaluating(module), stores[""]:
        for block in console.track(run.blocks(episodes), "eval", label):
            yield from ((outcome.logits, outcome.episode.query_labels) for outcome in run(block).values())


def _stores(sets: Mapping[str, PixelStore], *, read: bool) -> dict[str, FeatureStore]:
    """Return a store for the features of each set. Without `read` the stores get no key, because a key reads the images."""
    return {name: FeatureStore(getattr(pixels, "key", None) if read else None) for name, pixels in sets.items()}


def _placed(proto: FewShotModel, device: torch.device | str | None) -> tuple[nn.Module, torch.device | str]:
    """Return the model as a module (an empty module if it is none), and `device` or the device of the model."""
    module = proto if isinstance(proto, nn.Module) else nn.Module()
    if device is None:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return module, device
