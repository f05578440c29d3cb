"""Find the modules that a target pattern names. A pattern without a match is an error with near names.

targets     None                    'all-linear', and for a model without linears 'all-conv'
            'all-linear'            every nn.Linear and transformers Conv1D except the task head
            'all-conv'              every nn.Conv2d with groups = 1 except the task head
            'all-linear+conv'       both
            a string                a regular expression that must match the full module path
            a list of strings       full paths or suffixes after a dot; an entry that matches linears leaves the
                                    convolutions of the same suffix alone ('proj' does not take patch_embed.proj)

Other convolutions (in groups, of one or three dimensions) and embeddings are adapted if they are named. Embeddings, and experts
in one parameter of three dimensions (experts.gate_up_proj), need an entry or expression of their own. A depthwise weight (o,
kh*kw) has at most rank kh*kw, so factors save little there. The weights that nn.MultiheadAttention reads (in_proj_weight,
out_proj) count as linears. Layers that do not form W + DeltaW adapt neither these weights nor experts.

The head is what get_classifier (timm) or get_output_embeddings (transformers) returns, or a top-level module named head, fc,
classifier, score or lm_head.
"""

from __future__ import annotations

import math
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from vismt.base.errors import UserError, near, need_names, shown_value
from vismt.lowrank.layers.parameter_modules import (
    ATTENTION,
    ParameterModule,
    is_attention,
    module_at,
    readable_parameters,
)
from vismt.lowrank.layers.stock_modules import LINEAR, STOCK_KINDS, kind_of, weight_format

T = TypeVar("T")
HEAD_NAMES = {"head", "fc", "classifier", "score", "lm_head"}
SETS = ("all-linear", "all-conv", "all-linear+conv")
READ_DIRECTLY = (
    "'{path}' adds q_bias itself and reads the weight without calling the linear; set its qkv_bias_separate to True"
)
READ_ONLY_PLAIN = "only plain factors can be added to it, without dropout or gates for samples"
READ_BY_SCAN = ("conv1d", "x_proj", "dt_proj", "out_proj")  # modules of a state-space mixer, which has an A_log

_PATH = re.compile(r"\w+(\.\w+)*")  # a pattern that names one path and needs no matching
_PATHS = re.compile(r"(?:\w|\\[.-]|\|)+")  # an expression that names paths, as exports write it
LIMIT_S = 5.0  # seconds of thread time for all matches of one expression
MOST_PARTS = 20  # log2 of the characters of an expression times its repeats (the library writes repeated parts out)

Targets = str | Sequence[str] | None


def heads_of(model: nn.Module, getter: str) -> list[nn.Module]:
    """Return the modules that `get_classifier` or `get_output_embeddings` returns: one, several or none."""
    function = getattr(model, getter, None)
    try:
        found = function() if callable(function) else None
    except AttributeError:  # EfficientViT of MSRA looks for it in a head that it does not have
        return []
    return [head for head in (found if isinstance(found, tuple) else [found]) if isinstance(head, nn.Module)]


def head_paths(model: nn.Module) -> set[str]:
    """Return the paths of the task head, see the header."""
    heads = [head for getter in ("get_classifier", "get_output_embeddings") for head in heads_of(model, getter)]
    inside = {id(module) for head in heads for module in head.modules()}
    return {path for path, module in model.named_modules() if id(module) in inside or path.split(".")[0] in HEAD_NAMES}


def read_directly(owner: nn.Module, name: str) -> bool:
    """Return whether a module uses its child's weight without calling the child.

    timm's BEiT, EVA and Swin v2 with a q_bias do so.
    """
    adds_bias = getattr(owner, "q_bias", None) is not None and not getattr(owner, "qkv_bias_separate", False)
    return name == "qkv" and adds_bias


