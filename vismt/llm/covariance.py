"""Second moments of the inputs of linear layers over calibration samples: what CorDA weighs a weight with.

    C = 1/N sum_s X_s^T X_s / max|X_s|^2       X_s (n, i): the valid tokens of sample s, N samples

CorDA (Yang et al., arXiv 2406.05223) calls it covariance; no mean is subtracted. Convention: one divisor for each sample
and layer, the largest absolute value over its valid tokens; the sum is over tokens, the mean over samples. At batch size
one that is what the released code means to do: it divides by |max X| (the signed maximum, which for a mostly negative
input is small), and its own version by 256 whatever N. A sample gives the same C in any batch and with any padding; a
sample that is zero counts and adds nothing. The scale of C cancels in CorDA's product B A, not in its raw factors.

Inputs shared by several layers (q, k and v; gate and up) are summed once. A pass ends at the last layer it serves, so
no logits are computed for layers below. With a memory budget there are several passes over the batches, a group of
layers each. With a folder, sums are written every few batches and an interrupted calibration goes on from there, bit
for bit. Left out: fp16 sums, which overflow their precision within a sample or two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor, nn

from vismt import console
from vismt.errors import UserError
from vismt.llm.calibration import Batch, Groups, add_batch, arguments, shared_inputs
from vismt.llm.covariance_files import Calibration, batch_digest
from vismt.lowrank.inject import refuse_adapted
from vismt.lowrank.store import fingerprint
from vismt.lowrank.svd import double
from vismt.lowrank.targets import Targets, find_targets, matrix_shape
from vismt.lowrank.threads import each


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
    """Covariance (i, i) of the input of every target, fp32 on the CPU, by module path; layers with one input share a tensor.

    batches: dicts of keyword arguments (input_ids, attention_mask (b, n), ...; labels are left out), tensors of images,
    or sequences that begin with one of these. Any batch size; tokens that the mask leaves out do not count, and samples
    are rows of the first dimension. Everything is moved to the model's device, and the model is in eval mode meanwhile.
    targets, exclude: as in `adapt`. memory_budget: bytes of sums held at a time (None: all); batches must then be a list
    or a loader that can be read again. folder: keeps finished sums, and unfinished ones every `save_every` batches.
    Raises UserError for a layer that gets no input or a broken one, a mask that does not fit, and a folder with other sums.
    """
    refuse_adapted(model)
    if save_every < 1:
        raise UserError(f"covariance: save_every is {save_every}; it must be at least 1.")
    if isinstance(batches, Tensor | Mapping | str) or not isinstance(batches, Iterable):
        raise UserError(f"covariance: batches is one {type(batches).__name__}; give a list of batches.")
    found, _ = find_targets(model, targets, [exclude] if isinstance(exclude, str) else exclude)
    iterator = iter(batches)
    first = next(iterator, None)
    if first is None:
        raise UserError("covariance: there are no batches to calibrate on.")
    groups = shared_inputs(model, found, first)
    widths = {path: matrix_shape(module)[1] for path, module in found.items()}
    passes = _passes({leader: widths[leader] for leader in groups.paths}, memory_budget)
    again = None if iterator is batches else batches
    if len(passes) > 1 and again is None:
        raise UserError(
            "covariance: this memory_budget takes several passes, and the batches can be read once; give a list."
        )
    length = len(batches) if hasattr(batches, "__len__") else 0
    data = f"{batch_digest(first)} of {length}"
    store = Calibration(folder, fingerprint(model, found), data, groups.paths, passes, widths)
    text = "calibration batches" if len(passes) == 1 else f"calibration batches in {len(passes)} passes"
    with console.bar("corda", text, len(passes) * length, store.passes_done * length + store.begun.batches) as bar:
        for number in range(store.passes_done, len(passes)):
            source = iter(again) if number or again is not None else chain([first], iterator)
            _one_pass(model, groups, passes[number], source, store, save_every, bar.advance)
    _tell_of_tokens(store.tokens, widths)
    return store.covariances()


def _one_pass(
    model: nn.Module,
    groups: Groups,
    leaders: Sequence[str],
    source: Iterator[Batch],
    store: Calibration,
    save_every: int,
    advance: Callable[[], None],
) -> None:
    """Sums of the leaders over all batches, from where the store left off."""
    device, sums = next(model.parameters()).device, store.begun
    for path in leaders:
        width = matrix_shape(model.get_submodule(path))[1]
        sums.sums[path] = sums.sums[path].to(device) if path in sums.sums else torch.zeros(width, width, device=device)
    for batch in islice(source, sums.batches, None):
        inputs, mask, count = arguments(model, batch)
        add_batch(model, groups, leaders, sums, inputs, mask, count)
        sums.samples, sums.batches = sums.samples + count, sums.batches + 1
        if sums.batches % save_every == 0:
            store.save()
        advance()
    store.finish()


def covariance_ranks(covariances: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """(rank, width) of each covariance: eigenvalues above width * 1.2e-7 (fp32 rounding) of the largest count."""
    unique = {id(value): value for value in covariances.values()}

    def rank(value: Tensor) -> int:
        values = torch.linalg.eigvalsh(double(value))
        return int((values > len(value) * torch.finfo(torch.float32).eps * values[-1].clamp_min(0)).sum())

    ranks = dict(zip(unique, each(rank, list(unique.values()))))
    return {path: (ranks[id(value)], len(value)) for path, value in covariances.items()}


def _tell_of_tokens(tokens: Mapping[str, int], widths: Mapping[str, int]) -> None:
    """One line where a covariance cannot have full rank, whatever its tokens say."""
    short = {path: (tokens[path], widths[path]) for path in tokens if tokens[path] < widths[path]}
    if short:
        path, (count, width) = min(short.items(), key=lambda item: item[1][0] / item[1][1])
        console.stage(
            "corda",
            f"{len(short)} of {len(tokens)} covariances have no full rank: '{path}' saw {count} tokens of "
            f"width {width}. Damping fills the rest; more or longer samples tell more.",
        )


def _passes(widths: Mapping[str, int], budget: float | None) -> list[list[str]]:
    """Leaders in forward order, cut into passes whose fp32 sums fit the budget."""
    if budget is None:
        return [list(widths)]
    passes, held = [], 0
    for path, width in widths.items():
        size = 4 * width * width
        if size > budget:
            told = f"'{path}' alone takes {size:,} bytes, memory_budget is {budget:,.0f}"
            raise UserError(f"covariance: {told}; raise it, or exclude the module.")
        if not passes or held + size > budget:
            passes.append([])
            held = 0
        passes[-1].append(path)
        held += size
    return passes
