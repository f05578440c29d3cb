"""Values by example that another program wrote: tables of predictions, and the samples of lm-evaluation-harness.

A table (CSV, JSONL, JSON or Parquet, a frame of pandas, or a list of mappings) has a row for each example, with the name of the
example and a score, or a label and an answer. A folder of tables holds one training of a model in each file. The harness writes
`samples_TASK_TIME.jsonl`, with a row for each document and the metrics of its task.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vismt.base.errors import UserError, require_known, shown_value
from vismt.config.sections import RESOLVED
from vismt.storage.files import JsonObject, parse_json
from vismt.storage.paths import regular_file

if TYPE_CHECKING:
    from vismt.uncertainty.intervals import Better

ENDINGS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
_SAMPLES = re.compile(r"samples_(?P<task>.+?)(?:_(?P<time>\d{4}-\d\d-\d\dT[\d.-]+))?\.jsonl")
MOST_CHARACTERS = 1 << 26  # of a line
CORRECT = "accuracy"
# Names that a column may have if the user names none.
USUAL = {
    "id": "id example image file filename path doc_id question_id sample_id name key",
    "score": "score correct acc accuracy loss dice iou f1 nll",
    "label": "label target truth gold y_true true_label",
    "answer": "answer prediction predicted predicted_label pred y_pred",
    "probability": "probability confidence predicted_probability",
    "group": "group patient subject user speaker",
    "seed": "seed",
    "set": "set dataset",
}
# keys of the harness
OWN_KEYS = {"doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "filter", "metrics"}
TableColumns = Mapping[str, Sequence[Any]]  # columns of a file by name
Say = Callable[[str], None]  # takes a sentence about what was guessed or left out


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table. None for a column that is found by its usual names, if the table has one of them.

    Args:
        id: Name of the example.
        score: Number for each example: 1 and 0 for right and wrong, a loss, a Dice score.
        label: Right answer.
        answer: Answer of the model.
        probability: Probability of the answer. A name with a `*` for the class names a column for each class.
        group: Group of the example. Examples of one group depend on each other.
        seed: Training that gave the row.
        set: Data set of the row.
        better: "higher" or "lower" by metric, for metrics whose names do not say which values are better.
    """

    id: str | None = None
    score: str | None = None
    label: str | None = None
    answer: str | None = None
    probability: str | None = None
    group: str | None = None
    seed: str | None = None
    set: str | None = None
    better: Mapping[str, Better] = field(default_factory=dict)


NO_COLUMNS = Columns()


@dataclass
class TrainingValues:
    """The values of one training of a model on one set.

    Args:
        where: Name of the input, for messages.
        model: Name of the model.
        data: Name of the set, "" if the input does not say it.
        seed: Name of the training, "" if the input does not say it.
        ids: Name of each example, (n,).
        values: Value of each example by metric.
        confidences: Probability of each answer, empty if it is not known.
        truths: Text of each example that is equal in all inputs: the label, or the digest of the document. Empty if not known.
        groups: Group of each example, empty if the examples are independent.
        better: "higher" or "lower" by metric, as far as an input or the user says it.
    """

    where: str
    model: str
    data: str
    seed: str
    ids: list[str] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=dict)
    confidences: list[float] = field(default_factory=list)
    truths: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    better: dict[str, Better] = field(default_factory=dict)


def is_table(path: Path) -> bool:
    """Return whether `path` is a table, or a folder with tables or with samples of the harness, and no run folder."""
    if path.is_dir():
        return not (path / RESOLVED).exists() and bool(_tables(path) or _samples(path))
    return path.suffix.lower() in ENDINGS


def read_path(path: Path, model: str, columns: Columns, say: Say) -> list[TrainingValues]:
    """Return the trainings of one model in a table, a folder of tables, or a folder or file of the harness.

    Args:
        path: File or folder.
        model: Name of the model.
        columns: Names of the columns.
        say: Function that takes a sentence about what was guessed or left out.

    Raises:
        UserError: If a file cannot be read, a column is missing or not clear, or a value is not a number.
    """
    samples = [path] if _SAMPLES.fullmatch(path.name) else [] if path.is_file() else _samples(path)
    if samples:
        return _read_samples(samples, model, say)
    if path.is_file():
        return read_table(_columns_of(path), str(path), model, columns, say)
    tables = _tables(path)
    if not tables:
        raise UserError(f"compare: '{path}' has no table ({', '.join(ENDINGS)}) and no samples_*.jsonl.")
    trainings = []
    for table in tables:
        found = read_table(_columns_of(table), str(table), model, columns, say)
        for training in found:
            training.seed = training.seed or table.stem
        trainings += found
    return trainings


