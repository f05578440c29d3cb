"""The experts of a pool as its configuration lists them: source, threat and level of each, with a label.

`pool.experts` lists them one by one. `pool.levels` is short for experts of source.data under linf, with the level as their label.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

from vismt.base.errors import UserError, require_known
from vismt.config.typed import Names, plain_name
from vismt.data.set_entries import shown_name
from vismt.metatune.settings import CORRUPTION, GAUSSIAN, THREATS, Adversary, AdversaryForm

CLEAN_EXPERT = "clean"
_NORMS = (*THREATS, CLEAN_EXPERT)
_SEVERITIES = [1.0, 2.0, 3.0, 4.0, 5.0]


@dataclass(frozen=True)
class ExpertSpec:
    """One expert of a pool.

    Args:
        source: card or cards of the episodes. null means the cards of source.data.
        level: strength of the threat. For linf the budget of each value in 1/255, for l2 the radius in 1/255 (128 is a radius of
            0.5 in pixel units of [0, 1]), and for gaussian the standard deviation in 1/255. For a corruption, which is drawn from
            the fifteen, the severity from 1 to 5, or null for all five. From a list, one level is drawn for each episode.
        norm: threat of the training, or clean for neither of the two attacks.
        label: name of the expert, in place of source-norm-level.
    """

    source: str | list[str] | None = None
    level: float | list[float] | None = None
    norm: Annotated[str, Names(_NORMS)] = "linf"
    label: str | None = None

    def levels(self, where: str) -> list[float]:
        """Return the values of the level, [] for a clean expert. where: Key in errors."""
        require_known(f"{where}.norm:", [self.norm], _NORMS)
        if self.norm == CLEAN_EXPERT:
            if self.level is not None:
                raise UserError(f"{where}: level {self.level} with norm clean, which has no attack; leave level out.")
            return []
        if self.level is None:
            if self.norm == CORRUPTION:
                return _SEVERITIES
            raise UserError(f"{where}.level: is null; norm {self.norm} needs a budget in 1/255.")
        values = [float(value) for value in (self.level if isinstance(self.level, list) else [self.level])]
        if self.norm == CORRUPTION and not set(values) <= set(_SEVERITIES):
            raise UserError(f"{where}: {values}; the level of a corruption is its severity, 1 to 5.")
        highest = 255 if self.norm == "linf" else float("inf")
        if any(not 0 <= value <= highest or value == float("inf") for value in values):
            ends = "from 0 to 255" if self.norm == "linf" else "not negative"
            raise UserError(f"{where}: {values}; a level is a budget in 1/255, {ends}.")
        if self.norm == GAUSSIAN and 0 in values:
            raise UserError(f"{where}: {values}; noise of level 0 is none: give a level above 0, or norm clean.")
        return values

    def default_label(self, sources: Sequence[str], levels: Sequence[float]) -> str:
        """Return "source-norm-level", "clean" for a clean expert of source.data."""
        if self.norm == CLEAN_EXPERT and self.source is None:
            return CLEAN_EXPERT
        level = "" if self.level is None else level_text(levels)
        ending = f"{self.norm}-{level}" if self.norm == "l2" else f"{self.norm}{level}"
        return f"{'+'.join(map(shown_name, sources))}-{ending}"


def level_text(levels: Sequence[float]) -> str:
    """Return the values of a level as text for a label."""
    return "-".join(f"{value:g}" for value in levels)


@dataclass(frozen=True)
class PlannedExpert:
    """An expert to train.

    adversary: Attacks of the training. None for a clean expert. copy: Number of experts before it that differ only in the seed.
    """

    sources: tuple[str, ...]
    adversary: Adversary | None
    copy: int = 0


def plan_experts(
    specs: Sequence[ExpertSpec], key: str, form: AdversaryForm, default: Sequence[str]
) -> dict[str, PlannedExpert]:
    """Return the experts by label, in order.

    key: Key of the list in the configuration, for errors. form: Settings that all adversaries share. default: Cards of
    source.data. Raises UserError for a norm, level or label that does not fit, and for a label of two different experts.
    """
    experts: dict[str, PlannedExpert] = {}
    earlier: list[tuple[tuple[str, ...], Adversary | None]] = []
    for number, spec in enumerate(specs):
        where = f"{key}[{number}]"
        levels = spec.levels(where)
        sources = (spec.source,) if isinstance(spec.source, str) else tuple(spec.source or default)
        unit = 1 if spec.norm == CORRUPTION else 255
        adversary = None
        if spec.norm != CLEAN_EXPERT:
            adversary = Adversary(**asdict(form), norm=spec.norm, epsilons=tuple(value / unit for value in levels))
        label = spec.label or spec.default_label(sources, levels)
        plain_name(label, f"{where}.label")
        if label == CLEAN_EXPERT and (adversary is not None or sources != tuple(default)):
            raise UserError(f"{where}.label: 'clean' is clean meta-tuning on source.data; give another label.")
        if label == "average":
            raise UserError(f"{where}.label: 'average' is the mean of all experts; give another label.")
        copy = earlier.count((sources, adversary))
        earlier.append((sources, adversary))
        if label in experts and copy:
            label = f"{label}-copy{copy + 1}"
        if label in experts:
            raise UserError(f"{where}: two different experts have the label '{label}'; give one of them another.")
        experts[label] = PlannedExpert(sources, adversary, copy)
    return experts
