"""Evaluation of few-shot models on episodes of every set, clean and under each condition, with a record for each episode.

The probabilities of a model on the clean queries have ECE, NLL and Brier score. They are the softmax of the logits at the scale
of the model, with the queries of all episodes pooled. With evaluate.probabilities they are also scored as p = softmax(z / T). T
> 0 has the smallest NLL on the clean queries of validation episodes (vismt/uncertainty/temperature.py), which have equal
weights. z are the logits of `Models.task`, with the weights that the model takes for the support of a task (pools,
fine-tuning), or the log-probabilities of a posterior. T belongs to the ways and shots of the validation episodes. A file beside
the model's records has T. T is fitted again if the weights, the settings or the episodes change.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from vismt.base.seeds import digest
from vismt.data.batching import joint_content
from vismt.data.pixels import Pixels
from vismt.data.set_entries import shown_name
from vismt.engine import runtime
from vismt.engine.log import record_stem
from vismt.engine.study import Training
from vismt.evaluation.sections import asked_features, outside_entries, perturbations
from vismt.evaluation.temperature import TEMPERED
from vismt.jobs.evaluation_job import records_folder
from vismt.jobs.fewshot.data import FewShotData
from vismt.jobs.fewshot.models import Models
from vismt.metatune.protocol.episode_outcome import SCALED, UNSCALED
from vismt.metatune.protocol.episodes import EpisodeSampler, VariableSampler
from vismt.metatune.protocol.protocol import EpisodeQuestions, clean_logits, run_protocol
from vismt.robustness.conditions import AttackConfig, Perturbation, TransferSource, condition_of, worst_cases
from vismt.storage.fitted import fitted_once
from vismt.uncertainty.features import Feature, Inputs, View
from vismt.uncertainty.intervals import CLEAN, Condition, Measure, Score
from vismt.uncertainty.probability_metrics import group_measures
from vismt.uncertainty.temperature import fit_temperature

_TASK = "few-shot"
Sampler = EpisodeSampler | VariableSampler
_FORMS = {UNSCALED: CLEAN, SCALED: TEMPERED}  # conditions of the rows of probabilities
_ABSENT = -1e30  # logit of the classes that an episode of fewer ways lacks: a probability of 0 at any T


@dataclass(frozen=True)
class FittedTemperature:
    """What was fitted for a model on n queries of validation episodes."""

    temperature: float
    n: int


class Evaluation:
    """Scores of the models of one run folder on episodes."""

    def __init__(self, folder: Path, data: FewShotData) -> None:
        self.config = data.config
        self.folder = folder
        self.data = data

    def scores(
        self, models: Models, arm: str, attacks: Sequence[AttackConfig] | None, *, with_panel: bool
    ) -> list[Score]:
        """Return the scores of a model on the episodes of every set, clean and under each condition.

        attacks: Attacks in place of the configuration's conditions, with separate records. None for the configuration's.
        with_panel: Whether the first episode of each set is kept as a panel.
        """

        def source(model: str) -> TransferSource:
            return TransferSource(model, models.task(model), models.fingerprint(model))

        features = asked_features(self.config.evaluate, attacks)
        views = self.views(models, arm)
        specs = perturbations(features, Inputs(min(view.sampler.min_ways for view in views), source=source))
        return [of for view in views for of in view.scores(specs, features, attacks, with_panel=with_panel)]

    def views(self, models: Models, arm: str) -> list[EpisodeView]:
        """Return a model on the episodes of every set and protocol."""
        names = self.config.evaluate.data
        return [EpisodeView(self, models, arm, name, of) for name in names for of in self.data.samplers(name)]

    def validation_scores(self, models: Models, training: Training) -> list[Score]:
        """Return the accuracy of a training on the episodes of select.data, clean and under its arm's select.attack."""
        select = models.study.arms[training.arm].selection
        net = models.trained(training, merged=True).to(runtime.processes().device)
        specs = [] if select.attack is None else [select.attack.spec()]
        scores = []
        for name in select.data:
            sampler = self.data.validation_sampler(name)
            path, pixels = training.folder / "records" / f"validation-{shown_name(name)}.jsonl", self.data.open(name)
            accuracies = run_protocol(
                net,
                pixels,
                sampler,
                episodes=select.episodes,
                attacks=specs,
                records=path,
                examples=pixels.content,
                data=name,
                fingerprint=models.fingerprint_of(net),
                label=f"{shown_name(name)} {training}",
            )
            for label in (CLEAN, *(condition_of(spec, sampler.min_ways) for spec in specs)):
                measure = over_episodes(accuracy(accuracies[label.label], None), sampler)
                scores.append(Score(_TASK, shown_name(name), str(sampler), measure, label, "episodes"))
        return scores