def read_table(table: TableColumns, where: str, model: str, columns: Columns, say: Say) -> list[TrainingValues]:
    """Return the trainings of one model in a table.

    table: Columns by name. Other arguments and errors are as for `read_path`.
    """
    rows = len(next(iter(table.values()), ()))
    if not rows:
        raise UserError(f"compare: '{where}' has no rows.")
    names = _resolve(columns, list(table), where, say)

    def column(role: str) -> Sequence[object]:
        return table[names[role]] if role in names else ()

    values, confidences = _values_of(table, names, where)
    ids, truths, groups = ([_text(value) for value in column(role)] for role in ("id", "label", "group"))
    for role, texts in (("id", ids), ("group", groups)):
        if "" in texts:
            raise UserError(f"compare: '{where}' row {texts.index('') + 1}: column '{names[role]}' is empty.")
    data, seeds = ([_text(value) for value in column(role)] or [""] * rows for role in ("set", "seed"))
    places: dict[tuple[str, str], list[int]] = {}
    for row, key in enumerate(zip(data, seeds, strict=True)):
        places.setdefault(key, []).append(row)

    def taken(texts: Sequence[object], chosen: Sequence[int]) -> list[Any]:
        return list(texts) if len(chosen) == rows else [texts[row] for row in chosen] if texts else []

    return [
        TrainingValues(
            where,
            model,
            name,
            seed,
            taken(ids, chosen),
            {metric: taken(of, chosen) for metric, of in values.items()},
            taken(confidences, chosen),
            taken(truths, chosen),
            taken(groups, chosen),
        )
        for (name, seed), chosen in places.items()
    ]


def columns_of_object(given: object, name: str) -> TableColumns:
    """Return the columns of a pandas frame or a list of mappings. Raise UserError for another object."""
    if hasattr(given, "columns") and hasattr(given, "to_dict"):
        return {str(column): values for column, values in given.to_dict("list").items()}
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise UserError(
            f"compare: '{name}' is {shown_value(given)}; give a path, a frame of pandas or a list of mappings."
        )
    return columns_of_rows(given, name)


def columns_of_rows(rows: Iterable[Mapping[str, object]], where: str) -> TableColumns:
    """Return the columns of a list of mappings, with None where a row lacks a key."""
    rows = list(rows)
    number = next((number for number, row in enumerate(rows, 1) if not isinstance(row, Mapping)), None)
    if number is not None:
        raise UserError(f"compare: '{where}' row {number} is {shown_value(rows[number - 1])}, not an object with keys.")
    return {str(name): [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)}


def _resolve(columns: Columns, known: Sequence[str], where: str, say: Say) -> dict[str, str]:
    """Return the column of each role: the one that the user names, or the only one with a usual name."""
    named = {role: value for role in USUAL if (value := getattr(columns, role)) is not None}
    require_known(f"compare: '{where}' has no column", (name for name in named.values() if "*" not in name), known)
    fitting = {role: [name for name in known if name.casefold() in usual.split()] for role, usual in USUAL.items()}
    if fitting["label"] == ["label", "true_label"] and not fitting["answer"] and columns.label != "label":
        fitting |= {"label": ["true_label"], "answer": ["label"]}  # as `vismt predict` names them
    guessed = {role: names[0] for role, names in fitting.items() if role not in named and len(names) == 1}
    by_answer = bool(named.keys() & {"label", "answer", "probability"}) and "score" not in named
    if not by_answer and "score" not in named and {"score", "answer"} <= guessed.keys():
        both = f"'{guessed['score']}' as score, and '{guessed['answer']}' as answer"
        raise UserError(f"compare: '{where}' has {both}; name --score, or --label and --answer.")
    by_answer = by_answer or "score" not in {**named, **guessed}
    unused = {"score"} if by_answer else {"answer", "probability"}
    guessed = {role: name for role, name in guessed.items() if role not in unused}
    found = {**guessed, **named}
    for role in ("id", "label", "answer") if by_answer else ("id", "score"):
        if role not in found:
            several = f"{_quoted(fitting[role])} for the {role}" if fitting[role] else f"the columns {_quoted(known)}"
            other = " (or a score for each example by --score)" if by_answer and role != "id" else ""
            raise UserError(f"compare: '{where}' has {several}; name one by --{role}{other}.")
    if guessed:
        texts = [f"{role} is '{name}'" for role, name in guessed.items()]
        say(f"{where}: {', '.join(texts)}")
    return found


