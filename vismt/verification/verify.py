"""Check that an adapter or merged checkpoint matches its metadata, and predict how each library will load it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path

from vismt import __version__
from vismt.base import console
from vismt.base.errors import UserError
from vismt.lowrank.files.facts import WHOLE
from vismt.storage.files import JsonObject
from vismt.verification.against_merged import against_merged
from vismt.verification.checkpoints import (
    Located,
    Translated,
    locate,
    open_checkpoint,
    same_parameter,
    translated,
)
from vismt.verification.facts import LEVELS, Facts, Finding, read_facts, shorten_names
from vismt.verification.libraries import ask_peft, readings
from vismt.verification.rules import FolderCase, findings_of
from vismt.verification.weights import ModuleRow, against_base, examine_values

EXIT_CODES = {"ok": 0, "suspicious": 3, "broken": 4}
_FORMAT = 1
UNSEEN = "not checked"  # of `about`, and of lines of checks
# Keys of a config.json that change what a model computes, and keys with such words that do not.
DECIDES = re.compile(
    r"layer|head|hidden|size$|rope|theta|eps|act|window|softcap|scal|multiplier|bias|expert|_dim$|depth|norm"
)
DOES_NOT = re.compile(r"drop|output_|vocab|label|token|router_aux|init|cache|chunk|tie_")
# Families of models by words in their names, at the start or the end of a word.
_KINDS = "llama|llava|mistral|mixtral|qwen|gemma|phi|gpt|opt|bloom|falcon|bert|t5|vit|swin|dino|deit|beit|clip|siglip|whisper"
FAMILIES = re.compile(rf"(?<![a-z])(?:{_KINDS})|(?:{_KINDS})(?![a-z])")
_SIZES = {"m": 10**6, "b": 10**9}


@dataclass(frozen=True)
class Check:
    """Something that `vismt verify` looks at.

    Attributes:
        name: What is looked at, "scale and merge".
        done: Whether it was looked at.
        text: What was compared, and with which result. If it was not looked at, what the check needs.
    """

    name: str
    done: bool
    text: str


@dataclass(repr=False)
class Verdict:
    """What `vismt verify` says about a folder. Printing it gives a table.

    Attributes:
        folder: Folder that was examined.
        kind: vismt, peft, checkpoint or none.
        about: Facts of the folder in words, by name.
        checks: Checks that were done, and checks that were not done, with what they need.
        findings: Findings, the most serious first.
        modules: A row for each adapted module.
        readers: Rows with what each reader will do, one for each reader and group of tensors.
        answer: What each reader will do, in one line.
        probe: Rows of measured scores with 95 % intervals.
    """

    folder: str
    kind: str
    about: dict[str, str] = field(default_factory=dict)
    checks: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    modules: list[ModuleRow] = field(default_factory=list)
    readers: list[JsonObject] = field(default_factory=list)
    answer: str = ""
    probe: list[JsonObject] = field(default_factory=list)

    def __repr__(self) -> str:
        """Return the verdict, its reasons and the checks that were not done, as a table."""
        rows = [("verdict", f"{self.status}: {self.folder}"), ("readers", self.answer)]
        rows += [
            ("", f"{row['line'].partition(':')[0]} ({row['source']}): {remark}")
            for row in self.readers
            for remark in row["remarks"]
        ]
        rows += [(name, text) for name, text in self.about.items() if name != UNSEEN]
        rows += [("checked" if check.done else UNSEEN, f"{check.name}: {check.text}") for check in self.checks]
        for finding in self.findings:
            rows += [(finding.level, finding.text), ("", finding.fix and f"fix: {finding.fix}")]
        width = max(len(name) for name, _ in rows) + 2
        lines = [f"{name:<{width}}{text}" for name, text in rows if text]
        if self.probe:
            heads = ("model", "measure", "value", "low", "high", "n")
            cells = [[f"{row[h]:.4g}" if isinstance(row[h], float) else row[h] for h in heads] for row in self.probe]
            lines.append(console.aligned(heads, cells))
        return "\n".join(lines)

    @property
    def status(self) -> str:
        """Return ok, suspicious or broken."""
        levels = {finding.level for finding in self.findings}
        return next((level for level in LEVELS[:2] if level in levels), "ok")

    @property
    def exit_code(self) -> int:
        """Return 0, 3 or 4."""
        return EXIT_CODES[self.status]

    @property
    def codes(self) -> set[str]:
        """Return the codes of the findings that decide the status."""
        return {finding.code for finding in self.findings if finding.level != "note"}

    def as_json(self) -> dict[str, object]:
        """Return the verdict as values for JSON."""
        status = {"status": self.status, "exit_code": self.exit_code}
        return {"format": _FORMAT, "vismt": __version__, **status, **asdict(self)}


def verify(
    folder: str | Path,
    *,
    base: str | Path | None = None,
    merged: str | Path | None = None,
    probe: str | Path | None = None,
    readers: Sequence[str] = (),
) -> Verdict:
    """Return the verdict on an adapter folder or a checkpoint. Nothing in the folder is run, and no values are changed.

    Args:
        folder: Folder that vismt or peft wrote, or a checkpoint.
        base: Model that the adapter was trained on: a folder, a file, an asset, or a model on the hub, which is fetched.
        merged: Checkpoint that holds the base with the adapter. It needs `base`.
        probe: Examples to measure on: a .txt file, or a card or folder of labelled images. They need `base`.
        readers: Names among peft, transformers and timm. What these libraries do with the folder counts in the
            status.

    Returns:
        The verdict. Its `.status` is "ok", "suspicious" or "broken". Printing it gives a table.

    Raises:
        UserError: If the folder, the base or the merged checkpoint does not exist. A fault inside them becomes a finding.

    Example:
        model = timm.create_model("vit_small_patch16_224.dino", pretrained=True, num_classes=10)
        vismt.adapt(model, "pissa", targets=["qkv"])
        vismt.export_peft(model, "adapter")
        print(vismt.verify("adapter"))
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
        config = next((one.model_config for one in opened if one.model_config), {})  # or of the other file
        opened = [replace(one, model_config=one.model_config or config) for one in opened]
        held, found = of_base(opened[0], facts)
        stock = locate(facts, held)
    said, needs = ask_peft(facts, stock.library if stock else None)
    found += said
    if facts.modules or not facts.is_adapter:
        try:
            found += findings_of(FolderCase(facts, stock, whole))
        except UserError as error:  # an expression of the settings that takes too long
            facts.reasons.append(str(error))
            facts.settings = None
        found += examine_values(facts, rows)
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
    verdict.checks = list(_checks(facts, stock, whole, verdict, merged is not None, needs))
    unseen = "; ".join(f"{check.name}: {check.text}" for check in verdict.checks if not check.done)
    verdict.about |= {UNSEEN: unseen} if unseen else {}
    found = [Finding("broken", "malformed", reason) for reason in facts.reasons + facts.stored.reasons] + found
    read = readings(FolderCase(facts, stock, whole), readers)
    verdict.readers = [reading.row for reading in read]
    verdict.answer = "; ".join(reading.line for reading in read)
    # The reader of this format counts where nothing else explains what it does.
    own = facts.kind if not any(finding.level == "broken" for finding in found) else ""
    found += [finding for reading in read if readers or reading.reader == own for finding in reading.findings]
    # The most serious first, each once.
    verdict.findings = sorted(dict.fromkeys(found), key=lambda finding: LEVELS.index(finding.level))
    return verdict


