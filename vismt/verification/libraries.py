"""Ask peft what it does with a folder, and predict which tensors each library (a reader) uses, ignores, refuses or misreads.

With the base's config.json, the installed peft reads the folder into the empty model. Without a model, and for transformers and
timm, the answers follow from the rules that the folder meets (rules.py).
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vismt.base.errors import require_known
from vismt.lowrank.files.facts import TENSORS
from vismt.storage.files import JsonObject
from vismt.storage.wheels import one_line
from vismt.verification.checkpoints import Library
from vismt.verification.facts import Facts, Finding, shorten_names
from vismt.verification.rules import AGAIN, FolderCase, Met, met_rules, of_modules

# The worst effect on a tensor counts.
EFFECTS = ("used", "note", "misread", "ignored", "refused")
# With which the rules were run.
# Settings for which peft fetches other files or imports a module by its name, and the largest number that it is given.
_FETCHING, _MOST = ("adapters", "megatron_config", "prompt_tuning_init_state_dict_path"), 2**20
VERSIONS = {"peft": "0.21.2", "transformers": "5.24.0", "timm": "1.0.31"}
TENSOR_GROUPS = dict.fromkeys(("A", "B", "C", "A0", "B0", "tuner", "shared"), "factors")
TENSOR_GROUPS |= {"embedding_A": "embeddings", "embedding_B": "embeddings", "magnitude": "magnitudes"}
TENSOR_GROUPS |= {"bias": "biases", "saved": "parameters", "tokens": "embeddings", "": "weights"}


@dataclass(frozen=True)
class Remark:
    """What a reader does with some tensors.

    effect: Name among EFFECTS. groups: Number of modules by kind.
    """

    effect: str
    why: str
    fix: str
    groups: dict[str, int]

    @property
    def text(self) -> str:
        """Return the remark as a sentence."""
        whole = self.effect == "refused" or not self.groups
        parts = (f"{group} of {n} module{'s' * (n != 1)}" for group, n in self.groups.items())
        what = "" if whole else " and ".join(parts) + " "
        return f"{what}{self.effect}: {self.why}"


@dataclass(frozen=True)
class Reading:
    """What a reader does with a folder.

    applied: Number of modules (tensors of a checkpoint) that it uses as they are meant. table: Number of tensors with each effect
    ("used" among them), by group of tensors.
    """

    reader: str
    source: str
    applied: int
    of: int
    table: dict[str, dict[str, int]]
    remarks: tuple[Remark, ...]

    @property
    def state(self) -> str:
        """Return refused, differs or applied."""
        effects = {remark.effect for remark in self.remarks}
        if "refused" in effects:
            return "refused"
        return "differs" if effects & {"misread", "ignored"} else "applied"

    @property
    def line(self) -> str:
        """Return the answer in a few words."""
        count = f"{self.applied} of {self.of}"
        if self.state == "refused":
            answer = "refused"
        elif self.state == "applied":
            answer = f"applied, {count}"
        elif self.applied == 0:
            ignored = all(set(effects) == {"ignored"} for effects in self.table.values())
            answer = f"{count}, serves the base" if ignored else f"{count} as meant, served model differs"
        else:
            answer = f"{count}, served model differs"
        return f"{self.reader}: {answer}"

    @property
    def row(self) -> JsonObject:
        """Return the reading as values for JSON."""
        values = {name: getattr(self, name) for name in ("reader", "source", "state", "line", "applied", "of", "table")}
        remarks = [remark for remark in self.remarks if self.state != "refused" or remark.effect == "refused"]
        return {**values, "remarks": [f"{one.text}; {one.fix}" if one.fix else one.text for one in remarks]}

    @property
    def findings(self) -> list[Finding]:
        """Return the findings if the user asked about this reader."""
        causes = [remark for remark in self.remarks if remark.effect not in ("used", "note")]
        code = f"reader-{self.state}"
        return [Finding("broken", code, f"{self.reader}: {remark.text}", remark.fix) for remark in causes]


def ask_peft(facts: Facts, library: Library | None) -> tuple[list[Finding], str]:
    """Let the installed peft read a folder of peft into its empty base, on the meta device.

    Return what peft says, or what the question needs if it was not asked.
    """
    try:
        import peft
    except ImportError:
        return [], "needs peft: pip install peft"
    config = facts.config
    if facts.kind != "peft":
        return [], ""
    if library is None:
        return [], "needs --base with the config.json of a model that the installed transformers knows"
    if any(config.get(key) for key in _FETCHING) or any(
        isinstance(size, int) and size > _MOST for size in config.values()
    ):
        return [], "needs settings of a usual size that neither name a module to import nor other files"
    if not config or TENSORS not in facts.files or facts.stored.reasons:
        return [], f"needs settings and tensors ({TENSORS}) that can be read"
    name = f"peft {peft.__version__}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = peft.PeftConfig.from_pretrained(str(facts.folder))
            settings.inference_mode = True
            if hasattr(settings, "init_lora_weights"):
                settings.init_lora_weights = True  # a start is replaced by the tensors
            model = peft.get_peft_model(copy.deepcopy(library.model), settings, low_cpu_mem_usage=True)
            values = peft.load_peft_weights(str(facts.folder), device="cpu")
            found: Any = peft.set_peft_model_state_dict(model, values, low_cpu_mem_usage=True)
    except Exception as error:  # whatever peft makes of the folder
        text = f"{name} raises {type(error).__name__}: {one_line(str(error))}"
        return [Finding("broken", "peft", text, "save the adapter again, or give the base it was trained on")], ""
    own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    lost = [key for key in found.missing_keys if key.replace(".default", "") in own]
    left = [key for key in found.unexpected_keys if key.replace(".modules_to_save", "") not in values]
    said = {"keeps first values of": lost, "leaves out": left}
    texts = [f"{name} {verb} {shorten_names(keys)}" for verb, keys in said.items() if keys]
    return [Finding("broken", "peft", text, AGAIN) for text in texts], ""


def readings(case: FolderCase, readers: Sequence[str] = ()) -> list[Reading]:
    """Return what readers will do with a folder.

    Args:
        case: Folder to read. Without its base, names and shapes are not compared.
        readers: Names among VERSIONS. None given means the readers that are made for the model.

    Raises:
        UserError: For the name of another reader.
    """
    require_known("verify: no reader", readers, VERSIONS)
    facts, met = case.facts, list(met_rules(case))
    if not readers:  # readers for a kind of model and of folder
        readers = ("timm",) if case.timm else ("transformers",)
        readers = readers if facts.kind == "checkpoint" else ("peft", *readers)
    return [_reading(reader, case, met) for reader in readers]


def _reading(reader: str, case: FolderCase, met: Sequence[Met]) -> Reading:
    facts = case.facts
    groups = {name: TENSOR_GROUPS.get(tensor.role, "others") for name, tensor in facts.tensors.items()}
    effects, remarks, lacking = dict.fromkeys(groups, "used"), [], set[str]()
    for one in met:
        effect = one.rule.effects.get(reader)
        if effect is None:
            continue
        paths = {name: facts.tensors[name].path if name in facts.tensors else name for name in one.names}
        found = Counter(group for group, _ in {(groups.get(name, "no tensors"), path) for name, path in paths.items()})
        remarks.append(Remark(effect, one.why, one.rule.fix, dict(found)))
        for name in one.names:
            if name in groups:
                effects[name] = max(effects[name], effect, key=EFFECTS.index)
            elif facts.is_adapter and groups:
                lacking.add(name)
    units = list(facts.modules.values()) if facts.is_adapter else []
    applied = sum(all(effects[name] in ("used", "note") for name in of_modules([module])) for module in units)
    total = len(units) + len(lacking)
    if not units:
        applied, total = sum(effect in ("used", "note") for effect in effects.values()), len(effects)
    table: dict[str, Counter[str]] = {}
    for name, group in groups.items():
        table.setdefault(group, Counter())[effects[name]] += 1
    counts = {group: dict(counter) for group, counter in table.items()}
    return Reading(reader, _source(reader), applied, total, counts, tuple(remarks))


def _source(reader: str) -> str:
    """Return the version of a reader to which its rules belong."""
    try:
        installed = version(reader)
    except PackageNotFoundError:
        installed = "none"
    other = "" if installed == VERSIONS[reader] else f"; {installed} is installed"
    return f"tested with {reader} {VERSIONS[reader]}{other}"
