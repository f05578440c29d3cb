"""`vismt.verify`: is an adapter, or a merged checkpoint, what it says, and what will a reader make of it?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from vismt.base import console
from vismt.base.errors import UserError
from vismt.verification.against_base import against_base
from vismt.verification.against_merged import against_merged
from vismt.verification.checkpoints import named_base, of_base, of_merged, open_checkpoint
from vismt.verification.facts import WHOLE, Facts, read_facts
from vismt.verification.inside import examine
from vismt.verification.library import Translated, translated
from vismt.verification.located import Located, locate
from vismt.verification.readers import readings
from vismt.verification.rules import Case, findings
from vismt.verification.verdict import UNSEEN, Check, Finding, ModuleRow, Verdict, ranked


def verify(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    merged: str | Path | None = None,
    probe: str | Path | None = None,
    readers: Sequence[str] = (),
) -> Verdict:
    """Return the verdict on an adapter folder or a checkpoint. Nothing in it is run, and no values are changed.

    Args:
        folder: what vismt or peft wrote, or a checkpoint.
        base: the model it was trained on: a folder or file, an asset, or a model on the hub, which is fetched.
        merged: a checkpoint that holds the base with the adapter; needs `base`.
        probe: examples to measure on: a .txt file, or a card or folder of labelled images; needs `base`.
        readers: of peft, transformers, vllm, llama.cpp and timm: what these do with the folder counts in the status.

    Returns:
        The verdict; `.status` is ok, suspicious or broken.

    Raises:
        UserError: for a folder, base or merged checkpoint that is not there. What is wrong inside becomes a finding.
    """
    for name, given in (("merged", merged), ("probe", probe)):
        if given is not None and base is None:
            raise UserError(f"verify: {name} '{given}' needs the base model; give base.")
    facts = read_facts(folder)
    rows = {path: ModuleRow(path, module.rank, module.scale) for path, module in facts.modules.items()}
    verdict = Verdict(str(folder), facts.kind, _about(facts), modules=list(rows.values()))
    found: list[Finding] = []
    stock, whole = None, None if facts.is_adapter else translated(facts)
    if base is not None and facts.is_adapter:
        opened = [
            open_checkpoint(place, what) for place, what in ((base, "base"), (merged, "merged")) if place is not None
        ]
        config = next((one.model_config for one in opened if one.model_config), {})  # that of the other for one without
        opened = [replace(one, model_config=one.model_config or config) for one in opened]
        held, found = of_base(opened[0], facts)
        stock = locate(facts, held)
    if facts.modules or not facts.is_adapter:
        found += [*findings(Case(facts, stock, whole)), *examine(facts, rows)]
    elif not facts.reasons and not facts.with_role(*WHOLE):
        found.append(Finding("broken", "empty", "the file holds no tensor of an adapter"))
    if stock is not None:
        found += [*named_base(facts, str(base), stock.facts), *against_base(facts, stock, rows)]
        if merged is not None:
            held, more = of_merged(opened[1], facts, stock.checkpoint)
            found += [*more, *against_merged(facts, stock, locate(facts, held), rows)]
        if probe is not None:
            from vismt.verification.probe import probe as measure  # transformers and timm

            verdict.probe, more = measure(facts, str(base), None if merged is None else str(merged), str(probe))
            found += more
    verdict.checks = list(_checks(facts, stock, whole, verdict, merged is not None))
    unseen = "; ".join(f"{check.name}: {check.text}" for check in verdict.checks if not check.done)
    verdict.about |= {UNSEEN: unseen} if unseen else {}
    found = [Finding("broken", "malformed", reason) for reason in facts.reasons + facts.stored.reasons] + found
    read = readings(Case(facts, stock, whole), readers)
    verdict.readers = [reading.row for reading in read]
    verdict.answer = "; ".join(reading.line for reading in read)
    # The reader of this format counts where nothing else explains what it does.
    own = facts.kind if not any(finding.level == "broken" for finding in found) else ""
    found += [finding for reading in read if readers or reading.reader == own for finding in reading.findings]
    verdict.findings = ranked(found)
    return verdict


def _checks(
    facts: Facts, base: Located | None, whole: Translated | None, verdict: Verdict, merged: bool
) -> Iterable[Check]:
    """Yield what was looked at, and what was not with what it needs. merged: whether a merged checkpoint was given."""
    if facts.kind == "none":
        return
    tensors = f"{len(facts.tensors):,} tensors"
    yield Check("values", True, f"{tensors}, for NaN, infinities and zeros")
    if not facts.is_adapter:
        model = whole.library.model if whole is not None and whole.library else None
        known = "needs the config.json of a model that the installed transformers knows; timm has no such file"
        yield Check(
            "names and shapes", model is not None, known if model is None else f"against {type(model).__name__}"
        )
        return
    settings = sum(row.rank is not None for row in verdict.modules)
    yield Check("settings", True, f"against the tensors, ranks of {settings:,} of {len(verdict.modules):,} modules")
    found = (
        f"{len(base.names):,} of {len(facts.modules):,} modules are in the base" if base is not None else "needs --base"
    )
    yield Check("names and shapes", base is not None, found)
    sizes = [row.ratio for row in verdict.modules if row.ratio is not None]
    text = f"|ΔW| / |W| is {_range(sorted(round(size, 4) for size in sizes))}" if sizes else "no update was determined"
    yield Check("size of the update", bool(sizes), text if base is not None else "needs --base")
    fits = [row for row in verdict.modules if row.fit is not None]
    right = sum(row.fit == "right" for row in fits)
    kinds = Counter(f"{row.fit} {row.factor:.3g}" if row.fit == "factor" else str(row.fit) for row in fits)
    others = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if kind != "right")
    compared = f"{right} of {len(facts.modules)} modules are merged as the settings say{'; ' * bool(others)}{others}"
    missing = "no module could be compared" if merged else "needs --merged"
    yield Check("scale and merge", bool(fits), compared if fits else missing)
    rows = verdict.probe
    yield Check("answers", bool(rows), f"{rows[0]['n']:,} examples" if rows else "needs --probe")


def checked(folder: Path) -> Verdict:
    """Return the verdict on a folder that was just written, and print it; UserError where it is broken."""
    verdict = verify(folder)
    if verdict.status == "broken":
        worst = verdict.findings[0].text
        raise UserError(f"'{folder}' was written, but is broken: {worst}; see `vismt verify {folder}`.")
    console.stage("verify", f"{verdict.status}   {verdict.answer}".rstrip())
    return verdict


def _about(facts: Facts) -> dict[str, str]:
    ranks = sorted({module.rank for module in facts.modules.values() if module.rank})
    scales = sorted({module.scale for module in facts.modules.values() if module.scale is not None})
    settings = facts.settings
    divisor = "sqrt(r) (rsLoRA)" if settings and settings.use_rslora else "r"
    saved = [tensor.path for tensor in facts.with_role("saved")]
    dtypes = sorted({tensor.dtype for tensor in facts.tensors.values()})
    about = {
        "kind": facts.kind,
        "method": facts.tuner + (" (DoRA)" if facts.config.get("use_dora") else ""),
        "modules": f"{len(facts.modules):,}" if facts.modules else "",
        "targets": ", ".join(sorted({path.rpartition(".")[2] for path in facts.modules})),
        "rank": _range(ranks),
        "alpha": f"{settings.lora_alpha:g}, divided by {divisor}" if settings else "",
        "scale": _range(scales),
        "whole parameters": ", ".join(saved[:4]) + (f" and {len(saved) - 4} more" if len(saved) > 4 else ""),
        "dtype": ", ".join(dtypes),
        "tensors": f"{len(facts.tensors):,}",
        "tokenizer": ", ".join(facts.tokenizer),
        "base": facts.base or "",
    }
    return {name: text for name, text in about.items() if text}


def _range(values: Sequence[float]) -> str:
    return "" if not values else f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
