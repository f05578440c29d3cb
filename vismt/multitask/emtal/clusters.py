"""Experts of a pre-trained FFN: groups of hidden units with similar input weights, made contiguous by a permutation.

    FFN(x) = sum_h GELU(x . w_h + b_h) v_h                w_h row h of fc1.weight, v_h column h of fc2.weight

The function does not depend on the order of the units. EMTAL (Zhong et al., NeurIPS 2024, arXiv 2501.06884) clusters the
w_h / |w_h| of each block by k-means with equal cluster sizes and orders units by cluster: unit h then belongs to expert
h // (H / K), and the model runs without a file of labels. Here the clustered matrix is fc1 of the given model; the released
script reads its matrices from a checkpoint that another script writes. `by="activations"` is the paper's ablation: units that
are active on the same tokens.
Left out: gradient clustering (another ablation of the paper), gated FFNs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn

from vismt.base import console
from vismt.base.errors import UserError, near
from vismt.base.identity import Identity, version
from vismt.multitask.emtal.kmeans import RESTARTS, balanced_kmeans, check_divides
from vismt.storage.paths import cache_root
from vismt.storage.stored_tensors import read_stored, write_stored

SOURCES = ("weights", "activations")


def cluster_neurons(weight: Tensor, n_experts: int, seed: int = 0, restarts: int = RESTARTS) -> Tensor:
    """Assign the hidden units of an FFN to experts of exactly H / n_experts units.

    Args:
        weight: (H, D), fc1.weight or the activations of each unit on D tokens; its rows are scaled to length one, except rows
            of zeros.
        n_experts: number of experts, a divisor of H.
        seed: of the k-means, see `balanced_kmeans`.
        restarts: of the k-means, see `balanced_kmeans`.

    Returns:
        The expert of each unit, int64 (H,) on the CPU.

    Raises:
        UserError: when n_experts does not divide H, and when the weight is not a finite matrix with values.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
        kind = f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
        raise UserError(f"experts: the weight is {kind}, needed a floating point matrix (units, width) with values.")
    check_divides(len(weight), n_experts, "hidden units")
    rows = weight.detach().to("cpu", torch.float64)
    return balanced_kmeans(nn.functional.normalize(rows, dim=1, eps=1e-30), n_experts, seed, restarts)


