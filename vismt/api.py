"""Studies from Python, without a configuration file: `train`, `meta_tune`, `evaluate_fewshot` and `audit`; and `predict`.

Each builds the configuration of a job (vismt/jobs) and runs it in a folder, so that numbers, records and reports are those of
`vismt run`. Data sets and models may be Python objects (vismt/base/objects.py).

A data set is the name of a card ("cifar10:test"), a folder with a folder of images for each class, a .csv file with the
columns path and label, a torch or torchvision data set of (image, label), or a Hugging Face data set with an image and a label
column. Several are given as a list, or as a mapping from names in the results to objects.

A model is a name of timm or of `vismt assets list`, or any nn.Module. A timm module gets images normalised by its
pretrained_cfg; any other module gets images in [0, 1].
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vismt.base import console
from vismt.base.errors import UserError, named_arguments, require_known, shown_value
from vismt.base.objects import name_of, named, registered, title_of
from vismt.jobs.study_results import StudyResults

if TYPE_CHECKING:
    from vismt.jobs.predictions import Predictions
    from vismt.report.compare.pairs import PairedDifference

_EPSILON = "4.5/255"


@named_arguments
def train(config: Mapping[str, Any], folder: str | Path | None = None) -> StudyResults:
    """Run a study: train what the configuration trains, and evaluate it.

    Args:
        config: the content of a configuration file (`configs/` has examples), in which data sets and models may be objects.
        folder: of the run; the same call continues an interrupted run there. None for a temporary one, of which `.report()` and
            `vismt.predict` keep a copy in ./runs.

    Returns:
        The numbers, from which the report is written.

    Raises:
        UserError: what `vismt run` refuses, and a folder that holds another run.
    """
    from vismt.jobs import started_config, typed_config
    from vismt.report.results import RESULTS, read_results

    objects: dict[str, Any] = {}
    plain = named(dict(config), objects)
    built = typed_config(plain, "config")
    temporary = tempfile.TemporaryDirectory(prefix="vismt-") if folder is None else None
    path = Path(temporary.name if temporary else folder or "")
    with registered(objects), started_config(built, path) as run, run.owned():
        if run.job.trains:
            run.evaluate_references()
            run.train()
        run.evaluate()
    return StudyResults(path, read_results(path / RESULTS, run.hash), objects, temporary)


@named_arguments
def compare(
    *inputs: Any,
    id: str | None = None,
    score: str | None = None,
    label: str | None = None,
    answer: str | None = None,
    probability: str | None = None,
    group: str | None = None,
    seed: str | None = None,
    set: str | None = None,
    baseline: str | None = None,
    common: bool = False,
) -> list[PairedDifference]:
    """Compare models example by example, from predictions that any program wrote.

        pairs = vismt.compare({"a": frame_a, "b": frame_b}, id="image", score="correct", group="patient")
        pairs[0]    # b is better than a by 1.8 ± 0.9 points (n = 1,243 in 379 groups); a difference under ...

    Args:
        inputs: Run folders, tables (CSV, JSONL, JSON, Parquet), folders of a table for each seed, output folders of
            lm-evaluation-harness, frames of pandas, and lists of mappings. A mapping gives names to several.
        id: Column with the name of the example. A column that is not named is found by its usual names.
        score: Column with a number for each example: 1 and 0 for right and wrong, a loss, a Dice score.
        label: Column with the right answer.
        answer: Column with the answer of the model.
        probability: Column with the probability of the answer, or with a `*` in the place of a class that of each class.
        group: Column of examples that depend on each other, for example a patient.
        seed: Column of the training.
        set: Column of the data set.
        baseline: Name of the input that all others are compared with. None for all pairs.
        common: Compare the examples that all inputs have. Otherwise an example that one input lacks is an error.

    Returns:
        The difference b - a of each pair, for each metric and set, in the unit of the metric.

    Raises:
        UserError: fewer than two models, a file that cannot be read, a missing column, a value that is not a number, and examples
            that are not the same in all inputs.
    """
    from vismt.report.compare.pairs import paired_differences
    from vismt.report.compare.report import gather, input_names
    from vismt.report.compare.score_tables import Columns
    from vismt.report.comparison import compare as compare_rows

    named: dict[str, Any] = {}
    for number, given in enumerate(inputs, 1):
        if isinstance(given, Mapping):
            named |= given
        else:
            named[str(number)] = given
    paths = {name: Path(given) for name, given in named.items() if isinstance(given, str | Path) and name.isdecimal()}
    names = dict(zip(paths, input_names(list(paths.values())), strict=True))
    columns = Columns(id, score, label, answer, probability, group, seed, set)
    with console.quiet():
        results, values = gather({names.get(name, name): given for name, given in named.items()}, columns, common)
    arms = list(dict.fromkeys(row.arm for row in results))
    require_known("compare: no model", [baseline] if baseline else [], arms)
    return paired_differences(compare_rows(results, values), baseline)


@named_arguments
def evaluate_fewshot(
    model: Any,
    data: Any,
    ways: int = 5,
    shots: int | Sequence[int] = (1, 5),
    episodes: int = 600,
    *,
    queries: int = 15,
    attacks: Sequence[Any] = (),
    corruptions: Sequence[Any] = (),
    epsilon: float | str = _EPSILON,
    head: str | Sequence[str] = "prototypes",
    sampling: str = "parts",
    ood: Any = (),
    img_size: int | None = None,
    seed: int = 1,
    folder: str | Path | None = None,
) -> StudyResults:
    """Evaluate backbones on few-shot episodes, clean and under each condition.

    Args:
        model: a model, or a mapping from names in the results to models, which are compared on the same episodes.
        data: Data sets. Each is a card ("cifar10:test"), a folder of class folders, a .csv of paths and labels, or a data set
            of torch or Hugging Face. Several are a list, or a mapping from names in the results to data sets.
        ways: classes in an episode.
        shots: support images of each class; several are evaluated in turn.
        episodes: of each set and number of shots, at least 2. They are drawn in five disjoint parts of the images where classes
            are large enough (`evaluate.sampling` of configurations), so that intervals cover new images.
        queries: query images of each class.
        attacks: names ("strong", "pgd"), or mappings with the keys of an attack in a configuration. The query images are
            attacked, the support stays clean.
        corruptions: names, with all severities, or mappings {"name": ..., "severities": [...]}.
        epsilon: linf radius, in pixel units of [0, 1], of attacks given by name.
        head: what classifies on the features: cosine prototypes, or ridge, logistic, vbll, laplace or finetune; several are
            compared on the same episodes.
        sampling: "parts", "with_replacement", whose intervals cover new episodes of the same images alone, or
            "without_replacement" (`evaluate.sampling` of configurations).
        ood: data sets of other classes: how well the largest probability tells their images from the queries, as AUROC.
        img_size: pixels; needed for a module that timm did not make.
        seed: of the episodes.
        folder: see `train`.

    Returns:
        Accuracies, and what else was asked for, with 95 % intervals over new images or episodes. With `sampling="parts"` a row
        "accuracy (interval over episodes)" has the usual interval beside ours. It is smaller because it leaves out that other
        images of the classes give another accuracy.

    Raises:
        UserError: unknown names, and sets with too few classes or images for the episodes.
    """
    from vismt.jobs.fewshot.config import FROZEN, HEADS, PROTOTYPES

    objects: dict[str, Any] = {}
    arms = _models(model, objects, "model.name")
    heads = [head] if isinstance(head, str) else list(head)
    if not heads:
        raise UserError("head: []; name at least one, such as 'prototypes'.")
    require_known("head: no head", heads, (PROTOTYPES, *HEADS))
    config = {
        "task": "fewshot",
        "title": f"Few-shot evaluation of {', '.join(arms)}",
        "arms": arms,
        "model": {"img_size": img_size},
        "adapt": None,
        "train": None,
        "head": {"name": heads[0] if len(heads) == 1 else PROTOTYPES},
        "evaluate": {
            "data": _sets(data, objects),
            "models": [FROZEN if name == PROTOTYPES or not heads[1:] else f"{FROZEN}+{name}" for name in heads],
            "sampling": sampling,
            "ways": ways,
            "shots": [shots] if isinstance(shots, int) else list(shots),
            "queries": queries,
            "episodes": episodes,
            "seed": seed,
            "ood": _sets(ood, objects),
            **_conditions(attacks, corruptions, epsilon),
        },
    }
    return _with_objects(config, objects, folder)


@named_arguments
def audit(
    model: Any,
    data: Any,
    attacks: Sequence[Any] = ("strong",),
    corruptions: Sequence[Any] = (),
    *,
    epsilon: float | str = _EPSILON,
    images: int | None = None,
    batch: int = 32,
    masking: bool = False,
    img_size: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
) -> StudyResults:
    """Measure the accuracy of image classifiers, clean, under attacks and under corruptions.

    Args:
        model: a classifier, or a mapping from names in the results to classifiers, whose outputs are the classes of the data in
            their order. A name may also be a checkpoint file.
        data: Data sets, as for `evaluate_fewshot`.
        attacks: as for `evaluate_fewshot`.
        corruptions: as for `evaluate_fewshot`.
        epsilon: as for `evaluate_fewshot`.
        images: number of images of each set, drawn by the seed; None for all.
        batch: images at a time.
        masking: also run the first attack at growing radii, which shows whether it can be trusted.
        img_size: pixels; needed for a module that timm did not make.
        seed: of the drawn images and the attacks.
        folder: see `train`.

    Returns:
        Accuracies with 95 % intervals over images. Under an attack an image counts that is right clean and attacked.

    Raises:
        UserError: unknown names, and data with other classes than the model.
    """
    objects: dict[str, Any] = {}
    arms = _models(model, objects, "classifier.name")
    config = {
        "task": "robustness",
        "title": f"Robustness of {', '.join(arms)}",
        "seed": seed,
        "arms": arms,
        "classifier": {"img_size": img_size},
        "data": _sets(data, objects),
        "evaluate": {
            "images": images,
            "batch": batch,
            "masking": masking,
            **_conditions(attacks, corruptions, epsilon),
        },
    }
    return _with_objects(config, objects, folder)


@named_arguments
def meta_tune(
    model: Any,
    data: Any,
    test: Any,
    *,
    method: str = "lora",
    adapt: Mapping[str, Any] | None = None,
    levels: Sequence[float] = (),
    rank: int = 8,
    steps: int = 100,
    lr: float = 1e-3,
    ways: int = 5,
    shots: int = 5,
    queries: int = 15,
    episodes: int = 600,
    attacks: Sequence[Any] = (),
    epsilon: float | str = _EPSILON,
    img_size: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
) -> StudyResults:
    """Meta-tune an adapter on episodes of `data`, and evaluate it on episodes of `test` beside the model as it was.

    Args:
        model: a model; a module is copied, not changed.
        data: The data sets of the training episodes, as for `evaluate_fewshot`.
        test: The data sets that are tested on.
        method: of the adapter, see `vismt.list_methods`.
        adapt: further keys of the section `adapt` of a configuration, {"targets": ..., "alpha": ..., "options": {...}}; they
            come before `method` and `rank`.
        levels: with input budgets in 1/255, AMT's pool instead (`method` is then amt): one robust expert for each, merged for
            every test task.
        rank: of the adapter.
        steps: optimiser steps, one episode each; a tenth of them warms up.
        lr: peak learning rate.
        ways: classes in an episode.
        shots: support images of each class.
        queries: query images of each class.
        episodes: number of test episodes of each set.
        attacks: as for `evaluate_fewshot`.
        epsilon: as for `evaluate_fewshot`.
        img_size: pixels; needed for a module that timm did not make.
        seed: of the training; the test episodes do not depend on it.
        folder: see `train`.

    Returns:
        Accuracies of "frozen", and of "adapted" or "merged". `model()` has the tuned model, or the only expert of a pool;
        of several experts `model("2")` has that of level 2, and `model("average")` their mean.

    Raises:
        UserError: what `train` refuses.
    """
    objects: dict[str, Any] = {}
    (arm,) = _models(model, objects, "name").values()
    config = {
        "task": "fewshot",
        "title": "Meta-tuning",
        "seed": seed,
        "model": {**arm, "img_size": img_size},
        "adapt": {"method": "amt" if levels else method, "rank": rank, **(adapt or {})},
        "pool": {"levels": list(levels)} if levels else None,
        "source": {"data": _sets(data, objects), "ways": ways, "shots": shots, "queries": queries},
        "train": {"steps": steps, "lr": lr, "warmup": steps // 10},
        "evaluate": {
            "data": _sets(test, objects),
            "models": ["frozen", "merged" if levels else "adapted"],
            "ways": ways,
            "shots": [shots],
            "queries": queries,
            "episodes": episodes,
            **_conditions(attacks, (), epsilon),
        },
    }
    return _with_objects(config, objects, folder)


def predict(
    source: str | Path | StudyResults,
    inputs: str | Path | Sequence[str | Path],
    *,
    to: str | Path | None = None,
    support: str | Path | None = None,
    **options: Any,
) -> Predictions:
    """Predict the classes or maps of images, or what a language model answers to rows of text, as `vismt predict` does.

    Args:
        source: a run folder, what a study from Python returned, a folder of `vismt merge` or `vismt export`, or a checkpoint
            of a timm model with a config.json beside it.
        inputs: image files, folders of them, or a .jsonl, .json or .csv file of rows of text.
        to: the folder to write to; by default `predictions` in the run folder.
        support: of a few-shot run or a backbone without classes, a folder with a folder of example images for each class.
        options: the other fields of `vismt.jobs.predictions.Options`: arm, top, sheet, maps, own_size, flip, temperature,
            new_tokens, seed.

    Returns:
        `.rows`, the answers as dictionaries, and `.files`, the written files.

    Raises:
        UserError: an unknown option, one of another kind of model, and files that cannot be read.
    """
    from vismt.jobs import predict as jobs
    from vismt.jobs.predictions import Options

    require_known("predict: no option", options, [item.name for item in fields(Options) if item.name != "support"])
    settings = Options(support=None if support is None else Path(support), **options)
    objects = source.objects if isinstance(source, StudyResults) else {}
    folder = source.kept_folder() if isinstance(source, StudyResults) else Path(source)
    paths = [Path(path) for path in ([inputs] if isinstance(inputs, str | Path) else inputs)]
    with registered(objects):
        return jobs.predict(folder, paths, None if to is None else Path(to), settings)


def _models(model: Any, objects: dict[str, Any], key: str) -> dict[str, dict[str, str]]:
    """Return the arms of a model or of a mapping to several: {name in results: {key: name in the configuration}}."""
    several = model if isinstance(model, Mapping) else {None: model}
    arms = {}
    for title, given in several.items():
        if not isinstance(given, str | Path) and not callable(given):
            raise UserError(
                f"model: {title or 'the argument'} is {shown_value(given)}; give a model, the name of one, or a mapping from "
                "names to models."
            )
        name = str(given) if isinstance(given, str | Path) else name_of(given, objects, title)
        arms[re.sub(r"[^\w.+-]+", "-", title or Path(title_of(name)).name)] = {key: name}
    if len(arms) < len(several) or not arms:
        raise UserError(f"model: {list(several)}; name at least one model, each by another name.")
    return arms


def _sets(data: Any, objects: dict[str, Any]) -> list[str]:
    """Return the entries of a data set, a list of several or a mapping from names in results to objects."""
    if isinstance(data, Mapping) and not hasattr(data, "column_names"):
        pairs = list(data.items())
    else:
        pairs = [(None, given) for given in (data if type(data) in (list, tuple) else [data])]
    return [str(given) if isinstance(given, str | Path) else name_of(given, objects, title) for title, given in pairs]


def _conditions(attacks: Sequence[Any], corruptions: Sequence[Any], epsilon: float | str) -> dict[str, list[Any]]:
    """Return the keys `attacks` and `corruptions` of an evaluate section."""
    for name, given in (("attacks", attacks), ("corruptions", corruptions)):
        if isinstance(given, str):
            raise UserError(f"{name}: '{given}' is a text; give a list, ['{given}'].")
    return {
        "attacks": [
            {"name": entry, "epsilon": epsilon} if isinstance(entry, str) else _plain(entry) for entry in attacks
        ],
        "corruptions": [{"name": entry} if isinstance(entry, str) else _plain(entry) for entry in corruptions],
    }


def _plain(entry: Any) -> Any:
    return asdict(entry) if is_dataclass(entry) and not isinstance(entry, type) else entry


def _with_objects(config: dict[str, Any], objects: Mapping[str, Any], folder: str | Path | None) -> StudyResults:
    """Run a study whose objects have their names already."""
    with registered(objects):
        results = train(config, folder)
    return StudyResults(results.folder, results.rows, objects, results._temporary)
