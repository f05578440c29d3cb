"""Tasks of lm-evaluation-harness: `kind: "lm_eval:arc_easy"`, or the file of a task, `kind: "lm_eval:my_task.yaml"`.

The harness gives documents, prompts, examples of the prompt and metrics. Its own model class reads log-likelihoods and writes
texts, so each score is the harness's score. Here each document has a record, and intervals and paired differences follow from
the records. A metric is reported if it is a mean of a number for each document, or a quotient of two sums (perplexities of
whole texts). Another metric (a correlation, a corpus score) has no value for a document, and is left out with a line.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from vismt.base import console
from vismt.base.errors import UserError, near
from vismt.base.registry import first_line
from vismt.data.texts.text_set import TextRow, TextSet
from vismt.llm.net import LmNet, TextBatch
from vismt.llm.tasks import TEXT_TASKS
from vismt.llm.tasks.base import Item, LmTask, Record, Tokenizer, by_row, context_tokens
from vismt.llm.tasks.pieces import piece
from vismt.uncertainty.intervals import HIGHER, LOWER, NUMBER, SHARE, Measure

_FAMILY = "lm_eval"
SEED = 1234  # seed of the examples of a prompt, the harness's default
# Quotients of the sums of log-likelihoods and lengths of documents: exp(-sum/sum), or -sum/sum/ln 2.
QUOTIENTS = {"weighted_perplexity": math.exp, "bits_per_byte": lambda nats: nats / math.log(2)}


class Harness(LmTask):
    """A task of lm-evaluation-harness. It is evaluated and not trained.

    Args:
        prompt: Empty, because the task has prompts.
        shots: Number of examples in the prompt. None for the task's number.

    Raises:
        UserError: If a prompt is given, the number of examples is negative, a package is missing, or the task cannot be loaded.
    """

    reads = False
    labelled = False
    own = True
    name = ""  # name of the task, or of its file

    def __init__(self, prompt: str = "", shots: int | None = None) -> None:
        super().__init__(prompt)
        if prompt or (shots is not None and shots < 0):
            raise UserError(
                f"tasks: '{_FAMILY}:{self.name}' has prompts of its own: leave prompt out, and give shots 0 or more."
            )
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError(
                f"tasks: '{_FAMILY}:{self.name}' needs lm-evaluation-harness: pip install \"vismt[lm-eval]\""
            )
        self.shots = shots
        self._task: Any = None
        self._requests: dict[str, list[Any]] = {}  # requests of each document
        self._model: tuple[LmNet, Any] | None = None
        self._tokenizer: Tokenizer  # the tokenizer of the latest row

    @property
    def about(self) -> str:
        return f"lm-evaluation-harness, {self.task.config.num_fewshot}-shot"

    @property
    def task(self) -> Any:
        """The harness's task. It is loaded with its documents on first use."""
        if self._task is None:
            from lm_eval.tasks import TaskManager

            logging.getLogger("lm_eval").setLevel(logging.ERROR)
            of_file = self.name.endswith((".yaml", ".yml"))
            manager = TaskManager(include_defaults=not of_file)  # the index of all tasks takes ten seconds
            if not of_file and self.name not in manager.all_tasks:
                raise UserError(
                    f"tasks: lm-evaluation-harness has no task '{self.name}'.{near(self.name, manager.all_tasks)}"
                )
            try:
                tasks = manager.load(self.name)["tasks"]
            except Exception as error:  # files and downloads of other people can raise any error
                raise UserError(f"tasks: '{_FAMILY}:{self.name}' cannot be loaded ({first_line(error)}).") from error
            if len(tasks) != 1:
                raise UserError(
                    f"tasks: '{_FAMILY}:{self.name}' stands for {len(tasks)} tasks; name each: {near(self.name, tasks)}"
                )
            (task,) = tasks.values()
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                raise UserError(
                    f"tasks: '{_FAMILY}:{self.name}' runs code of the model or reads images, which vismt does not."
                )
            shots = task.config.num_fewshot if self.shots is None else self.shots
            task.set_config(key="num_fewshot", value=shots or 0)
            task.set_fewshot_seed(seed=SEED)
            self._task = task
        return self._task

    def own_rows(self) -> TextSet:
        """Return a row for each document, named by its number. The requests of all documents are made in the harness's order."""
        self.task.build_all_requests()
        for request in self.task.instances:
            self._requests.setdefault(str(request.doc_id), []).append(request)
        for requests in self._requests.values():
            requests.sort(key=lambda request: request.idx)
        ids = list(self._requests)
        asked = json.dumps([[str(r.arguments) for r in of] for of in self._requests.values()])
        digest = hashlib.sha256(asked.encode()).hexdigest()
        title = str(self.task.task_name)
        return TextSet(title, "test", [{"doc": name} for name in ids], ids, lambda: digest, _FAMILY)

    def encode(self, name: str, row: TextRow, tokenizer: Tokenizer) -> Item:
        self._tokenizer = tokenizer
        text = str(self._requests[row["doc"]][0].arguments[0])
        return Item(name, [piece(context_tokens(tokenizer, text) or [0], [], self.length)])

    def loss(self, net: LmNet, batch: TextBatch) -> dict[str, Tensor]:
        raise UserError(f"tasks: '{_FAMILY}:{self.name}' is for evaluation; train another task.")

    def score(self, net: LmNet, batch: TextBatch, items: Sequence[Item]) -> list[Record]:
        model = self._model_of(net, len(items))
        names = [item.id.rpartition(":")[2] for item in items]
        requests = [request for name in names for request in self._requests[name]]
        kinds: dict[str, list[Any]] = {}
        for request in requests:
            request.resps = []
            kinds.setdefault(request.request_type, []).extend([request] * request.repeats)
        for kind, asked in kinds.items():
            for request, answer in zip(asked, getattr(model, kind)(asked, disable_tqdm=True), strict=True):
                request.resps.append(answer)
        every, self.task._instances = self.task._instances, requests
        self.task.apply_filters()
        self.task._instances = every
        records = []
        for item, name in zip(items, names, strict=True):
            record: Record = {"id": item.id}
            for chosen in self._requests[name][0].filtered_resps:
                answers = [request.filtered_resps[chosen] for request in self._requests[name]]
                found = self.task.process_results(self._requests[name][0].doc, answers)
                record |= {
                    metric if chosen == "none" else f"{metric},{chosen}": _plain(of) for metric, of in found.items()
                }
            records.append(record)
        return records

    def _model_of(self, net: LmNet, batch: int) -> Any:
        if self._model is None or self._model[0] is not net:
            from lm_eval.models.huggingface import HFLM

            self._model = (net, HFLM(pretrained=net.lm, tokenizer=self._tokenizer, batch_size=batch))
        return self._model[1]

    def measures(self, records: Sequence[Record]) -> dict[str, Measure]:
        found = {}
        aggregations, better = self.task.aggregation(), self.task.higher_is_better()
        for metric in [key for key in records[0] if key != "id"]:
            plain = metric.split(",")[0]
            aggregation = getattr(aggregations.get(plain), "__name__", "")
            values = [record[metric] for record in records]
            direction = HIGHER if better.get(plain, True) else LOWER
            if aggregation in QUOTIENTS and all(isinstance(value, list) for value in values):
                total = math.fsum(length for _, length in values)
                nats = -math.fsum(nats for nats, _ in values) / total
                scale = QUOTIENTS[aggregation](nats)
                slope = scale if aggregation == "weighted_perplexity" else 1 / math.log(2)
                effects = [scale + slope * (-own - nats * length) * len(values) / total for own, length in values]
                found[metric] = Measure(metric, by_row(records, effects), NUMBER, direction)
            elif aggregation in ("mean", "nanmean") and all(isinstance(value, float) for value in values):
                share = SHARE if all(0 <= value <= 1 for value in values) else NUMBER
                found[metric] = Measure(metric, by_row(records, values), share, direction)
            else:
                console.stage("eval", f"{self.name}   {metric} has no number for each document and is left out")
        if not found:
            raise UserError(f"tasks: '{_FAMILY}:{self.name}' has no metric with a number for each document.")
        return found


def _plain(value: Any) -> Any:
    """Return a metric of a document as JSON holds it."""
    if isinstance(value, (tuple, list)):
        return [float(part) if isinstance(part, (int, float)) else str(part) for part in value]
    return float(value) if isinstance(value, (bool, int, float)) or hasattr(value, "item") else str(value)


TEXT_TASKS.family(_FAMILY, lambda name: type("Harness", (Harness,), {"name": name, "__doc__": Harness.__doc__}))
