"""The robustness job: classifiers on cards, or run folders on their own images, clean, under attacks and corruptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from vismt.base import console
from vismt.data.set_entries import card_and_split, shown_name
from vismt.engine.study import Training
from vismt.evaluation.quality import ACCURACY, Quality
from vismt.evaluation.sections import asked_features, check_split, fitted_keys, perturbations
from vismt.jobs.evaluation_job import EvaluationJob, records_folder
from vismt.jobs.robustness.config import RobustnessConfig, check, first_attack
from vismt.jobs.robustness.data import Cards
from vismt.jobs.robustness.evaluation import CardView, card_view, corruption_errors, records_path
from vismt.jobs.robustness.models import Classifier, TrainedArm, check_exists, make_classifier
from vismt.jobs.robustness.report import BROKEN, sections
from vismt.report.panels import to_bytes, write_arrays
from vismt.report.results import RECORDS, Result
from vismt.report.tables import Section
from vismt.robustness.attacks.attacks import AttackSpec
from vismt.robustness.conditions import AttackConfig
from vismt.robustness.evaluate import batch_keys
from vismt.storage.files import JsonObject
from vismt.storage.lines import read_lines
from vismt.storage.paths import file_name
from vismt.uncertainty.features import Inputs
from vismt.uncertainty.intervals import CLEAN, Score

_SHOWN = 6  # images of a panel
ADVERSARIAL = "adversarial"  # a folder of the run folder


class RobustnessJob(EvaluationJob[RobustnessConfig]):
    """Arms are classifiers. Nothing is trained."""

    def __init__(self, config: RobustnessConfig, folder: Path, config_hash: str) -> None:
        check(config)
        super().__init__(config, folder, config_hash)
        classifiers = [arm.classifier for arm in self.study.arms.values()]
        self.cards = Cards(config, [classifier.run for classifier in classifiers if classifier.run is not None])
        self.names_tasks = not config.data
        self._classifiers: dict[str, Classifier] = {}

    @cached_property
    def trained(self) -> dict[str, TrainedArm]:
        """The arms that are evaluated on their own images. None if there are cards."""
        return {} if self.config.data else {arm: TrainedArm(at.classifier) for arm, at in self.study.arms.items()}

    @property
    def split(self) -> str:
        splits = {card_and_split(name)[1] for name in self.config.data}
        splits |= {arm.job.split for arm in self.trained.values()}
        return splits.pop() if len(splits) == 1 else "several"

    def classifier_of(self, arm: str, data: str) -> Classifier:
        """Return an arm's classifier for a card, kept once loaded."""
        if arm not in self._classifiers:
            self._classifiers[arm] = make_classifier(self.study.arms[arm].classifier)
        return self.cards.classifier(data, self._classifiers[arm])

    def trainings(self, arm: str) -> list[Training]:
        return [Training(arm, 0.0, self.config.seed, self.folder / "classifiers" / arm)]

    def check(self) -> None:
        for config in self.study.arms.values():
            check_exists(config.classifier)

    def check_evaluation(self, attacks: Sequence[AttackConfig] | None) -> None:
        settings = self.config.evaluate
        for trained in self.trained.values():
            check_split(settings, trained.job.split)
            trained.job.check_features(settings)
            perturbations(asked_features(settings, attacks), trained.job.inputs())
        for name in (*self.config.data, *(name for feature in asked_features(settings) for name in feature.sets)):
            self.cards.images(name)

    def score(self, training: Training, split: str, attacks: Sequence[AttackConfig] | None) -> list[Score]:
        folder = records_folder(training.folder, attacks)
        features = asked_features(self.config.evaluate, attacks)
        if training.arm in self.trained:
            arm, records = self.trained[training.arm], folder / RECORDS
            inputs = arm.job.inputs(self.config.seed)
            return arm.job.evaluation.scores(arm.net, arm.training, arm.job.split, records, inputs, features)
        specs, scores = perturbations(features, Inputs(seed=self.config.seed)), []
        for data in self.config.data:
            view = self._view(training.arm, data, folder)
            keep = partial(self._keep, training.arm, data) if self.config.evaluate.keep_images else None
            found = view.scores(specs, [Quality(None), *(of.fitted(view) for of in features)], keep)
            self._warn_at_chance(training.arm, found, view.chance or 0)
            scores += found
        return scores

    def _warn_at_chance(self, arm: str, scores: Sequence[Score], chance: float) -> None:
        """Print a line if the clean accuracy is not told from chance, as with another normalisation or order of labels."""
        clean = next(score for score in scores if score.condition == CLEAN and score.measure.metric == ACCURACY)
        if clean.measure.interval()[0] <= chance:
            console.stage(
                "eval",
                f"{arm} on {clean.data}   clean accuracy {100 * clean.measure.score:.1f} % is not told from chance "
                f"({100 * chance:.1f} %): check mean, std, img_size and the order of the labels",
            )

    def _keep(self, arm: str, data: str, condition: str, number: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write the attacked images of a batch in float32, because rounding to 8 bits would change some answers."""
        folder = self.folder / ADVERSARIAL / file_name(arm) / file_name(shown_name(data))
        write_arrays(folder / f"{file_name(condition)}-{number:05d}.npz", arrays)

    def derived(self, scores: Mapping[str, Sequence[Score]], seeds: Sequence[int]) -> dict[str, list[Score]]:
        return corruption_errors(scores)

    def _view(self, arm: str, data: str, folder: Path) -> CardView:
        classifier = self.classifier_of(arm, data)
        return card_view(
            classifier,
            self.cards.batches(data, classifier),
            folder=folder,
            data=data,
            arm=arm,
            opened=partial(self.cards.opened, classifier=classifier),
            fitting=self.cards.for_fitting(data, classifier) if fitted_keys(self.config.evaluate) else None,
        )

    def write_panels(self) -> None:
        attack = first_attack(self.config) if self.config.data else None
        if attack is not None:
            for arm in self.study.arms:
                for data in self.config.data:
                    self._write_broken(arm, data, attack)

    def _write_broken(self, arm: str, data: str, spec: AttackSpec) -> None:
        """Write the first images that are right when clean and wrong under the first attack, and the attacked images."""
        classifier = self.classifier_of(arm, data)
        label = spec.describe(classifier.num_classes)
        rows = {row["id"]: row for row in read_lines(records_path(self.trainings(arm)[0].folder, data)) if "id" in row}
        names = self.cards.images(data).classes
        device = next((parameter.device for parameter in classifier.net.parameters()), None)
        batches = self.cards.batches(data, classifier)
        outputs = {int(label): names[i] for i, label in enumerate(self.cards.outputs(data, classifier))}
        for number, (images, labels, ids) in enumerate(batches):
            broken = [
                i for i, name in enumerate(ids) if rows[name]["clean"] == rows[name]["label"] != rows[name][label]
            ]
            if not broken:
                continue
            # With the batch and keys of the evaluation the attacked images are the same.
            attacked = spec.perturb(
                classifier.net,
                images.to(device),
                labels.to(device),
                num_classes=classifier.num_classes,
                keys=batch_keys(spec, number, len(images)),
            )
            broken = broken[:_SHOWN]
            answers = {
                key: np.array([outputs.get(rows[ids[i]][column], "another task") for i in broken], dtype=str)
                for key, column in (("truth", "label"), ("clean_answers", "clean"), ("attacked_answers", label))
            }
            path = self.folder / BROKEN / f"{arm}-{shown_name(data)}.npz"
            write_arrays(path, {"images": to_bytes(images[broken]), "attacked": to_bytes(attacked[broken]), **answers})
            return

    next_steps = ("attack {run} --attack autoattack --epsilon 8/255",)

    def sections(self, results: Sequence[Result]) -> list[Section]:
        return sections(self.folder, self.config, results)

    def facts(self) -> JsonObject:
        return {"seeds": [], "evaluation_seed": self.config.seed}


JOB = RobustnessJob