def _refusal(
    path: str, module: nn.Module, owner: nn.Module, owners: Mapping[int, list[str]], prequantized: bool, readable: bool
) -> str | None:
    weight = getattr(module, "weight", None)
    format_name = weight_format(module)
    reason = _bypass(path, module, owner, readable)
    if reason is not None:
        return reason
    if format_name is not None and not prequantized:
        return (
            f"'{path}' is quantised ({format_name}), and this method reads or trains its weight; load a floating dtype"
        )
    if hasattr(owner, "A_log") and path.rpartition(".")[2] in READ_BY_SCAN:
        return f"'{path}' is read by the fused scan of a {type(owner).__name__} on a GPU, without calling it"
    if not isinstance(weight, nn.Parameter) or hasattr(module, "parametrizations"):
        return f"'{path}' has no plain weight parameter (parametrised or lazy)"
    if not weight.is_floating_point() and format_name is None:
        return f"'{path}' is quantised (weight dtype {weight.dtype}); load the model in a floating dtype"
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.sparse):
        return f"'{path}' is an embedding with max_norm or sparse gradients, which have no low-rank form"
    sharers = [name for name in owners.get(id(weight), []) if name not in (path, f"{path}.weight")]
    if sharers:
        return f"'{path}' shares its weight with '{sharers[0]}'; merging would change both: untie them first"
    return None


def _bypass(path: str, module: nn.Module, owner: nn.Module, readable: bool) -> str | None:
    """Return why an update in the place of this module would not be computed, or None.

    readable: Whether the update works without a call of the module.
    """
    in_attention = isinstance(owner, nn.MultiheadAttention)
    if in_attention and not (readable and is_attention(owner)):
        return (
            f"'{path}' lies inside nn.MultiheadAttention, which reads its weight without calling it; {READ_ONLY_PLAIN}"
        )
    if in_attention and weight_format(module):
        return f"'{path}' is quantised ({weight_format(module)}) and read without a call; load a floating dtype"
    if isinstance(module, ParameterModule):
        return (
            None if readable else f"'{path}' is a parameter that {type(owner).__name__} reads itself; {READ_ONLY_PLAIN}"
        )
    stock = STOCK_KINDS.get(str(kind_of(module)))
    extra = {name for name, _ in module.named_parameters(recurse=False)} - {"weight", "bias"}
    other = weight_format(module) is None and stock is not None and not in_attention and not _computes_as(module, stock)
    if extra or other:
        return f"'{path}' is a {type(module).__name__} with another forward, which an update would bypass"
    parent, _, name = path.rpartition(".")
    if read_directly(owner, name):
        return f"'{path}' is never called: " + READ_DIRECTLY.format(path=parent)
    return None


@torch.no_grad()
def _computes_as(module: nn.Module, stock: type[nn.Module]) -> bool:
    """Return whether a module computes what its stock class does.

    The check compares forwards, or for linears (Falcon's) outputs.
    """
    if type(module).forward is stock.forward:
        return True
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, nn.Parameter) or weight.is_meta:
        return False
    x = torch.linspace(-1, 1, 2 * module.in_features, dtype=weight.dtype, device=weight.device).view(2, -1)
    training, same = module.training, True
    try:
        for mode in (True, False):
            module.training = mode
            expected = nn.Linear.forward(module, x)
            same = same and torch.allclose(type(module).forward(module, x), expected, rtol=1e-2, atol=1e-3)
    except Exception:  # a forward of another signature or shape
        return False
    finally:
        module.training = training
    return same


