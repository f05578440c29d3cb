"""Scores of the base, of the base with the adapter and of a merged checkpoint on examples.

In a text file, every non-empty line is an example, and its score is the mean negative log-likelihood of its tokens. An image
with a label is right or wrong. KL is the divergence of the adapted model's answers from the base's answers, for each token or
image. Differences are paired on the same examples. Intervals are 95 %, by Student's t over the examples.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.backbones.lm import create_lm
from vismt.base import console
from vismt.base.errors import UserError
from vismt.lowrank.files.save_load import load_adapter
from vismt.lowrank.model.named import disabled
from vismt.robustness.classifier import load_classifier
from vismt.storage.records import Row
from vismt.uncertainty.intervals import estimate
from vismt.verification.facts import Facts, Finding

_TEXTS, _TOKENS, _IMAGES = 64, 256, 256  # at most
UNCHANGED = 1e-6  # nats: last bits
COLLAPSED = 1.0  # nats a token that an adapter may add before it counts as a collapse
Example = tuple[Tensor, Tensor]  # input with a batch of one; targets (t,)


def probe(facts: Facts, base: str, merged: str | None, data: str) -> tuple[list[Row], list[Finding]]:
    """Return rows of scores on a text file, or on a card or folder of labelled images, and the findings that follow.

    Raises UserError if the base, the merged checkpoint or the examples cannot be read.
    """
    texts = Path(data).suffix == ".txt"
    model, examples = _lm(base, data) if texts else _classifier(base, data)
    try:
        off = _adapt(model if texts else model.net, facts)  # type: ignore[arg-type]
    except Exception as error:  # a library raises what the folder leads to
        reason = " ".join(str(error).split())[:200]
        return [], [Finding("broken", "does-not-load", f"the adapter cannot be put on the base: {reason}")]
    plain, adapted, moved = [], [], []
    for example in console.track(examples, "verify", "probe"):
        with off():
            before = _answers(model, example)
        after = _answers(model, example)
        plain.append(_score(before, example[1], texts))
        adapted.append(_score(after, example[1], texts))
        moved.append(float(F.kl_div(before, after, log_target=True, reduction="batchmean")))
    name = "NLL" if texts else "accuracy"
    change = _minus(adapted, plain)
    rows = [_row("base", name, plain), _row("adapter", name, adapted), _row("adapter - base", name, change)]
    rows.append(_row("adapter || base", "KL", moved))
    findings = _changes(change, moved, texts)
    if merged is not None:
        third = create_lm(merged)[0] if texts else load_classifier(merged)
        held = [_score(_answers(third, example), example[1], texts) for example in examples]
        rows += [_row("merged", name, held), _row("merged - adapter", name, _minus(held, adapted))]
        findings += _merged(_minus(held, adapted), change)
    return rows, findings


def _lm(base: str, data: str) -> tuple[nn.Module, list[Example]]:
    try:
        lines = [line for line in Path(data).read_text(encoding="utf8").splitlines() if line.strip()][:_TEXTS]
    except (OSError, ValueError) as error:
        raise UserError(f"verify: --probe '{data}' cannot be read as text ({error}).") from error
    model, tokenizer = create_lm(base)
    encoded = [torch.tensor(tokenizer(line)["input_ids"][:_TOKENS]) for line in lines]
    examples = [(ids[None, :-1], ids[1:]) for ids in encoded if len(ids) > 1]
    return model, _enough(examples, data)


def _classifier(base: str, data: str) -> tuple[nn.Module, list[Example]]:
    from vismt.data.images import open_images
    from vismt.data.set_entries import card_and_split

    images = open_images(*card_and_split(data), download=False)
    model = load_classifier(base)
    names = model.labels or images.classes
    if sorted(names) != sorted(images.classes) or len(names) != model.num_classes:
        raise UserError(
            f"verify: '{base}' has {model.num_classes} outputs, '{data}' {len(images.classes)} classes; give images of its "
            "classes."
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:_IMAGES].tolist()
    outputs = torch.tensor([names.index(name) for name in images.classes])
    return model, _enough([(images.read(i)[None] / 255, outputs[images.labels[i]][None]) for i in order], data)


def _enough(examples: list[Example], data: str) -> list[Example]:
    if len(examples) < 2:
        raise UserError(
            f"verify: --probe '{data}' has {len(examples)} examples (images, or lines of two tokens); an interval needs two."
        )
    return examples


def _adapt(model: nn.Module, facts: Facts) -> Callable[[], AbstractContextManager[object]]:
    """Put the adapter on a model, and return a context manager that switches it off."""
    if facts.kind == "vismt":
        load_adapter(model, facts.folder, on_other_base="warn")
        return lambda: disabled(model)
    PeftModel = importlib.import_module("peft").PeftModel
    adapted = PeftModel.from_pretrained(model, str(facts.folder)).eval()
    return lambda: adapted.disable_adapter()


@torch.no_grad()
def _answers(model: nn.Module, example: Example) -> Tensor:
    """Return log-probabilities (t, k) of an example."""
    found: Any = model(example[0])
    return (found.logits[0] if hasattr(found, "logits") else found).float().log_softmax(-1)


def _score(answers: Tensor, targets: Tensor, texts: bool) -> float:
    return float(F.nll_loss(answers, targets)) if texts else float(answers.argmax(-1) == targets)


def _minus(one: Sequence[float], two: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, two, strict=True)]


def _row(model: str, measure: str, values: Sequence[float]) -> Row:
    value = low = high = None
    if torch.tensor(values).isfinite().all():
        found = estimate(values)
        value, (low, high) = found.mean, found.bounds
    return {"model": model, "measure": measure, "value": value, "low": low, "high": high, "n": len(values)}


def _changes(differences: list[float], moved: list[float], texts: bool) -> list[Finding]:
    if not all(torch.tensor(values).isfinite().all() for values in (differences, moved)):
        return [Finding("broken", "collapses", "the model with the adapter answers with NaN or infinite values")]
    if max(moved) < UNCHANGED:
        text = f"the adapter does not change the model on these {len(moved)} examples"
        return [Finding("suspicious", "no-effect", text)]
    low, high = estimate(differences).bounds
    if texts and low > COLLAPSED:
        text = f"the adapter adds {low:.2f} to {high:.2f} nats a token to the base's NLL on this set (95 %)"
        return [Finding("suspicious", "collapses", text, "look at the scale and at trained layers that were not saved")]
    if not texts and high < 0:
        text = f"the adapter's accuracy is {-100 * high:.1f} to {-100 * low:.1f} points below the base's on this set (95 %)"
        return [Finding("suspicious", "collapses", text, "look at the scale, and at a trained head that was not saved")]
    return []


def _merged(differences: list[float], changes: list[float]) -> list[Finding]:
    """Return whether the merged checkpoint answers otherwise than base and adapter.

    This means on average by more than a quarter of the adapter's change, or by more than 5 % of it in one direction. Rounding
    in a 16-bit model moves answers in both directions.
    """
    if not torch.tensor(differences).isfinite().all():
        return [Finding("broken", "merged-differs", "the merged checkpoint answers with NaN or infinite values")]
    apart, whole = (sum(abs(value) for value in values) / len(values) for values in (differences, changes))
    low, high = estimate(differences).bounds
    if apart <= max(1e-3, (0.25 if low <= 0 <= high else 0.05) * whole):
        return []
    text = (
        f"the merged checkpoint differs from base and adapter by {apart:.3g} an example on average, the adapter from the base "
        f"by {whole:.3g}"
    )
    return [Finding("suspicious", "merged-differs", text, "compare the weights: --merged names the modules")]