def _checks(
    facts: Facts, base: Located | None, whole: Translated | None, verdict: Verdict, merged: bool, needs: str
) -> Iterable[Check]:
    """Yield the checks that were done, and the others with what they need.

    merged: Whether a merged checkpoint was given. needs: What the question to peft needs.
    """
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
    if facts.kind == "peft":
        yield Check("peft", not needs, needs or "reads the folder into the empty base")
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


def verify_written(folder: Path) -> Verdict:
    """Return and print the verdict on a folder that was just written. Raises UserError if the folder is broken."""
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


# ---- checkpoints beside an adapter
def of_base(facts: Facts, adapter: Facts) -> tuple[Translated, list[Finding]]:
    """Return the base of an adapter in the class that was adapted, and what is wrong with it without its whole parameters."""
    whole = translated(facts, adapter)
    held = [tensor.path for tensor in adapter.with_role("saved")]
    whole.lacking = [name for name in whole.lacking if not any(same_parameter(path, name) for path in held)]
    return whole, of_checkpoint(whole, "the base")


def of_merged(facts: Facts, adapter: Facts, base: Translated) -> tuple[Translated, list[Finding]]:
    """Return a merged checkpoint in the class that was adapted, and what is wrong with it in its own class."""
    whole, own = translated(facts, adapter), translated(facts)
    own = own if own.library else whole
    return whole, [*of_checkpoint(own, "the merged checkpoint"), *configurations(base, own)]