def _values_of(table: TableColumns, names: Mapping[str, str], where: str) -> tuple[dict[str, list[float]], list[float]]:
    """Return the value of each row by metric, and the probability of each answer ([] if it is not known)."""
    if "score" in names:
        return {names["score"]: _numbers(table, names["score"], where)}, []
    labels, answers = ([_text(value) for value in table[names[role]]] for role in ("label", "answer"))
    correct = [float(label == answer) for label, answer in zip(labels, answers, strict=True)]
    if "probability" not in names:
        return {CORRECT: correct}, []
    pattern = names["probability"]
    if "*" not in pattern:
        of_answer = _probabilities(table, pattern, where)
        of_truth = [p if right else 1 - p for p, right in zip(of_answer, correct, strict=True)]
        nlls = [-math.log(max(p, 1e-300)) for p in of_truth]
        briers = [(1 - p) ** 2 for p in of_truth]
        return {CORRECT: correct, "NLL of right or wrong in nats": nlls, "Brier of right or wrong": briers}, of_answer
    begin, _, end = pattern.partition("*")
    classes = {
        name[len(begin) : len(name) - len(end)]: name for name in table if name.startswith(begin) and name.endswith(end)
    }
    require_known(f"compare: '{where}': no column '{pattern}' for the class", [*labels, *answers], classes)
    by_class = {name: _probabilities(table, column, where) for name, column in classes.items()}
    import torch

    from vismt.uncertainty.probability_metrics import MEASURES

    log_p = torch.tensor([*by_class.values()], dtype=torch.float64).T.clamp_min(1e-300).log()
    truth = torch.tensor([[*by_class].index(label) for label in labels])
    means = {one.metric: one.values(log_p, truth).tolist() for one in MEASURES if one.measure is None}
    of_answer = [by_class[answer][row] for row, answer in enumerate(answers)]
    return {CORRECT: correct, **means}, of_answer


def _numbers(table: TableColumns, column: str, where: str) -> list[float]:
    """Return a column as numbers. The texts "true" and "false" of a table count as 1 and 0."""
    numbers = []
    for row, value in enumerate(table[column], 1):
        try:
            number = float(
                {"true": 1, "false": 0}.get(value.strip().casefold(), value) if isinstance(value, str) else value
            )
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"compare: '{where}' row {row}: '{column}' is {shown_value(value)}, not a finite number.")
        numbers.append(number)
    return numbers


def _probabilities(table: TableColumns, column: str, where: str) -> list[float]:
    numbers = _numbers(table, column, where)
    row = next((row for row, number in enumerate(numbers, 1) if not 0 <= number <= 1), None)
    if row is not None:
        raise UserError(f"compare: '{where}' row {row}: '{column}' is {numbers[row - 1]}, not a probability.")
    return numbers


def _text(value: object) -> str:
    """Return a name as text: a whole number without a decimal point, as one table may have 7 and another 7.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value).strip()


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names[:12])


def _tables(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.suffix.lower() in ENDINGS and path.is_file())


def _samples(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("samples_*.jsonl") if path.is_file())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Raise UserError for a file that cannot be read: a pipe, another encoding, or another format than its ending says."""
    try:
        regular_file(path)
        yield
    except (OSError, ValueError, csv.Error) as error:
        if isinstance(error, UserError):
            raise
        reason = (
            "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else getattr(error, "strerror", None) or error
        )
        raise UserError(f"compare: '{path}' cannot be read: {reason}.") from error


