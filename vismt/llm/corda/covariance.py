"""Second moments of the inputs of linear layers over calibration samples: the weights of CorDA's decomposition.

    C = 1/N sum_s X_s^T X_s / max|X_s|^2       X_s (n, i): the valid tokens of sample s, N samples

CorDA (Yang et al., arXiv 2406.05223) calls C the covariance, although no mean is subtracted. Convention: one divisor per
sample and layer, the largest absolute value over the valid tokens of the sample; the sum is over tokens, the mean over
samples. At batch size one this is the intention of the released code, which divides by |max X| (the signed maximum, small for
a mostly negative input) and whose own version divides by 256 whatever N is. A sample gives the same C in any batch and with
any padding; a sample of zeros counts in N and adds nothing. The scale of C cancels in CorDA's product B A, but not in its raw
factors.

An input shared by several layers (q, k and v; gate and up) is summed once. A forward pass ends at the last observed layer, so
no logits are computed for inner layers. With a memory budget the batches are read in several passes, each for a group of
layers. With a folder, the sums are written every few batches and an interrupted calibration resumes from them, bit for bit.
Left out: fp16 sums, which overflow within one or two samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor, nn

from vismt.base import console
from vismt.base.errors import UserError
from vismt.base.identity import Identity, weights_digest
from vismt.llm.corda.files import CovarianceStore
from vismt.llm.corda.observed_pass import Batch, Groups, add_batch, arguments, shared_inputs
from vismt.lowrank.layers.stock_modules import LINEAR, kind_of, matrix_shape
from vismt.lowrank.model.record import refuse_adapted
from vismt.lowrank.model.targets import Targets, find_targets


def collect_covariance(
    model: nn.Module,
    batches: Iterable[Batch],
    targets: Targets = None,
    *,
    exclude: Sequence[str] | str = (),
    memory_budget: float | None = None,
    folder: str | Path | None = None,
    save_every: int = 64,
) -> dict[str, Tensor]:
    """Collect the covariance of the input of every target layer.

    Batches are moved to the device of the model, which is in eval mode meanwhile.

    Args:
        model: a stock model. Raises for an adapted one.
        batches: dicts of keyword arguments (input_ids, attention_mask (b, n), ...; labels are ignored), tensors of images, or
            sequences that begin with one of these. Any batch size; the first dimension counts samples, and tokens that the
            attention mask leaves out do not count.
        targets: as in `adapt`.
        exclude: as in `adapt`.
        memory_budget: bytes of sums kept at a time; None keeps all. A budget that takes several passes needs batches that
            can be read again: a list or a loader.
        folder: where finished sums are kept, and unfinished ones every `save_every` batches.
        save_every: number of batches.

    Returns:
        {module path: covariance (i, i) fp32 on the CPU}; layers that share an input share a tensor.

    Raises:
        UserError: a layer gets no input or one that is not finite, a mask does not fit, or the folder holds another
            calibration.
    """
    refuse_adapted(model)
    if save_every < 1:
        raise UserError(f"covariance: save_every is {save_every}; it must be at least 1.")
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise UserError(f"covariance: batches is one {type(batches).__name__}; give a list of batches.")
    target_modules = observed_modules(model, targets, exclude)
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise UserError("covariance: got no batches to calibrate on; give one or more.")
    groups = shared_inputs(model, target_modules, first)
    widths = {path: matrix_shape(module)[1] for path, module in target_modules.items()}
    passes = _passes({leader: widths[leader] for leader in groups.paths}, memory_budget)
    readable_again = iterator is not batches
    if len(passes) > 1 and not readable_again:
        raise UserError(
            "covariance: this memory_budget takes several passes, and the batches can be read once; give a list."
        )
    length = len(batches) if hasattr(batches, "__len__") else 0
    data = model_name = ""
    if folder is not None:
        data = str(Identity(length, *(Identity(batch) for batch in (batches if readable_again else [first]))))
        model_name = weights_digest(model)
    store = CovarianceStore(folder, model_name, data, groups.paths, passes, widths)
    text = "calibration batches" if len(passes) == 1 else f"calibration batches in {len(passes)} passes"
    passes_done = len(store.state.finished)
    done = passes_done * length + store.unfinished.batches
    with console.bar("corda", text, len(passes) * length, done) as bar:
        for number in range(passes_done, len(passes)):
            source = iter(batches) if readable_again else chain([first], iterator)
            _run_pass(model, groups, passes[number], source, store, save_every, bar.advance)
    _report_short_samples(store.state.tokens, widths)
    return store.covariances()


def observed_modules(model: nn.Module, targets: Targets, exclude: Sequence[str] | str = ()) -> dict[str, nn.Module]:
    """Return the target layers by path; UserError for one whose inputs have no covariance."""
    found, _ = find_targets(model, targets, exclude, prequantized=True)
    for path, module in found.items():
        in_groups = getattr(module, "groups", 1) > 1
        if kind_of(module) not in (*LINEAR, "conv2d") or in_groups:
            raise UserError(
                f"covariance: '{path}' is a {type(module).__name__}{' in groups' if in_groups else ''}; give linears and "
                "nn.Conv2d without groups, or exclude it."
            )
    return found


def _run_pass(
    model: nn.Module,
    groups: Groups,
    leaders: Sequence[str],
    source: Iterator[Batch],
    store: CovarianceStore,
    save_every: int,
    advance: Callable[[], None],
) -> None:
    device = next(model.parameters()).device
    sums = store.unfinished
    for path in leaders:
        width = matrix_shape(model.get_submodule(path))[1]
        sums.sums[path] = sums.sums[path].to(device) if path in sums.sums else torch.zeros(width, width, device=device)
    for batch in islice(source, sums.batches, None):
        inputs, mask, count = arguments(model, batch)
        add_batch(model, groups, leaders, sums, inputs, mask, count)
        sums.samples += count
        sums.batches += 1
        if sums.batches % save_every == 0:
            store.save()
        advance()
    store.finish()


def _report_short_samples(tokens: Mapping[str, int], widths: Mapping[str, int]) -> None:
    short = {path: (tokens[path], widths[path]) for path in tokens if tokens[path] < widths[path]}
    if short:
        path, (count, width) = min(short.items(), key=lambda item: item[1][0] / item[1][1])
        console.stage(
            "corda",
            f"{len(short)} of {len(tokens)} covariances have no full rank: '{path}' saw {count} tokens of "
            f"width {width}. Damping fills the rest; more or longer samples raise the rank.",
        )


def _passes(widths: Mapping[str, int], budget: float | None) -> list[list[str]]:
    """Split the leaders, in forward order, into passes whose fp32 sums fit the budget in bytes."""
    if budget is None:
        return [list(widths)]
    passes: list[list[str]] = []
    pass_bytes = 0
    for path, width in widths.items():
        size = 4 * width * width
        if size > budget:
            raise UserError(
                f"covariance: '{path}' alone takes {size:,} bytes, memory_budget is {budget:,.0f}; raise it, "
                "or exclude the module."
            )
        if not passes or pass_bytes + size > budget:
            passes.append([])
            pass_bytes = 0
        passes[-1].append(path)
        pass_bytes += size
    return passes
