"""The two usual references for an adapter: `full` trains every weight, `head` only the classifier (a linear probe).

Neither adds anything to the model. Merging therefore changes nothing, and the model itself is the export. Large copies of the
weights before the training are in a temporary file (vismt/lowrank/model/record.py), for `unadapt` and for saving only what
changed. Left out: rates by depth, which `train.rates` of a run or parameter groups of an optimiser set.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vismt.base.errors import UserError, need_names
from vismt.lowrank.model.inject import check_trained_whole, install, matched_parameters
from vismt.lowrank.model.record import AdaptReport, count_parameters, refuse_adapted
from vismt.lowrank.model.targets import HEAD_NAMES, Targets, heads_of
from vismt.methods import Method, register_method


def full(
    model: nn.Module,
    *,
    targets: Targets,
    rank: int,
    alpha: float | None,
    seed: int,
    exclude: str | Sequence[str] = (),
) -> AdaptReport:
    """Train every weight: full fine-tuning.

    exclude: Names or patterns of parameters and modules that stay frozen.
    """
    refuse_adapted(model)
    frozen = set(matched_parameters(model, "adapt.exclude", need_names("adapt.exclude:", exclude)))
    return _train(model, "full", [name for name, _ in model.named_parameters() if name not in frozen])


def head(
    model: nn.Module,
    *,
    targets: Targets,
    rank: int,
    alpha: float | None,
    seed: int,
    also_train: str | Sequence[str] = (),
) -> AdaptReport:
    """Train only the classifier: a linear probe.

    The classifier is what `get_classifier` or `get_output_embeddings` returns, or else the module head, fc, classifier, score
    or lm_head. A model without a classifier is frozen as a whole, for a head of your own behind it.

    also_train: Parameters that are trained beside the classifier, or a head that is not found.
    """
    refuse_adapted(model)
    chosen = matched_parameters(model, "adapt.also_train", need_names("adapt.also_train:", also_train))
    classifier = _classifier(model)
    named = dict(model.named_parameters())
    tied = next((name for name in classifier if name not in named), None)
    if tied is not None:
        raise UserError(
            f"adapt: 'head': '{tied}' is tied to a weight of the model, which would change too; untie them first."
        )
    report = _train(model, "head", [name for name in named if name in classifier or name in chosen])
    if not classifier and not chosen:
        report.extras.append("no classifier found in the model: all of it is frozen, for a head of your own behind it")
    return report


def _classifier(model: nn.Module) -> list[str]:
    """Return the names of the parameters of the classifier."""
    heads = {id(head) for getter in ("get_classifier", "get_output_embeddings") for head in heads_of(model, getter)}
    named = {path: module for path, module in model.named_modules() if id(module) in heads}
    named = named or {path: module for path, module in model.named_children() if path in HEAD_NAMES}
    return [f"{path}.{name}" for path, module in named.items() for name, _ in module.named_parameters()]


def _train(model: nn.Module, method: str, names: Sequence[str]) -> AdaptReport:
    install(model, method, [], {}, check_trained_whole(model, f"adapt: {method}", names))
    return AdaptReport(method, [], *count_parameters(model))


ALL = dict.fromkeys(("targets", "rank", "alpha"), "trains every weight: set exclude")
_NONE = dict.fromkeys(("targets", "rank", "alpha"), "trains the classifier: set also_train")
register_method(Method("full", full, layers=(), exports=False, unread=ALL))
register_method(Method("head", head, layers=(), exports=False, unread=_NONE, head_only=True))