@dataclass(frozen=True)
class EpisodeView(View):
    """A model on the episodes of one set and protocol."""

    evaluation: Evaluation
    models: Models
    arm: str
    name: str
    sampler: Sampler

    def score(self, measure: Measure, condition: Condition, examples: str, about: str = "") -> Score:
        return Score(_TASK, shown_name(self.name), str(self.sampler), measure, condition, "episodes", examples)

    def scores(
        self,
        specs: Sequence[Perturbation],
        features: Sequence[Feature],
        attacks: Sequence[AttackConfig] | None,
        *,
        with_panel: bool,
    ) -> list[Score]:
        """Return the scores clean and under each condition. The arguments are as for `Evaluation.scores`."""
        of, models, sampler = self.evaluation, self.models, self.sampler
        shown, protocol, settings = shown_name(self.name), str(sampler), of.config.evaluate
        pixels = of.data.open(self.name)
        with_panel = with_panel and not attacks and isinstance(pixels, Pixels)
        panel = of.folder / "panels" / f"{shown}-{protocol.replace(' ', '-')}.npz" if with_panel else None
        file = episodes_file(of.folder, models.seed, shown, protocol, self.arm)
        tempered = settings.probabilities and of.config.select is not None
        worst = worst_cases(specs, sampler.min_ways)
        questions = EpisodeQuestions(
            sampler,
            specs,
            {case.condition.label: case.attacks for case in worst},
            probabilities=True,
            temperature=temperature(of.folder, models, self.arm) if tempered else None,
            asked=features,
            outside={entry: of.data.outside(entry) for entry in outside_entries(features)},
            data=self.name,
        )
        records = records_folder(file.parent, attacks) / file.name
        log = questions.records(records, models.fingerprint(self.arm), pixels.content)
        title, model = f"{shown} {protocol} {self.arm}", models.task(self.arm)
        results = questions.answered(model, pixels, log, settings.episodes, title, panel, self.arm)
        labels = [CLEAN, *(condition_of(spec, sampler.min_ways) for spec in specs), *(case.condition for case in worst)]
        chance = 1 / sampler.ways if isinstance(sampler, EpisodeSampler) else None
        drawn = digest(f"{json.dumps(sampler.describe(), sort_keys=True)}{log.examples}".encode())
        measures = [(label, accuracy(results[label.label], chance)) for label in labels]
        usual = [(label, usual_accuracy(results[label.label])) for label in labels] if sampler.parts else []
        for form, label in _FORMS.items():
            if form in questions.forms:
                names = list(_by_episode(results[CLEAN.label]))
                found = group_measures(names, form, results, _parts_of(names, sampler))
                measures += [(label, measure) for measure in found]
        for quantity in (quantity for feature in features for quantity in feature.quantities()):
            values = _by_episode(results[quantity.field])
            measures.append((quantity.condition, quantity.measure(values, counts=False)))
        measures = [(label, over_episodes(measure, sampler)) for label, measure in measures] + usual
        return [self.score(measure, label, drawn) for label, measure in measures]


def over_episodes(measure: Measure, sampler: Sampler) -> Measure:
    """Return a measure whose interval is over the episodes of a sampler."""
    return replace(measure, covers=sampler.covers, groups=_parts_of(measure.values, sampler), grouped_by="parts")


def _parts_of(episodes: Iterable[str], sampler: Sampler) -> dict[str, str]:
    """Return the part of each episode by its number, {} if the sampler has no parts."""
    return {number: str(int(number) % sampler.parts) for number in episodes} if sampler.parts else {}


def accuracy(values: Tensor, chance: float | None) -> Measure:
    """Return the accuracy of episodes as a measure."""
    return Measure("accuracy", _by_episode(values), chance=chance)


def usual_accuracy(values: Tensor) -> Measure:
    """Return the accuracy with the interval that papers print, over the episodes as if they were independent."""
    return Measure("accuracy (interval over episodes)", _by_episode(values), covers="sampler", further=True)


def _by_episode(values: Tensor) -> dict[str, float]:
    return {str(number): value for number, value in enumerate(values.tolist())}


def temperature(folder: Path, models: Models, arm: str) -> float:
    """Return the temperature of a model."""
    select = models.config.selection
    samplers = {name: models.data.validation_sampler(name) for name in select.data}

    def fit() -> FittedTemperature:
        pairs = [
            pair
            for name, sampler in samplers.items()
            for pair in clean_logits(
                models.task(arm),
                models.data.open(name),
                sampler,
                select.episodes,
                f"{shown_name(name)} {arm} for a temperature",
            )
        ]
        ways = max(logits.shape[1] for logits, _ in pairs)
        logits = torch.cat([F.pad(part.double(), (0, ways - part.shape[1]), value=_ABSENT) for part, _ in pairs])
        labels = torch.cat([part for _, part in pairs])
        # Rounded, because it is part of the records' settings, and another machine has to fit the same value.
        return FittedTemperature(float(f"{fit_temperature(logits, labels):.6g}"), len(labels))

    episodes = {name: [select.episodes, sampler.describe()] for name, sampler in samplers.items()}
    text = json.dumps([models.fingerprint(arm), episodes], sort_keys=True)
    fingerprint = digest(text.encode())
    stem = record_stem("temperature", "all", arm)
    path = folder / "episodes" / f"seed-{models.seed}" / f"{stem}.json"
    examples = joint_content(models.data.open(name) for name in samplers)
    return fitted_once(path, FittedTemperature, fingerprint, fit, examples=examples).temperature


def episodes_file(folder: Path, seed: int, data: str, protocol: str, arm: str) -> Path:
    """Return the file of a model's records, one line for each episode."""
    return folder / "episodes" / f"seed-{seed}" / f"{record_stem(data, protocol, arm)}.jsonl"
