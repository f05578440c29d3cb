"""Experts of a pre-trained FFN: hidden units with similar input weights, put side by side without changing the function.

    FFN(x) = sum_h GELU(x . w_h + b_h) v_h                w_h row h of fc1.weight, v_h column h of fc2.weight

The sum does not mind the order of its terms. EMTAL (Zhong et al., NeurIPS 2024, arXiv 2501.06884) clusters the w_h / |w_h|
of each block by k-means with equal sizes, and orders units by cluster: unit h then belongs to expert h // (H / K), and no
label file is needed to run the model. Ours is that on the model's own fc1; the released script reads its matrices from a
checkpoint of another script. `by="activations"` is the paper's ablation: units that fire on the same tokens.
Left out: gradient clustering (another ablation of the paper), gated FFNs.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from vismt import console
from vismt.errors import UserError, near
from vismt.files import atomic_write, read_tensors
from vismt.multitask.kmeans import RESTARTS, balanced_kmeans, check_divides
from vismt.paths import cache_root

SOURCES = ("weights", "activations")
# A part of the cache key: raise it when the same input gives other labels.
VERSION = 1


def cluster_neurons(weight: Tensor, n_experts: int, seed: int = 0, restarts: int = RESTARTS) -> Tensor:
    """Expert of each hidden unit, int64 (H,) on the CPU; every expert has exactly H / n_experts units.

    weight: (H, D), fc1.weight or the activations of each unit on D tokens; its rows are normalised to length one (rows of
    zeros stay). seed, restarts: of the k-means, see `balanced_kmeans`.
    Raises UserError when n_experts does not divide H, or the weight is no finite matrix with values.
    """
    if weight.ndim != 2 or not weight.is_floating_point() or weight.is_meta:
        seen = f"{tuple(weight.shape)} {weight.dtype} on {weight.device}"
        raise UserError(f"experts: the weight is {seen}, needed a floating point matrix (units, width) with values.")
    check_divides(len(weight), n_experts, "hidden units")
    rows = weight.detach().to("cpu", torch.float64)
    return balanced_kmeans(nn.functional.normalize(rows, dim=1, eps=1e-30), n_experts, seed, restarts)


@torch.no_grad()
def permute_experts(block_or_mlp: nn.Module, labels: Tensor, n_experts: int) -> Tensor:
    """Order the hidden units of an FFN by expert, in place; its function stays the same.

    block_or_mlp: a block of a timm ViT or its mlp. labels: int64 (H,), of `cluster_neurons`. Units of an expert keep
    their order. Returns the order, int64 (H,) on the CPU: new unit h is old unit order[h]; permuting with
    order.argsort() as the labels of H experts takes it back.
    Raises UserError for labels that do not fit and for an FFN that is not two plain linear layers.
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
    there = order.to(mlp.fc1.weight.device)
    mlp.fc1.weight.copy_(mlp.fc1.weight[there])
    if mlp.fc1.bias is not None:
        mlp.fc1.bias.copy_(mlp.fc1.bias[there])
    mlp.fc2.weight.copy_(mlp.fc2.weight[:, there])
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
    """Labels of every block of a timm ViT, each as of `cluster_neurons`; the model stays as it is.

    by: "weights" clusters fc1.weight. "activations" clusters what the units give on `tokens` tokens, drawn by `seed` from
    `images` (b, 3, h, w), normalised as `vit` takes them; negative activations count as zero.
    Labels are kept under the cache folder, one file for each block, by a fingerprint of what is clustered and of the
    settings; what is there is not computed again, so an interrupted call goes on where it was.
    Raises UserError for an FFN that is not two plain linear layers, an n_experts that does not divide its hidden width,
    an unknown `by`, and images that are missing or not wanted.
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
    found = [_read(file, len(row), n_experts) for file, row in zip(files, rows)]
    lacking = [number for number, labels in enumerate(found) if labels is None]
    for number in console.track(lacking, "experts", "blocks clustered") if lacking else ():
        found[number] = cluster_neurons(rows[number], n_experts, seed, restarts)
        atomic_write(files[number], safetensors.torch.save({"labels": found[number]}))
    return found


def plain_mlp(block_or_mlp: nn.Module, name: str = "") -> nn.Module:
    """The FFN of a block, or the FFN itself: fc1, an activation, fc2. UserError with the reason when units cannot be moved."""
    mlp = getattr(block_or_mlp, "mlp", block_or_mlp)
    what = f"experts: {type(mlp).__name__}" + (f" of {name}" if name else "")
    fc1, fc2 = getattr(mlp, "fc1", None), getattr(mlp, "fc2", None)
    gated = hasattr(mlp, "fc1_g") or hasattr(mlp, "w12")
    if isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear):
        gated = gated or fc1.out_features != fc2.in_features
    if gated:
        raise UserError(
            f"{what} is a gated FFN: a unit has two pre-activations, EMTAL's router scales one; use a ViT with a plain FFN."
        )
    if not (isinstance(fc1, nn.Linear) and isinstance(fc2, nn.Linear)):
        seen = f"fc1 is {type(fc1).__name__}, fc2 {type(fc2).__name__}" if fc1 is not None else "it has no fc1 and fc2"
        raise UserError(f"{what}: {seen}, needed two nn.Linear; take a plain ViT before anything is adapted.")
    if not isinstance(getattr(mlp, "norm", None), nn.Identity | None):
        raise UserError(
            f"{what} normalises its hidden units, which ties experts to each other; use a ViT without that norm."
        )
    return mlp


def _balanced(labels: Tensor, n_experts: int) -> bool:
    if not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= n_experts:
        return False
    return bool((labels.bincount(minlength=n_experts) == len(labels) // n_experts).all())


@torch.no_grad()
def _activations(vit: nn.Module, mlps: list[nn.Module], images: Tensor, tokens: int, seed: int) -> list[Tensor]:
    """For each FFN max(0, activation), fp32 (H, tokens) on the CPU; the same tokens in every block."""
    if images.ndim != 4 or not len(images) or tokens < 1:
        raise UserError(
            f"experts: images are {tuple(images.shape)}, tokens {tokens}: need (b, 3, h, w), at least one token."
        )
    seen: list[list[Tensor]] = [[] for _ in mlps]
    hooks = [
        mlp.fc2.register_forward_pre_hook(lambda _, inputs, kept=kept: kept.append(inputs[0].flatten(0, -2)))
        for mlp, kept in zip(mlps, seen)
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
            total = len(seen[0][0])
            wanted = min(total, -(-tokens * len(part) // len(images)))
            picked = torch.randperm(total, generator=generator)[:wanted].to(weight.device)
            for kept, row in zip(seen, rows):
                row.append(kept.pop()[picked].clamp_min(0).float().cpu())
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return [torch.cat(row)[:tokens].T.contiguous() for row in rows]


def _file(rows: Tensor, n_experts: int, seed: int, restarts: int) -> Path:
    values = rows.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{VERSION} {tuple(rows.shape)} {rows.dtype} {n_experts} {seed} {restarts} ".encode())
    digest.update(values.view(torch.uint8).numpy().data)
    return cache_root() / "experts" / f"{digest.hexdigest()[:32]}.safetensors"


def _read(file: Path, hidden: int, n_experts: int) -> Tensor | None:
    """Labels from the cache; None when there are none, or the file is damaged and has to be written again."""
    if not file.exists():
        return None
    try:
        labels = read_tensors(file, "experts")[1].get("labels")
    except UserError:
        return None
    fits = (
        labels is not None
        and labels.dtype == torch.int64
        and labels.shape == (hidden,)
        and _balanced(labels, n_experts)
    )
    return labels if fits else None