def target_refusals(
    model: nn.Module, paths: Iterable[str], prequantized: bool = False, *, readable: bool = False
) -> dict[str, str]:
    """Return the reasons why some of these modules cannot carry an update, by path.

    prequantized: Whether weights of bitsandbytes and torchao can be adapted. readable: Whether weights that are read without a
    call can be adapted.
    """
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():  # a module with two names comes once, so two owners are two modules
        for name, parameter in module.named_parameters(path, recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    reasons = {}
    for path in paths:
        owner = model.get_submodule(path.rpartition(".")[0])
        reasons[path] = _refusal(path, module_at(model, path), owner, owners, prequantized, readable)
    return {path: reason for path, reason in reasons.items() if reason}


def find_targets(
    model: nn.Module,
    targets: Targets,
    exclude: str | Sequence[str] = (),
    prequantized: bool = False,
    *,
    readable: bool = False,
) -> tuple[dict[str, nn.Module], list[str]]:
    """Return the modules to adapt by path, in model order, and remarks on modules that were left out.

    exclude: Full-path regular expressions or suffixes. prequantized, readable: See `target_refusals`.

    Raise UserError for a pattern that matches nothing, and for a named module that cannot carry an update.
    """
    named, exclude = candidates(model), need_names("adapt.exclude:", exclude)
    sets = _members(model, named)
    default = "all-linear" if sets["all-linear"] or not sets["all-conv"] else "all-conv"
    pattern = default if targets is None else targets
    everything = isinstance(pattern, str) and pattern in SETS
    if everything:
        wanted, chosen = set(named), set(sets[str(pattern)])
    elif isinstance(pattern, str):
        wanted, chosen = _select_regex(pattern, named)
    else:
        wanted, chosen = _select_suffixes(need_names("adapt.targets:", pattern), named)
    excluded = {path for paths in match_patterns("adapt.exclude", exclude, named).values() for path in paths}
    chosen -= excluded
    reasons = target_refusals(model, sorted(chosen), prequantized, readable=readable)
    if reasons and not everything:
        raise UserError(f"adapt.targets: {next(iter(reasons.values()))}.")
    chosen -= set(reasons)
    left = wanted - chosen - excluded
    missed = [path for path in named if path in left]
    remarks = [*reasons.values(), *_experts({path: named[path] for path in missed}, readable)]
    in_groups = [path for path in missed if everything and pattern != "all-linear" and _has_groups(named[path])]
    if in_groups:
        more = f" and {len(in_groups) - 1} more" if len(in_groups) > 1 else ""
        remarks.append(f"'{in_groups[0]}'{more}: convolutions in groups; to adapt them, name them in targets")
    if not chosen:
        after = " after exclude" if exclude else ""
        why = f" Left out: {'; '.join(_grouped(remarks))}." if remarks else _nearest(pattern, named)
        others = [name for name, members in sets.items() if members]
        if everything and others and not remarks and not excluded:
            kind = "linear layers" if pattern == "all-linear" else "nn.Conv2d without groups"
            raise UserError(
                f"adapt.targets: {type(model).__name__} has no {kind} outside of its head; give adapt.targets={others[0]}."
            )
        raise UserError(f"adapt.targets: nothing to adapt for {shown_value(pattern)}{after}.{why}")
    if everything:
        _warn_of_rest(f"adapt.targets: '{pattern}' of {type(model).__name__}", named, chosen, reasons)
    return {path: module for path, module in named.items() if path in chosen}, remarks


def _warn_of_rest(
    what: str, candidates: Mapping[str, nn.Module], chosen: Iterable[str], reasons: Mapping[str, str]
) -> None:
    """Warn if the modules that cannot be adapted hold most of the weights of a set, as the convolutions of an NFNet do."""
    adapted, left = (
        sum(parameter.numel() for path in paths for parameter in candidates[path].parameters())
        for paths in (chosen, reasons)
    )
    if left > adapted:
        why = "; ".join(_grouped(list(reasons.values())))
        share = 100 * adapted / (adapted + left)
        warnings.warn(f"{what} adapts only {share:.0f} % of the weights. Left out: {why}.", stacklevel=5)


def _grouped(remarks: Sequence[str]) -> list[str]:
    """Return the first remark of each reason, with the number of further ones."""
    groups: dict[str, list[str]] = {}
    for remark in remarks:
        groups.setdefault(re.sub(r"'[^']*'", "", remark), []).append(remark)
    return [first if not more else f"{first} ({len(more)} more)" for first, *more in groups.values()]


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Return what a pattern can name, by path: modules, and parameters that modules read themselves."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        if path and kind_of(module):
            found[path] = module
        else:
            prefix = f"{path}." if path else ""
            found |= {f"{prefix}{name}": module_at(model, f"{prefix}{name}") for name in readable_parameters(module)}
    return found


def _members(model: nn.Module, candidates: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Return the paths of each of SETS, in model order."""
    heads = head_paths(model)
    rest = {path: module for path, module in candidates.items() if path not in heads}
    linears = [path for path, module in rest.items() if _is_linear(path, module)]
    convolutions = [path for path, module in rest.items() if kind_of(module) == "conv2d" and not _has_groups(module)]
    return dict(zip(SETS, (linears, convolutions, linears + convolutions)))


def _has_groups(module: nn.Module) -> bool:
    """Return whether a candidate is a convolution in groups. Depthwise convolutions are among them."""
    return getattr(module, "groups", 1) > 1


def _is_linear(path: str, module: nn.Module) -> bool:
    """Return whether 'all-linear' takes a candidate."""
    return kind_of(module) in LINEAR or (kind_of(module) == "parameter" and path.rpartition(".")[2] in ATTENTION)


def _is_stack(path: str, module: nn.Module) -> bool:
    """Return whether a candidate is a parameter with a matrix for each expert."""
    return kind_of(module) == "parameter" and not _is_linear(path, module)


def _experts(candidates: Mapping[str, nn.Module], readable: bool) -> list[str]:
    """Return a remark on weights of experts in three dimensions. They are not adapted, and the remark says how to name them."""
    paths = [path for path, module in candidates.items() if _is_stack(path, module)]
    if not paths:
        return []
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    suffixes = list(dict.fromkeys(".".join(path.split(".")[-2:]) for path in paths))
    how = f"; to adapt them, name them in targets: {suffixes}" if readable else ""
    return [f"'{paths[0]}'{more}: experts in one parameter of three dimensions, which stays frozen{how}"]


class Expression:
    """A regular expression of module paths, in the syntax of `re`.

    A file may bring the expression, so its matches have a time limit. A UserError, which starts with `name`, is raised for an
    expression that is malformed, too large, or takes too long.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text, self._left = name, text, LIMIT_S
        # Paths are looked up, because an exported adapter may name thousands of them.
        self._paths = frozenset(text.replace("\\", "").split("|")) if _PATHS.fullmatch(text) else None
        self._compiled = _compiled(name, text) if self._paths is None else None

    def match(self, path: str) -> Any:
        """Return the match of the whole path, or true for a path that is looked up. Return None or false without a match."""
        if self._compiled is None:
            return self._paths is not None and path in self._paths
        began = time.thread_time()
        try:
            found = self._compiled.fullmatch(path, timeout=self._left)
            self._left = max(0.0, self._left - (time.thread_time() - began))  # a negative limit would mean no limit
        except TimeoutError:
            self._left = 0.0
        if not self._left:
            raise UserError(
                f"{self.name}: matching {shown_value(self.text)} takes more than {LIMIT_S:g} s; give a simpler expression, or "
                "paths."
            )
        return found


def _compiled(name: str, text: str) -> Any:
    import regex  # has a time limit (imported here, because most targets are paths)

    # The library writes x+ out as xx*, and x{2,} as xxx*.
    repeats = re.findall(r"\{(\d*)(,?)(\d*)\}", re.sub(r"\\.", "", text).replace("+", "{1,}"))
    try:
        factors = [max(1, int(least or 0) + bool(comma and not most), int(most or 0)) for least, comma, most in repeats]
        parts = sum(map(math.log2, [len(text) or 1, *factors]))
        if parts > MOST_PARTS:
            raise ValueError(
                f"with its repeats written out it has about 2^{parts:.0f} parts, at most 2^{MOST_PARTS} are matched"
            )
        re.compile(text)
        return regex.compile(text)
    except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{name}: {shown_value(text)} is not a regular expression that can be matched: {error}."
        ) from error


def _select_regex(pattern: str, candidates: Mapping[str, nn.Module]) -> tuple[set[str], set[str]]:
    """Return the paths that an expression matches, and which of them to adapt."""
    wanted = Expression("adapt.targets", pattern)
    paths = {path for path in candidates if wanted.match(path)}
    if not paths:
        suffixed = any(path.endswith(f".{pattern}") for path in candidates)
        hint = f" A string must match the full path; as a suffix write ['{pattern}']." if suffixed else ""
        raise UserError(f"adapt.targets: no module matches '{pattern}'.{hint or _nearest(pattern, candidates)}")
    apart = {path for path in paths if kind_of(candidates[path]) == "embedding" or _is_stack(path, candidates[path])}
    return paths, paths - apart or paths


def _select_suffixes(entries: Sequence[str], candidates: Mapping[str, nn.Module]) -> tuple[set[str], set[str]]:
    """Return the paths that have one of `entries` as a suffix, and which of them to adapt."""
    ending = _by_suffix(candidates)
    wanted, chosen = set[str](), set[str]()
    for entry in entries:
        paths = ending.get(entry, [])
        if not paths:
            raise UserError(f"adapt.targets: no module matches '{entry}'.{_nearest(entry, candidates)}")
        linears = [path for path in paths if path == entry or _is_linear(path, candidates[path])]
        wanted.update(paths)
        chosen.update(linears or paths)
    return wanted, chosen


def _by_suffix(paths: Iterable[str]) -> dict[str, list[str]]:
    """Return the paths that end in each suffix. Patterns may name every module of a deep model, and each is looked up."""
    found: dict[str, list[str]] = {}
    for path in paths:
        for suffix in suffixes(path):
            found.setdefault(suffix, []).append(path)
    return found


def suffixes(path: str) -> list[str]:
    """Return a path and every part of it that follows a dot, the longest first."""
    names = path.split(".")
    return [".".join(names[start:]) for start in range(len(names))]


def containers(path: str) -> list[str]:
    """Return a path and the paths of the modules around it, the longest first."""
    names = path.split(".")
    return [".".join(names[:end]) for end in range(len(names), 0, -1)]


def _nearest(pattern: object, candidates: Iterable[str]) -> str:
    """Return " Near: 'attn.qkv' (12 modules)." from the suffixes that follow the last number of each path."""
    suffixes = Counter(re.split(r"(?:^|\.)\d+\.", path)[-1] for path in candidates)
    text = near(str(pattern), suffixes, limit=2)
    for suffix, count in suffixes.items():
        text = text.replace(f"'{suffix}'", f"'{suffix}' ({count} module{'s' if count > 1 else ''})")
    return text


def match_patterns(name: str, patterns: Iterable[str], paths: Iterable[str]) -> dict[str, list[str]]:
    """Return which of `paths` each pattern matches, as a path, as a suffix of it after a dot, or as a regular expression.

    Raise UserError, which starts with `name`, for a pattern that matches none.
    """
    every, patterns = list(paths), list(patterns)
    ending = _by_suffix(every) if patterns else {}
    found = {}
    for pattern in patterns:
        found[pattern] = ending.get(pattern, [])
        if not found[pattern] and not _PATH.fullmatch(pattern):
            expression = Expression(name, pattern)
            found[pattern] = [path for path in every if expression.match(path)]
        if not found[pattern]:
            raise UserError(f"{name}: no module matches '{pattern}'.{_nearest(pattern, every)}")
    return found


def pattern_values(name: str, table: Mapping[str, T], paths: Iterable[str]) -> dict[str, T]:
    """Return by path the value of the first pattern that matches the path. Raise UserError as `match_patterns` does."""
    values: dict[str, T] = {}
    for pattern, matched in match_patterns(name, table, paths).items():
        for path in matched:
            values.setdefault(path, table[pattern])
    return values
