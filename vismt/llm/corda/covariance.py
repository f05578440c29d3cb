"""Second moments of the inputs of linear layers over calibration samples: the weights of CorDA's decomposition.

    C = 1/N sum_s X_s^T X_s / max|X_s|^2       X_s (n, i): the valid tokens of sample s, N samples

CorDA (Yang et al., arXiv 2406.05223) calls C the covariance, although no mean is subtracted. Convention: one divisor per sample
and layer, the largest absolute value over the valid tokens of the sample. The sum is over tokens, the mean over samples. At
batch size one this is the intention of the released code, which divides by |max X| (the signed maximum, small for a mostly
negative input) and whose own version divides by 256 for any N. A sample gives the same C in any batch and with any padding. A
sample of zeros counts in N and adds nothing. The scale of C cancels in CorDA's product B A, but not in its raw factors.

All sums are in memory at once. An input that several layers share (q, k and v, or gate and up) is summed once. A forward pass
ends at the last observed layer, so no logits are computed for inner layers after the first batch. Left out: fp16 sums, which
overflow within one or two samples.

`save_covariances` writes covariances.safetensors, then covariances.json with its digest. A tensor is written once, under the
first path that has it.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vismt.base import console
from vismt.base.errors import UserError, shown_value
from vismt.lowrank.contexts import evaluating
from vismt.lowrank.layers.stock_modules import LINEAR, kind_of
from vismt.lowrank.model.record import refuse_adapted
from vismt.lowrank.model.targets import Targets, find_targets
from vismt.storage.files import atomic_write, file_digest, read_sealed, sealed, write_tensors
from vismt.storage.paths import regular_file

ModelInput = Tensor | Mapping[str, object] | Sequence[object]
_TENSORS, COVARIANCES_FILE = "covariances.safetensors", "covariances.json"


def collect_covariance(
    model: nn.Module, batches: Iterable[ModelInput], targets: Targets = None, *, exclude: Sequence[str] | str = ()
) -> dict[str, Tensor]:
    """Collect the covariance of the input of every target layer.

    Batches are moved to the device of the model. The model is in eval mode meanwhile.

    Args:
        model: Stock model. An adapted model is refused.
        batches: Dictionaries of keyword arguments (input_ids, attention_mask (b, n), ...), tensors of images, or sequences that
            begin with one of these. Labels are ignored. Any batch size is possible. The first dimension counts samples, and
            tokens that the attention mask leaves out do not count.
        targets: Layers, as in `adapt`.
        exclude: Layers to leave out, as in `adapt`.

    Returns:
        Covariances by module path, (i, i) fp32 on the CPU. Layers that share an input share a tensor.

    Raises:
        UserError: If a layer gets no input, an input is not finite, or a mask does not fit.
    """
    refuse_adapted(model)
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise UserError(f"covariance: batches is one {type(batches).__name__}; give a list of batches.")
    moments = _Moments(observed_modules(model, targets, exclude))
    with evaluating(model), torch.no_grad():
        for batch in console.track(batches, "corda", "calibration batches"):
            moments.add(model, batch)
    if not moments.samples:
        raise UserError("covariance: got no batches to calibrate on; give one or more.")
    _report_short_samples(moments)
    means = {leader: (total / moments.samples).cpu() for leader, total in moments.sums.items()}
    return {path: means[moments.leaders[path]] for path in moments.modules}


def observed_modules(model: nn.Module, targets: Targets, exclude: Sequence[str] | str = ()) -> dict[str, nn.Module]:
    """Return the target layers by path. Raise UserError for a layer whose inputs have no covariance."""
    found, _ = find_targets(model, targets, exclude, prequantized=True)
    for path, module in found.items():
        in_groups = getattr(module, "groups", 1) > 1
        if kind_of(module) not in (*LINEAR, "conv2d") or in_groups:
            raise UserError(
                f"covariance: '{path}' is a {type(module).__name__}{' in groups' if in_groups else ''}; give linears and "
                "nn.Conv2d without groups, or exclude it."
            )
    return found


def save_covariances(covariances: Mapping[str, Tensor], folder: str | Path) -> Path:
    """Write covariances to a folder. A tensor that several paths share is written once.

    Args:
        covariances: Covariances (i, i) by path, from `collect_covariance` or computed elsewhere.
        folder: Folder to write to. It is made if it is missing.

    Returns:
        The folder.

    Raises:
        UserError: If a value is not a square matrix, or the folder cannot be written.
    """
    folder = Path(folder)
    first: dict[int, str] = {}  # path under which a tensor is written
    for path, value in covariances.items():
        if not isinstance(value, Tensor) or value.ndim != 2 or value.shape[0] != value.shape[1]:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"covariances: '{path}' is {shape}, needed a square matrix.")
        first.setdefault(id(value), path)
    digest = write_tensors(folder / _TENSORS, {path: covariances[path] for path in first.values()})
    stored = {path: first[id(value)] for path, value in covariances.items()}
    atomic_write(folder / COVARIANCES_FILE, sealed({"stored": stored, "digest": digest}))
    return folder


def load_covariances(folder: str | Path) -> dict[str, Tensor]:
    """Return the covariances of a folder by path, (i, i), memory-mapped from its file.

    Raise UserError if a file is missing, damaged or changed.
    """
    folder = Path(folder)
    what = f"covariances '{folder}'"
    about = read_sealed(folder / COVARIANCES_FILE, what, {"stored": dict[str, str], "digest": str})
    try:
        path = regular_file(folder / _TENSORS)
        whole = file_digest(path) == about["digest"]
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - safe_open is not a mapping
    except (OSError, SafetensorError) as error:
        raise UserError(f"{what}: '{_TENSORS}' is missing or damaged ({error}); collect them again.") from error
    if not whole:
        raise UserError(f"{what}: '{_TENSORS}' was changed or damaged; delete the folder to collect them again.")
    return {path: tensors[stored] for path, stored in about["stored"].items()}


class _PassComplete(Exception):
    """Signal from the last observed layer: the rest of the forward pass is not needed."""


class _Moments:
    """Running sums of X^T X of observed layers.

    leaders: Path of a layer -> first layer that receives the same tensor, found in the first batch. sums: Sums (i, i) by
    leader. tokens: Numbers of tokens by leader. calls: Number of calls of each layer in a forward pass of the first batch.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.leaders: dict[str, str] = {}
        self.sums: dict[str, Tensor] = {}
        self.tokens: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.samples = 0

    def add(self, model: nn.Module, batch: ModelInput) -> None:
        """Run a forward pass and add X^T X of each layer. Raise UserError if a layer does not get what it got before."""
        positional, named, mask, count = _arguments(model, batch)
        latest: dict[str, weakref.ref] = {}  # tensor that a leader received last
        calls: Counter[str] = Counter()

        def observe(path: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            leader = self._leader(path, inputs[0], latest)
            if path == leader:
                latest[path] = weakref.ref(inputs[0])
                rows, tokens = _normalised(path, module, inputs[0], mask, count)
                if path not in self.sums:
                    self.sums[path] = rows.new_zeros(rows.shape[1], rows.shape[1])
                self.sums[path].addmm_(rows.T, rows)
                self.tokens[path] += tokens
            calls[path] += 1
            if calls == self.calls:
                raise _PassComplete

        with ExitStack() as stack, suppress(_PassComplete):
            for path, module in self.modules.items():
                stack.callback(module.register_forward_pre_hook(partial(observe, path)).remove)
            model(*positional, **named)
        for path in self.modules:
            if calls[path] < self.calls.get(path, 1):
                raise UserError(f"covariance: '{path}' gets no input in some batches; exclude it.")
            if calls[path] != calls[self.leaders[path]]:
                raise _not_always_shared(path, self.leaders[path])
        self.calls = self.calls or calls
        self.samples += count

    def _leader(self, path: str, x: Tensor, latest: Mapping[str, weakref.ref]) -> str:
        """Return the layer whose sum counts for the input `x` of a layer.

        This is the layer itself, or a layer that received the same tensor.
        """
        if path not in self.leaders:
            module = self.modules[path]
            same = [leader for leader in latest if latest[leader]() is x]
            self.leaders[path] = next((one for one in same if _same_patches(self.modules[one], module)), path)
        leader = self.leaders[path]
        if leader != path and (leader not in latest or latest[leader]() is not x):
            raise _not_always_shared(path, leader)
        return leader


def _same_patches(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two layers make the same rows of one tensor."""
    names = ("kernel_size", "stride", "padding", "dilation")
    return all(getattr(one, name, None) == getattr(other, name, None) for name in names)


def _report_short_samples(moments: _Moments) -> None:
    ranks = {path: tokens / len(moments.sums[path]) for path, tokens in moments.tokens.items()}
    path = min(ranks, key=lambda path: ranks[path])
    if ranks[path] < 1:
        short = sum(rank < 1 for rank in ranks.values())
        console.stage(
            "corda",
            f"{short} of {len(ranks)} covariances have no full rank: '{path}' saw {moments.tokens[path]} tokens of "
            f"width {len(moments.sums[path])}. Damping fills the rest; more or longer samples raise the rank.",
        )


def _not_always_shared(path: str, leader: str) -> UserError:
    return UserError(
        f"covariance: '{path}' and '{leader}' share their input in some samples only; exclude one of them."
    )


def _arguments(model: nn.Module, batch: ModelInput) -> tuple[list[Tensor], dict[str, Any], Tensor | None, int]:
    """Return positional arguments, named arguments, the attention mask (b, n) bool or None, and the number of samples.

    Arguments are moved to the device and dtype of the model. Labels are left out.
    """
    given = batch[0] if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) else batch
    weight = next(model.parameters())
    named: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"": given}
    named.pop("labels", None)
    tensors = [value for value in named.values() if isinstance(value, Tensor) and value.ndim]
    if not tensors or not isinstance(given, Mapping | Tensor):
        raise UserError(
            f"covariance: a batch is {type(given).__name__}; give a dict of arguments or a tensor of images."
        )
    moved = {
        name: value.to(weight.device, weight.dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for name, value in named.items()
    }
    mask = moved.get("attention_mask")
    if mask is not None and mask.ndim != 2:
        raise UserError(f"covariance: the attention mask is {tuple(mask.shape)}; give (samples, tokens).")
    if hasattr(getattr(model, "config", None), "use_cache"):
        moved.setdefault("use_cache", False)
    positional = [moved.pop("")] if "" in moved else []
    return positional, moved, None if mask is None else mask.bool(), len(tensors[0])


def _normalised(path: str, module: nn.Module, x: Tensor, mask: Tensor | None, count: int) -> tuple[Tensor, int]:
    """Return the input of a linear layer or a convolution as rows (b*n, i) fp32, and the number of valid tokens.

    Masked tokens are set to zero and every sample is divided by its largest absolute value.
    """
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise UserError(
                f"covariance: '{path}' pads by '{module.padding_mode}', {shown_value(module.padding)}; only zeros, in pixels."
            )
        patches = F.unfold(x.float(), module.kernel_size, module.dilation, module.padding, module.stride)
        x = patches.transpose(1, 2)
    elif x.ndim < 2 or x[..., 0].numel() % count:
        shape = f"{tuple(x.shape)} for {count} samples"
        raise UserError(f"covariance: '{path}' gets {shape}, which does not split into samples; exclude it.")
    else:
        x = x.reshape(count, -1, x.shape[-1]).float()
    tokens = x.shape[0] * x.shape[1]
    if mask is not None and x.shape[1] == mask.shape[1]:
        x = x.masked_fill(~mask[..., None], 0)
        tokens = int(mask.sum())
    elif mask is not None and x.shape[1] > 1 and not bool(mask.all()):
        raise UserError(
            f"covariance: '{path}' gets {x.shape[1]} tokens, the attention mask has {mask.shape[1]}; exclude it."
        )
    peak = x.abs().amax((1, 2), keepdim=True)
    if not bool(peak.isfinite().all()):
        raise UserError(f"covariance: '{path}' gets infinite values or NaN; look at the data and the weights.")
    return (x / torch.where(peak > 0, peak, 1)).flatten(0, 1), tokens