def random_neurons(hidden: int, n_experts: int, seed: int = 0) -> Tensor:
    """Assign hidden units to experts of exactly hidden / n_experts units at random, the control for `cluster_neurons`.

    Returns the expert of each unit, int64 (hidden,). Raises UserError when n_experts does not divide hidden.
    """
    check_divides(hidden, n_experts, "hidden units")
    order = torch.randperm(hidden, generator=torch.Generator().manual_seed(seed))
    return torch.empty(hidden, dtype=torch.int64).scatter_(0, order, torch.arange(hidden) // (hidden // n_experts))


@torch.no_grad()
def explained_variance(weight: Tensor, labels: Tensor, n_experts: int) -> float:
    """Return the share of the variance within random groups of equal sizes that groups of units do not have.

        1 - W / E,   W = sum_h |x_h - c_k(h)|^2,   E = T (H - K) / (H - 1),   T = sum_h |x_h - mean|^2

    x_h = w_h / |w_h|, c_k the mean of group k. E is the mean of W over all assignments to K groups of H / K units: 0 is what
    random groups explain, 1 would be K different rows.

    Args:
        weight: (H, D).
        labels: int64 (H,), H / n_experts units of each group.
        n_experts: number of groups, K < H.
    """
    rows = nn.functional.normalize(weight.detach().to("cpu", torch.float64), dim=1, eps=1e-30)
    order = labels.cpu().argsort(stable=True)
    groups = rearrange(rows[order], "(e h) d -> e h d", e=n_experts)
    within = (groups - groups.mean(1, keepdim=True)).square().sum()
    total = (rows - rows.mean(0)).square().sum()
    expected = total * (len(rows) - n_experts) / (len(rows) - 1)
    return float(1 - within / expected)


@torch.no_grad()
def permute_experts(block_or_mlp: nn.Module, labels: Tensor, n_experts: int) -> Tensor:
    """Order the hidden units of an FFN by expert, in place, without changing its function.

    Units of an expert keep their order. To undo the permutation, permute with `order` as the labels of H experts.

    Args:
        block_or_mlp: a block of a timm ViT or its mlp.
        labels: int64 (H,), from `cluster_neurons`.
        n_experts: number of experts.

    Returns:
        The order, int64 (H,) on the CPU: new unit h is old unit order[h].

    Raises:
        UserError: for labels that do not fit and for an FFN that is not two plain linear layers.
    """
    mlp = plain_mlp(block_or_mlp)
    hidden = mlp.fc1.out_features
    check_divides(hidden, n_experts, "hidden units")
    if labels.dtype != torch.int64 or labels.shape != (hidden,):
        raise UserError(f"experts: labels are {tuple(labels.shape)} {labels.dtype}, needed ({hidden},) int64.")
    labels = labels.detach().cpu()
    size = hidden // n_experts
    if not _balanced(labels, n_experts):
        raise UserError(f"experts: labels do not give each of {n_experts} experts {size} units; use cluster_neurons.")
    order = labels.argsort(stable=True)
    index = order.to(mlp.fc1.weight.device)
    mlp.fc1.weight.copy_(mlp.fc1.weight[index])
    if mlp.fc1.bias is not None:
        mlp.fc1.bias.copy_(mlp.fc1.bias[index])
    mlp.fc2.weight.copy_(mlp.fc2.weight[:, index])
    return order


def cluster_model(
    vit: nn.Module,
    n_experts: int,
    seed: int = 0,
    *,
    by: str = "weights",
    images: Tensor | None = None,
    tokens: int = 1024,
    restarts: int = RESTARTS,
) -> list[Tensor]:
    """Cluster the hidden units of every block of a timm ViT, without changing the model.

    Labels are stored under the cache folder, one file for each block, by a hash of the clustered rows and the settings. Stored
    labels are not computed again, so an interrupted call resumes.

    Args:
        vit: the model.
        n_experts: number of experts, a divisor of the hidden width.
        seed: of the k-means and of the tokens.
        by: "weights" clusters the rows of fc1.weight; "activations" clusters the units' activations on `tokens` tokens, with
            negative activations set to zero.
        images: (b, 3, h, w), normalised as `vit` takes them, from which the tokens are drawn; needed for "activations" alone.
        tokens: number of tokens.
        restarts: of the k-means.

    Returns:
        The labels of each block, as of `cluster_neurons`.

    Raises:
        UserError: for an FFN that is not two plain linear layers, an n_experts that does not divide its hidden width, an
            unknown `by`, and images that are missing or not used.
    """
    if by not in SOURCES:
        raise UserError(f"experts: clustering by '{by}'.{near(by, SOURCES)}")
    if (images is None) != (by == "weights"):
        raise UserError(f"experts: by='{by}' {'needs images' if images is None else 'takes no images'}.")
    if not hasattr(vit, "blocks"):
        raise UserError(
            f"experts: {type(vit).__name__} has no blocks; give the timm model (of a Backbone: backbone.vit)."
        )
    mlps = [plain_mlp(block, f"block {number}") for number, block in enumerate(vit.blocks)]
    for mlp in mlps:
        check_divides(mlp.fc1.out_features, n_experts, "hidden units")
    rows = [mlp.fc1.weight for mlp in mlps] if images is None else _activations(vit, mlps, images, tokens, seed)
    files = [_file(row, n_experts, seed, restarts) for row in rows]
    stored = {number: tensors for number, file in enumerate(files) if (tensors := read_stored(file)) is not None}
    labels = {number: tensors["labels"] for number, tensors in stored.items()}
    missing = [number for number in range(len(rows)) if number not in labels]
    for number in console.track(missing, "experts", "blocks clustered") if missing else ():
        labels[number] = cluster_neurons(rows[number], n_experts, seed, restarts)
        write_stored(files[number], {"labels": labels[number]})
    return [labels[number] for number in range(len(rows))]


def plain_mlp(block_or_mlp: nn.Module, name: str = "") -> nn.Module:
    """Return the FFN of a block, or the FFN itself: fc1, an activation, fc2.

    name: name of the block in errors. Raises UserError with the reason when the units cannot be permuted.
    """
    mlp = getattr(block_or_mlp, "mlp", block_or_mlp)
    what = f"experts: {type(mlp).__name__} of {name}" if name else f"experts: {type(mlp).__name__}"
    fc1, fc2 = getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)
    gated = hasattr(mlp, "fc1_g") or hasattr(mlp, "w12")
    if isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear):
        gated = gated or fc1.out_features != fc2.in_features
    if gated:
        raise UserError(
            f"{what} is a gated FFN: a unit has two pre-activations, EMTAL's router scales one; use a ViT with a plain FFN."
        )
    if not (isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)):
        layers = (
            f"fc1 is {type(fc1).__name__}, fc2 {type(fc2).__name__}" if fc1 is not None else "it has no fc1 and fc2"
        )
        raise UserError(f"{what}: {layers}, needed two nn.Linear; use a plain ViT that is not adapted yet.")
    if not isinstance(getattr(mlp, "norm", None), nn.Identity | None):
        raise UserError(
            f"{what} normalises its hidden units, which makes experts depend on each other; use a ViT without that norm."
        )
    return mlp


def _balanced(labels: Tensor, n_experts: int) -> bool:
    """Return whether every expert has the same number of units."""
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= n_experts:
        return False
    return bool((labels.bincount(minlength=n_experts) == len(labels) // n_experts).all())


@torch.no_grad()
def _activations(vit: nn.Module, mlps: list[nn.Module], images: Tensor, tokens: int, seed: int) -> list[Tensor]:
    """Return max(0, activation) of each FFN, fp32 (H, tokens) on the CPU, at the same tokens in every block."""
    if images.ndim != 4 or not len(images) or tokens < 1:
        raise UserError(
            f"experts: images are {tuple(images.shape)}, tokens {tokens}: need (b, 3, h, w), at least one token."
        )
    captured: list[list[Tensor]] = [[] for _ in mlps]
    hooks = [
        mlp.fc2.register_forward_pre_hook(lambda _, inputs, batches=batches: batches.append(inputs[0].flatten(0, -2)))
        for mlp, batches in zip(mlps, captured)
    ]
    modes = {module: module.training for module in vit.modules()}
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[Tensor]] = [[] for _ in mlps]
    weight = mlps[0].fc1.weight
    try:
        vit.eval()
        parts = images.split(16)
        for part in parts:
            vit.forward_features(part.to(weight.device, weight.dtype))
            total = len(captured[0][0])
            count = min(total, -(-tokens * len(part) // len(images)))
            drawn = torch.randperm(total, generator=generator)[:count].to(weight.device)
            for batches, row in zip(captured, rows):
                row.append(batches.pop()[drawn].clamp_min(0).float().cpu())
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return [torch.cat(row)[:tokens].T.contiguous() for row in rows]


def _file(rows: Tensor, n_experts: int, seed: int, restarts: int) -> Path:
    """Return the cache file of the labels of `rows`."""
    identity = Identity(rows, n_experts, seed, restarts, version("vismt.multitask"))
    return cache_root() / "experts" / f"{identity}.safetensors"
