"""The few-shot protocol: n episodes, clean and under attack, one JSON line each; resumes at the episode where it stopped.

Support images stay clean, the query images are attacked against the task's fixed classifier, and episode i is the same for
every model that runs the same sampler, so methods can be compared in pairs (vismt.uncertainty.intervals). Episodes are run in
blocks of fixed numbers, so that an attack can pack the queries of several tasks (episode_runner.py); an interrupted block is
run again as a whole. Processes that share an evaluation (vismt/base/ranks.py) run a block each, and the first one writes the
records in order. Features of clean images under weights that no task changes are computed once (features.py); accuracies
stay the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from vismt.base import console, ranks
from vismt.base.errors import UserError, require_known
from vismt.lowrank.contexts import evaluating
from vismt.metatune.features import FeatureStore
from vismt.metatune.functional import report_lost
from vismt.metatune.protocol.episode_outcome import (
    SCALED,
    UNSCALED,
    EpisodeOutcome,
    lost_field,
    right_field,
    write_panel,
)
from vismt.metatune.protocol.episode_runner import (
    Certifies,
    EpisodeRunner,
    FewShotModel,
    OutsidePixels,
    PixelStore,
    QueryPerturbation,
    Sampler,
    parts_of,
)
from vismt.storage.records import SHARE, Field, Records, recorded_settings
from vismt.uncertainty.probability_metrics import group_fields

_BATCH = 256  # query images in one forward pass
FEATURES = ("auto", "off")


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
    ood: Mapping[str, OutsidePixels] | None = None,
    smoothing: Certifies | None = None,
) -> dict[str, Tensor]:
    """Evaluate a few-shot model on episodes, clean and under attack.

    Args:
        proto: Turns a support set into a classifier of query images. A module is put in eval mode and restored.
        pixels: The images of the data set.
        sampler: Draws the episodes.
        episodes: Number of episodes, at least 2; no more than a sampler with a length has.
        attacks: Attacks and corruptions of the query images, with different texts.
        records: A JSON-lines file. Its first line holds the protocol and its hash; every episode adds a line when it ends,
            with the `mixture` (P,) of a classifier that has one, under "<condition> right" a text with 1 for each right and 0
            for each wrong query, and under "<condition> lost" the number of queries that an
            attack counted as broken and that are right here, by rounding. A file of the same protocol is continued (a torn
            last line is dropped), a file of another protocol is refused.
        panel: An .npz of episode 0's images and predictions, at most 5 support and 5 query images of each class.
        device: Where the classifiers run; by default the device of `proto`.
        data: The data set's name, part of the protocol's hash.
        fingerprint: The caller's name for the weights, part of the protocol's hash.
        examples: What tells the images from others of the same labels, part of the protocol's hash.
        label: Text of the progress bar.
        model: Name of the model in the panel.
        batch: Query images in one forward pass.
        worst: {text of a worst case: texts of its attacks}. A query counts as right there when it is right when clean and
            under each of them.
        features: "auto" computes the features of an image once where that is exact, "off" in every episode.
        probabilities: Also record the quality of the softmax of the clean logits, except in a file that has begun without.
        temperature: Also record that of the softmax of the clean logits divided by it.
        ood: {text of a condition: images of other classes}. Each episode draws as many of them as it has queries, the same
            for every model, and records the AUROC with which the largest probability tells its queries from them. A sampler
            with parts divides them, too, so that episodes of two parts share none.
        smoothing: Certifies the queries; the support is not perturbed.

    Returns:
        Query accuracy in [0, 1] of every episode, float64 (episodes,), by condition: "clean", each attack's text, then each
        worst case. With `probabilities` also the fields of `vismt.uncertainty.probability_metrics.group_row`, such as
        "clean nll" and "clean gaps" (episodes, 15), each a mean over an episode's queries. With `temperature` the same as
        "tempered nll" and so on, and with `ood` the AUROC of each condition. With `smoothing` the share of queries that
        are right and certified at each radius, by its text, and the share of abstentions by the smoothed classifier's label.

    Raises:
        UserError: Fewer than 2 episodes, two attacks with the same text, or records that do not fit or cannot be written.
    """
    texts = [attack.describe(sampler.min_ways) for attack in attacks]
    if len({"clean", *texts}) <= len(texts):
        raise UserError(f"evaluate {data}: two conditions have the same text in {texts}: leave one out.")
    conditions = dict(zip(texts, attacks, strict=True))
    require_known(f"evaluate {data}: features", [features], FEATURES)
    if isinstance(sampler, Sized):
        episodes = min(episodes, len(sampler))
    if episodes < 2:
        raise UserError(f"evaluate {data}: {episodes} episodes have no confidence interval: use 2 or more.")
    worst, outside = worst or {}, ood or {}
    few = next((name for name, images in outside.items() if len(images) < max(1, parts_of(sampler))), None)
    if few is not None:
        raise UserError(
            f"evaluate {data}: {len(outside[few])} images {few}, for episodes in {parts_of(sampler)} parts: add images."
        )
    begun = recorded_settings(records)
    probabilities = probabilities and (begun is None or "probabilities" in begun)
    forms = {UNSCALED: 1.0} if probabilities else {}
    if temperature is not None:
        forms[SCALED] = temperature
    settings: dict[str, object] = {
        "data": data,
        "fingerprint": fingerprint,
        "sampler": dict(sampler.describe()),
        "conditions": ["clean", *conditions],
        "attacks": [dict(attack.settings()) for attack in attacks],
    }
    further = {
        "examples": examples or None,
        "probabilities": probabilities or None,
        "temperature": temperature,
        "ood": list(outside) or None,
        "ood in parts": (bool(outside) and parts_of(sampler)) or None,
    }
    # Records without them do not name them.
    settings |= {name: value for name, value in further.items() if value is not None}
    certified, abstained = [], []
    if smoothing is not None:
        settings |= smoothing.settings()
        certified, abstained = [*smoothing.levels()], [smoothing.label]
    shares = ["clean", *conditions, *worst, *outside, *certified, *abstained]
    columns = {**dict.fromkeys(shares, SHARE), **group_fields(forms)}
    lost = {name: lost_field(name) for name in conditions}
    optional = {name: Field(0, whole=True, optional=True) for name in lost.values()}
    optional["mixture"] = Field(several=True, optional=True)
    optional |= {
        right_field(name): Field(bits=True, optional=True) for name in ["clean", *conditions, *worst, *certified]
    }
    log = Records(records, settings, {**columns, **optional}, key="episode")
    module, device = _placed(proto, device)
    stores = _stores({"": pixels, **outside}, read=any(index not in log for index in range(episodes)))
    if features == "off":
        stores = {}
    run = EpisodeRunner(proto, pixels, sampler, device, conditions, worst, outside, stores, batch, smoothing)
    write = None if panel is None else partial(write_panel, panel, model=model, names=getattr(pixels, "classes", None))
    with evaluating(module), log, ExitStack() as stack:
        for store in stores.values():
            stack.enter_context(store)
        _run_missing(run, log, episodes, forms, write, label or f"{data} episodes")
        if panel is not None and write is not None and ranks.rank() == 0 and not panel.exists():
            write(run(range(1))[0])
    rows = [log[index] for index in range(episodes)]
    report_lost(rows, lost)
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in columns}


def _run_missing(
    run: EpisodeRunner,
    log: Records,
    episodes: int,
    forms: Mapping[str, float],
    write: Callable[[EpisodeOutcome], None] | None,
    label: str,
) -> None:
    """Add the episodes that are not on record to the records. forms: as in `EpisodeOutcome.record`. write: of the panel."""
    done = sum(index in log for index in range(episodes))
    if 0 < done < episodes:
        console.stage("resume", f"{label}: {done} of {episodes} are on record")

    def rows_of(block: range) -> list[dict]:
        outcomes = run(block)
        if write is not None and 0 in outcomes:
            write(outcomes[0])
        return [{"episode": index, **outcome.record(forms)} for index, outcome in outcomes.items()]

    with console.bar("eval", label, episodes, done) as progress:
        for rows in ranks.share(run.missing(log, episodes), rows_of):
            new = sum(row["episode"] not in log for row in rows)
            for row in rows:
                log.add(row)
            progress.advance(new)


def clean_logits(
    proto: FewShotModel, pixels: PixelStore, sampler: Sampler, episodes: int, label: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the logits (m, N), on the CPU, and the labels (m,) of the clean queries of each episode, under a bar with `label`."""
    module, device = _placed(proto, None)
    stores = _stores({"": pixels}, read=True)
    run = EpisodeRunner(proto, pixels, sampler, device, stores=stores, batch=_BATCH)
    with evaluating(module), stores[""]:
        for block in console.track(run.blocks(episodes), "eval", label):
            yield from ((outcome.logits, outcome.episode.query_labels) for outcome in run(block).values())


def _stores(sets: Mapping[str, PixelStore], *, read: bool) -> dict[str, FeatureStore]:
    """Return a store for the features of each set; one that is not read needs no key, which would read the images."""
    return {name: FeatureStore(getattr(pixels, "key", None) if read else None) for name, pixels in sets.items()}


def _placed(proto: FewShotModel, device: torch.device | str | None) -> tuple[nn.Module, torch.device | str]:
    """Return the model as a module, an empty one where it is none, and `device` or that of the model."""
    module = proto if isinstance(proto, nn.Module) else nn.Module()
    if device is None:
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return module, device
