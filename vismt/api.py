"""Functions that run studies from Python without a configuration file, and `predict`.

`train`, `meta_tune`, `evaluate_fewshot` and `audit` build the configuration of a job (vismt/jobs) and run the job in a folder.
Their numbers, records and reports are the same as with `vismt run`. Data sets and models may be Python objects
(vismt/base/objects.py).

A data set is one of these:

- the name of a card ("cifar10:test")
- a folder with one folder of images for each class
- a .csv file with the columns path and label
- a torch or torchvision data set of pairs (image, label)
- a Hugging Face data set with a column of images and a column of labels

Several data sets are a list, or a mapping from names in the results to data sets.

A model is a name of timm, a name of `vismt assets list`, or any nn.Module. A timm module gets images that are normalised by its
pretrained_cfg. Any other module gets images in [0, 1].
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
from vismt.storage.files import JsonObject

if TYPE_CHECKING:
    from vismt.jobs.predictions import Predictions
    from vismt.report.compare.pairs import PairedDifference
    from vismt.uncertainty.intervals import Better

_EPSILON = "4.5/255"


@named_arguments
def train(config: Mapping[str, object], folder: str | Path | None = None) -> StudyResults:
    """Run a study: train the arms of a configuration and evaluate them.

    Args:
        config: Content of a configuration file (`configs/` has examples). Data sets and models in it may be objects.
        folder: Run folder. The same call with the same folder continues an interrupted run. None runs in a temporary folder, of
            which `.report()` and `vismt.predict` keep a copy in ./runs.

    Returns:
        The numbers, from which `.report()` writes the report.

    Raises:
        UserError: If `vismt run` would refuse the configuration, or the folder holds another run.

    Example:
        results = vismt.train(
            {
                "task": "classification",
                "model": {"name": "vit_tiny_patch16_224", "pretrained": False, "img_size": 32},
                "adapt": {"method": "lora", "rank": 4},
                "tasks": [{"name": "digits", "train": ["digits"], "limit": 60, "test_share": 0.2}],
                "train": {"steps": 4, "lr": 1e-3},
            }
        )
        print(results)
    """
    from vismt.jobs import started_config, typed_config
    from vismt.report.results import RESULTS, read_results

    objects: dict[str, object] = {}
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
    *inputs: object,
    id: str | None = None,
    score: str | None = None,
    label: str | None = None,
    answer: str | None = None,
    probability: str | None = None,
    group: str | None = None,
    seed: str | None = None,
    set: str | None = None,
    better: Mapping[str, Better] | None = None,
    baseline: str | None = None,
    common: bool = False,
) -> list[PairedDifference]:
    """Compare models example by example, from predictions that any program wrote.

    Args:
        inputs: Run folders, tables (CSV, JSONL, JSON, Parquet), folders with a table for each seed, output folders of
            lm-evaluation-harness, pandas frames, or lists of mappings. A mapping gives names to several inputs.
        id: Name of the column that identifies the example. If a column is not named, its usual names are tried.
        score: Name of the column with a number for each example: 1 or 0 for right or wrong, a loss, a Dice score.
        label: Name of the column with the right answer.
        answer: Name of the column with the answer of the model.
        probability: Name of the column with the probability of the answer. With a `*` in the place of a class it names one
            column for each class.
        group: Name of the column that groups examples that depend on each other, for example a patient.
        seed: Name of the column with the training seed.
        set: Name of the column with the data set.
        better: "higher" or "lower" by metric, if the name of a metric does not say which values are better.
        baseline: Name of the input that all others are compared with. None compares all pairs.
        common: Whether to compare only the examples that all inputs have. Otherwise an example that one input lacks is an
            error.

    Returns:
        The difference b - a of each pair of models, for each metric and data set, in the unit of the metric.

    Raises:
        UserError: If there are fewer than two models, a file cannot be read, a column is missing, a value is not a number, or
            the inputs hold different examples.

    Example:
        first = [{"image": name, "correct": int(name in "abcdefghij")} for name in "abcdefghijklmnop"]
        second = [{"image": name, "correct": int(name in "abc")} for name in "abcdefghijklmnop"]
        (pair,) = vismt.compare({"first": first, "second": second}, id="image", score="correct")
        print(pair)
    """
    from vismt.report.compare.pairs import paired_differences
    from vismt.report.compare.report import input_names, read_inputs
    from vismt.report.compare.score_tables import Columns
    from vismt.report.comparison import compare_results as compare_rows

    named: dict[str, object] = {}
    for number, given in enumerate(inputs, 1):
        if isinstance(given, Mapping):
            named |= given
        else:
            named[str(number)] = given
    paths = {name: Path(given) for name, given in named.items() if isinstance(given, str | Path) and name.isdecimal()}
    names = dict(zip(paths, input_names(list(paths.values())), strict=True))
    columns = Columns(id, score, label, answer, probability, group, seed, set, better or {})
    with console.quiet():
        results, values = read_inputs({names.get(name, name): given for name, given in named.items()}, columns, common)
    arms = list(dict.fromkeys(row.arm for row in results))
    require_known("compare: no model", [baseline] if baseline else [], arms)
    return paired_differences(compare_rows(results, values), baseline)


@named_arguments
def evaluate_fewshot(
    model: object,
    data: object,
    ways: int = 5,
    shots: int | Sequence[int] = (1, 5),
    episodes: int = 600,
    *,
    queries: int = 15,
    attacks: Sequence[object] = (),
    corruptions: Sequence[object] = (),
    epsilon: float | str = _EPSILON,
    head: str | Sequence[str] = "prototypes",
    sampling: str = "parts",
    ood: object = (),
    img_size: int | None = None,
    seed: int = 1,
    folder: str | Path | None = None,
) -> StudyResults:
    """Evaluate models on few-shot episodes: on clean images, under attacks and under corruptions.

    Args:
        model: Model, or a mapping from names in the results to models. All models are evaluated on the same episodes.
        data: Data sets. Each is a card ("cifar10:test"), a folder of class folders, a .csv of paths and labels, or a data set
            of torch or Hugging Face. Several data sets are a list, or a mapping from names in the results to data sets.
        ways: Number of classes in an episode.
        shots: Number of support images of each class. A list of numbers is evaluated one number after the other.
        episodes: Number of episodes for each data set and number of shots, at least 2.
        queries: Number of query images of each class.
        attacks: Names of attacks ("strong", "pgd"), or mappings with the keys of an attack in a configuration. Attacks change
            the query images. The support images stay clean.
        corruptions: Names of corruptions, which stand for all severities, or mappings {"name": ..., "severities": [...]}.
        epsilon: Radius in linf of attacks that are given by name, in pixel units of [0, 1].
        head: Classifier on the features: "prototypes" (by cosine), "ridge", "logistic", "vbll", "laplace" or "finetune". A list
            of heads is compared on the same episodes.
        sampling: How episodes are drawn. "parts" draws them from five disjoint parts of the images, if the classes are large
            enough, so that intervals cover new images. With "with_replacement" intervals cover new episodes of the same images.
            "without_replacement" uses an image at most once.
        ood: Data sets of other classes. The results say as AUROC how well the largest probability separates their images from
            the queries.
        img_size: Side of the images in pixels. A module that timm did not make needs it.
        seed: Seed of the episodes.
        folder: Run folder, as for `train`.

    Returns:
        Accuracies and the other measures with 95 % intervals over new images or episodes. With `sampling="parts"` there is also
        a row "accuracy (interval over episodes)" with the interval that papers usually print. That interval is smaller, because
        it ignores that other images of the same classes would give another accuracy.

    Raises:
        UserError: If a name is unknown, or a data set has too few classes or images for the episodes.

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=0)
        results = vismt.evaluate_fewshot(model, "digits", ways=3, shots=1, queries=5, episodes=4, attacks=["pgd"])
        print(results)
    """
    from vismt.engine.study import FROZEN
    from vismt.jobs.fewshot.config import PROTOTYPES, head_names

    objects: dict[str, object] = {}
    arms = _models(model, objects, "model.name")
    if isinstance(head, type):
        raise UserError(
            f"head: {head.__name__} is a class; register it, HEADS.add('mine', {head.__name__}), and give its name."
        )
    heads = [head] if isinstance(head, str) else list(head)
    if not heads:
        raise UserError("head: []; name at least one, such as 'prototypes'.")
    require_known("head: no head", heads, head_names())
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
    model: object,
    data: object,
    attacks: Sequence[object] = ("strong",),
    corruptions: Sequence[object] = (),
    *,
    epsilon: float | str = _EPSILON,
    images: int | None = None,
    batch: int = 32,
    img_size: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
) -> StudyResults:
    """Measure the accuracy of image classifiers on clean images, under attacks and under corruptions.

    Args:
        model: Classifier, or a mapping from names in the results to classifiers. The outputs are the classes of the data in
            their order. A name may also be a checkpoint file.
        data: Data sets, as for `evaluate_fewshot`.
        attacks: Attacks, as for `evaluate_fewshot`.
        corruptions: Corruptions, as for `evaluate_fewshot`.
        epsilon: Radius of attacks that are given by name, as for `evaluate_fewshot`.
        images: Number of images of each data set, drawn with `seed`. None takes all images.
        batch: Number of images in a batch.
        img_size: Side of the images in pixels. A module that timm did not make needs it.
        seed: Seed of the drawn images and of the attacks.
        folder: Run folder, as for `train`.

    Returns:
        Accuracies with 95 % intervals over images. Under an attack, an image counts as right if both the clean and the attacked
        answer are right.

    Raises:
        UserError: If a name is unknown, or the data have other classes than the model.

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        print(vismt.audit({"mine": model}, "digits", attacks=["pgd"], images=20))
    """
    objects: dict[str, object] = {}
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
            **_conditions(attacks, corruptions, epsilon),
        },
    }
    return _with_objects(config, objects, folder)


@named_arguments
def meta_tune(
    model: object,
    data: object,
    test: object,
    *,
    method: str = "lora",
    adapt: Mapping[str, object] | None = None,
    levels: Sequence[float] = (),
    rank: int = 8,
    steps: int = 100,
    lr: float = 1e-3,
    ways: int = 5,
    shots: int = 5,
    queries: int = 15,
    episodes: int = 600,
    attacks: Sequence[object] = (),
    epsilon: float | str = _EPSILON,
    img_size: int | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
) -> StudyResults:
    """Meta-tune an adapter on episodes of `data`, and evaluate it on episodes of `test`.

    The results also have the numbers of the model before the tuning.

    Args:
        model: Model. A module is copied and not changed.
        data: Data sets of the training episodes, as for `evaluate_fewshot`.
        test: Data sets of the test episodes.
        method: Name of the method, one of `vismt.list_methods()`.
        adapt: Further keys of the section `adapt` of a configuration, {"targets": ..., "alpha": ..., "options": {...}}. They
            take precedence over `method` and `rank`.
        levels: Attack budgets in units of 1/255. If levels are given, AMT's pool is trained (`method` is then "amt"): one
            robust expert for each level, and the experts are merged for every test task.
        rank: Rank of each pair of factors.
        steps: Number of optimiser steps, one episode each. A tenth of the steps warms up.
        lr: Peak learning rate.
        ways: Number of classes in an episode.
        shots: Number of support images of each class.
        queries: Number of query images of each class.
        episodes: Number of test episodes of each data set.
        attacks: Attacks of the test, as for `evaluate_fewshot`.
        epsilon: Radius of attacks that are given by name, as for `evaluate_fewshot`.
        img_size: Side of the images in pixels. A module that timm did not make needs it.
        seed: Seed of the training. The test episodes do not depend on it.
        folder: Run folder, as for `train`.

    Returns:
        Accuracies of "frozen" and of "adapted" or "merged". `.model()` returns the tuned model, or the only expert of a pool.
        With several experts, `.model("2")` returns the expert of level 2 and `.model("average")` the mean of the experts.

    Raises:
        UserError: If `train` would refuse the arguments.

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=0)
        results = vismt.meta_tune(
            model, "photo_crops:train", "digits", steps=2, ways=3, shots=1, queries=3, episodes=2
        )
        tuned = results.model()
    """
    objects: dict[str, object] = {}
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
    """Predict classes or maps of images, or answers of a language model, as `vismt predict` does.

    Args:
        source: Run folder, the results of a study from Python, a folder of `vismt merge` or `vismt export`, or a checkpoint of
            a timm model with a config.json beside it.
        inputs: Image files, folders of images, or a .jsonl, .json or .csv file with rows of text.
        to: Folder for the written files. None writes to `predictions` in the run folder.
        support: Folder with one folder of example images for each class. A few-shot run and a backbone without classes need it.
        options: Further fields of `vismt.jobs.predictions.Options`: arm, top, sheet, maps, own_size, flip, temperature,
            new_tokens, seed.

    Returns:
        An object with the answers as dictionaries (`.rows`) and the paths of the written files (`.files`).

    Raises:
        UserError: If an option is unknown or belongs to another kind of model, or a file cannot be read.

    Example:
        results = vismt.train(config)  # a study of image classification
        answers = vismt.predict(results, "new_images")
        print(answers.rows[0]["label"], answers.rows[0]["probability"])
    """
    from vismt.jobs import predict as jobs
    from vismt.jobs.predictions import Options

    require_known("predict: no option", options, [item.name for item in fields(Options) if item.name != "support"])
    settings = Options(support=None if support is None else Path(support), **options)
    objects = source.objects if isinstance(source, StudyResults) else {}
    folder = source.kept_folder() if isinstance(source, StudyResults) else Path(source)
    paths = [Path(path) for path in ([inputs] if isinstance(inputs, str | Path) else inputs)]
    with registered(objects):
        return jobs.predict_inputs(folder, paths, None if to is None else Path(to), settings)


def _models(model: object, objects: dict[str, object], key: str) -> dict[str, dict[str, str]]:
    """Return the arms of one model or of a mapping to several models: {name in results: {key: name in the configuration}}."""
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


def _sets(data: Any, objects: dict[str, object]) -> list[str]:
    """Return the data sets of a configuration from one data set, a list, or a mapping from names in results to objects."""
    if isinstance(data, Mapping) and not hasattr(data, "column_names"):
        pairs = list(data.items())
    else:
        pairs = [(None, given) for given in (data if type(data) in (list, tuple) else [data])]
    return [str(given) if isinstance(given, str | Path) else name_of(given, objects, title) for title, given in pairs]


def _conditions(
    attacks: Sequence[object], corruptions: Sequence[object], epsilon: float | str
) -> dict[str, list[object]]:
    """Return the keys `attacks` and `corruptions` of the section `evaluate`."""
    for name, given in (("attacks", attacks), ("corruptions", corruptions)):
        if isinstance(given, str):
            raise UserError(f"{name}: '{given}' is a text; give a list, ['{given}'].")
    return {
        "attacks": [
            {"name": entry, "epsilon": epsilon} if isinstance(entry, str) else _plain(entry) for entry in attacks
        ],
        "corruptions": [{"name": entry} if isinstance(entry, str) else _plain(entry) for entry in corruptions],
    }


def _plain(entry: object) -> object:
    return asdict(entry) if is_dataclass(entry) and not isinstance(entry, type) else entry


def _with_objects(config: JsonObject, objects: Mapping[str, object], folder: str | Path | None) -> StudyResults:
    """Run a study whose objects already have names."""
    with registered(objects):
        results = train(config, folder)
    return StudyResults(results.folder, results.rows, objects, results._temporary)