def of_checkpoint(whole: Translated, what: str) -> list[Finding]:
    """Return the findings about a checkpoint without a base. what: Name of the checkpoint in messages."""
    reasons = [Finding("broken", "malformed", f"{what}: {reason}") for reason in whole.raw.stored.reasons]
    found = findings_of(FolderCase(whole.raw, whole=whole))
    return [*reasons, *(replace(one, text=f"{what}: {one.text}") for one in found)]


def configurations(base: Translated, merged: Translated) -> Iterable[Finding]:
    """Yield findings for keys of a merged checkpoint's config.json that differ from the base and change the function."""
    ours, theirs = (one.facts.model_config for one in (merged, base))
    filled = [one.library.model.config for one in (merged, base) if one.library]
    if len(filled) == 2 and type(filled[0]) is type(filled[1]):
        ours, theirs = (config.to_dict() for config in filled)
    if not ours or not theirs:
        return
    differing = [key for key in _differing(ours, theirs) if DECIDES.search(key) and not DOES_NOT.search(key)]
    if differing:
        text = f"config.json of the merged checkpoint differs from the base's in {shorten_names(differing)}"
        yield Finding("broken", "config", text, "take config.json from the base")
    if ours.get("tie_word_embeddings") and theirs.get("tie_word_embeddings") is False:
        text = "config.json of the merged checkpoint ties the head to the embedding, and the base's does not"
        yield Finding("suspicious", "config", text, "set tie_word_embeddings to false")


def _differing(ours: Mapping[str, object], theirs: Mapping[str, object], before: str = "") -> Iterable[str]:
    for key in ours.keys() & theirs.keys():
        one, two = ours[key], theirs[key]
        if isinstance(one, dict) and isinstance(two, dict) and not key.startswith("rope"):
            yield from _differing(one, two, f"{before}{key}.")
        elif one != two:
            yield f"{before}{key}"


def named_base(facts: Facts, given: str, base: Facts) -> Iterable[Finding]:
    """Yield a finding if the base that an adapter names is another model than the given one, by family and size."""
    name = (facts.base or "").rstrip("/")
    known = [given.rstrip("/"), str(base.model_config.get("_name_or_path") or "").rstrip("/")]
    last = name.rpartition("/")[2].lower()
    if not name or any(
        last == one.rpartition("/")[2].lower() or f"models--{name.replace('/', '--')}" in one for one in known
    ):
        return
    size = re.search(r"(?:^|[-_./])(\d+(?:\.\d+)?)([mb])(?:$|[-_.])", last)
    count = sum(prod(tensor.shape) for tensor in base.tensors.values())
    other = size is not None and not 0.4 < count / max(float(size[1]) * _SIZES[size[2]], 1) < 2.5
    words, kind = FAMILIES.findall(last), str(base.model_config.get("model_type") or "").lower()
    other |= bool(kind and words) and not any(word in kind for word in words)
    text = f"the adapter names '{name[:200]}' as its base, and '{given[:200]}' is given"
    if other:
        yield Finding("suspicious", "base-name", f"{text}, which is of another family or size", "give that base")
    else:
        yield Finding("note", "base-name", text)