def _columns_of(path: Path) -> TableColumns:
    """Return the columns of a file."""
    ending = path.suffix.lower()
    with _reading(path):
        if ending == ".parquet":
            return _parquet_columns(path)
        if ending in (".jsonl", ".json"):
            rows = _json_rows(path) if ending == ".jsonl" else parse_json("".join(_lines(path)))
            if isinstance(rows, Mapping):
                raise ValueError("it holds one object; put the rows into a list")
            return columns_of_rows(rows, str(path))
        reader = csv.reader(_lines(path), delimiter="\t" if ending == ".tsv" else ",")
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError("a column has the name of another")
        rows = [row for row in reader if row]
        for number, row in enumerate(rows, 1):
            if len(row) != len(names):
                raise ValueError(f"row {number} has {len(row)} values for {len(names)} columns")
        return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def _parquet_columns(path: Path) -> TableColumns:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"compare: '{path}' is a Parquet file, which needs pyarrow: pip install pyarrow") from error
    table = parquet.read_table(path)
    return {name: table[name].to_pylist() for name in table.column_names}


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text file. Raise ValueError for a line of more than MOST_CHARACTERS."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        number = 0
        while line := file.readline(MOST_CHARACTERS + 1):
            number += 1
            if len(line) > MOST_CHARACTERS:
                raise ValueError(f"line {number} has more than {MOST_CHARACTERS:,} characters")
            yield line


def _json_rows(path: Path) -> Iterator[JsonObject]:
    """Yield the object of each line that is not empty."""
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                yield parse_json(line)
            except ValueError as error:
                raise ValueError(f"line {number} is not JSON ({error})") from error


def _read_samples(paths: Sequence[Path], model: str, say: Say) -> list[TrainingValues]:
    """Return a training for each task of the harness, from the newest file of the task."""
    newest: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (_SAMPLES.fullmatch(path.name) or {"time": ""})["time"] or ""):
        match = _SAMPLES.fullmatch(path.name)
        if match is not None:
            if match["task"] in newest:
                say(f"{newest[match['task']]} is left out, as {path.name} is newer")
            newest[match["task"]] = path
    return [_read_task(path, model, task, say) for task, path in sorted(newest.items())]


def _read_task(path: Path, model: str, task: str, say: Say) -> TrainingValues:
    """Return the values of one task: the metrics that are numbers, each with the name of its filter if the task has several."""
    values: dict[str, dict[str, float]] = {}
    truths: dict[str, str] = {}
    skipped: dict[str, None] = {}
    with _reading(path):
        for number, row in enumerate(_json_rows(path), 1):
            if not isinstance(row, dict) or "doc_id" not in row:
                raise ValueError(f"row {number} has no doc_id, which samples of lm-evaluation-harness have")
            name, filtered = _text(row["doc_id"]), row.get("filter", "none")
            truths[name] = str(row.get("doc_hash") or row.get("target_hash") or "")
            metrics = row.get("metrics") or [key for key in row if key not in OWN_KEYS and not key.endswith("_hash")]
            for metric in metrics:
                value = row.get(metric)
                if not isinstance(value, bool | int | float) or not math.isfinite(value):
                    skipped[metric] = None
                    continue
                of = values.setdefault(metric if filtered == "none" else f"{metric},{filtered}", {})
                if name in of:
                    raise ValueError(f"row {number}: doc_id {name} comes twice")
                of[name] = float(value)
    whole = {metric: of for metric, of in values.items() if len(of) == len(truths)}
    skipped |= dict.fromkeys(metric for metric in values if metric not in whole)
    if skipped:
        say(f"{path}: {_quoted(list(skipped))} left out, as not every document has a number for it")
    if not whole:
        raise UserError(f"compare: '{path}' has no metric with a number for every document.")
    ids = list(truths)
    return TrainingValues(
        str(path),
        model,
        task,
        "",
        ids,
        {m: [of[name] for name in ids] for m, of in whole.items()},
        [],
        [*truths.values()],
    )
