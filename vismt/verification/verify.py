"""`vismt.verify`: is an adapter, or a merged checkpoint, what it says, and what will a reader make of it?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vismt.base.errors import UserError
from vismt.verification.against_base import against_base
from vismt.verification.against_merged import against_merged
from vismt.verification.facts import Facts, read_facts
from vismt.verification.inside import examine
from vismt.verification.located import Located, locate, open_checkpoint
from vismt.verification.readers import readings
from vismt.verification.verdict import Finding, Verdict, ranked


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
    verdict = Verdict(str(folder), facts.kind, _about(facts))
    if not facts.is_adapter:
        reasons = facts.reasons + facts.stored.reasons
        findings = [Finding("broken", "malformed", reason) for reason in reasons]
        if facts.kind == "none":
            text = "the folder holds no adapter and no checkpoint"
            findings.append(
                Finding("broken", "no-adapter", text, "give the folder with adapter_config.json or adapter.json")
            )
        verdict.findings = ranked(findings + _readers(verdict, facts, None, readers, findings))
        return verdict
    findings, verdict.modules = examine(facts)
    rows = {row.path: row for row in verdict.modules}
    stock = None if base is None else locate(facts, open_checkpoint(base, "base"))
    if stock is not None:
        findings += against_base(facts, stock, rows)
        if merged is not None:
            findings += against_merged(facts, stock, locate(facts, open_checkpoint(merged, "merged")), rows)
        if probe is not None:
            from vismt.verification.probe import probe as measure  # transformers and timm

            place = None if merged is None else str(merged)
            verdict.probe, more = measure(facts, str(base), place, str(probe))
            findings += more
    verdict.findings = ranked(findings + _readers(verdict, facts, stock, readers, findings))
    return verdict


def _readers(
    verdict: Verdict, facts: Facts, base: Located | None, named: Sequence[str], findings: Sequence[Finding]
) -> list[Finding]:
    """Fill in what readers do with the folder; return what is wrong with those named, and with peft, if nothing else is."""
    found = readings(facts, base, named)
    verdict.readers = [reading.row for reading in found]
    verdict.answer = "; ".join(reading.line for reading in found)
    own = facts.kind if not any(finding.level == "broken" for finding in findings) else ""
    return [finding for reading in found if named or reading.reader == own for finding in reading.findings]


def _about(facts: Facts) -> dict[str, str]:
    """Return what the folder is, in words."""
    ranks = sorted({module.rank for module in facts.modules.values() if module.rank})
    scales = sorted({module.scale for module in facts.modules.values() if module.scale is not None})
    settings = facts.settings
    saved = [tensor.path for tensor in facts.with_role("saved")]
    dtypes = sorted({tensor.dtype for tensor in facts.tensors.values()})
    about = {
        "kind": facts.kind,
        "method": facts.tuner + (" (DoRA)" if facts.config.get("use_dora") else ""),
        "modules": f"{len(facts.modules):,}" if facts.modules else "",
        "targets": ", ".join(sorted({path.rpartition(".")[2] for path in facts.modules})),
        "rank": _range(ranks),
        "alpha": f"{settings.lora_alpha:g}, divided by {'sqrt(r) (rsLoRA)' if settings.use_rslora else 'r'}"
        if settings
        else "",
        "scale": _range(scales),
        "whole parameters": ", ".join(saved[:4]) + (f" and {len(saved) - 4} more" if len(saved) > 4 else ""),
        "dtype": ", ".join(dtypes),
        "tensors": f"{len(facts.stored.tensors):,}",
        "tokenizer": ", ".join(facts.tokenizer),
        "base": facts.base or "",
    }
    return {name: text for name, text in about.items() if text}


def _range(values: Sequence[float]) -> str:
    return "" if not values else f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
