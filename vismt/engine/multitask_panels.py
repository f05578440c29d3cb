"""What the pictures of a multi-task run are drawn from: examples with every arm's answer, and what routers weigh where.

Each is one .npz without a pickle, written at once; `read_panel` checks what it reads.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from vismt.engine.arms import Unit, arm_config, arm_names, final_units
from vismt.engine.log import read_lines
from vismt.engine.multitask_evaluation import Evaluation
from vismt.engine.multitask_models import PixelNet, loaded
from vismt.errors import UserError
from vismt.lowrank.files import atomic_write
from vismt.lowrank.parts import parts_of
from vismt.multitask.moefied import MoEfiedMlp
from vismt.multitask.routing import expert_weights

EXAMPLES, ROUTERS = "examples.npz", "routers"
PER_TASK, ROUTED_IMAGES, ROUTED_BLOCKS = 6, 4, 3
# Kind of panel -> array -> type and axes; an axis has one length in all arrays of a file, "3" is three.
LAYOUTS = {
    "examples": {
        "images": ("uint8", "n3hw"), "truth": ("str", "n"), "tasks": ("str", "n"), "arms": ("str", "a"),
        "predictions": ("str", "an"),
    },
    "routers": {"images": ("uint8", "n3hw"), "omega": ("float16", "bnerc"), "blocks": ("int64", "b"), "depth": ("int64", "")},
}


# ---- examples
def write_examples(
    path: Path, images: Tensor | np.ndarray, truth: Sequence[str], tasks: Sequence[str], predictions: Mapping[str, Sequence[str]]
) -> Path:
    """Write images, the name of their class and what each arm says; returns `path`.

    images: uint8 (n, 3, h, w). truth, tasks: n names each, a class's as "task/class". predictions: by arm, n names.
    Raises UserError for numbers of things that do not fit together.
    """
    arrays = {
        "images": np.asarray(images), "truth": np.array(list(truth), dtype=str), "tasks": np.array(list(tasks), dtype=str),
        "arms": np.array(list(predictions), dtype=str),
    }
    lengths = {arm: len(answers) for arm, answers in predictions.items()}
    if len(set(lengths.values())) > 1:
        raise UserError(f"examples: {lengths} answers; give every arm the same number.")
    return _write(path, "examples", {**arrays, "predictions": np.array([list(own) for own in predictions.values()], dtype=str)})


def examples(evaluation: Evaluation, path: Path, count: int = PER_TASK) -> Path:
    """`count` evaluated images of each task, evenly over its images, with what the first seed of each arm says of them.

    The answers are those on record, nothing is evaluated. Raises UserError for an image that an arm has no record of.
    """
    config, data = evaluation.config, evaluation.data
    names = data.label_names
    first = [final_units(config, evaluation.folder, arm)[0] for arm in arm_names(config)]
    images, truth, tasks = [], [], []
    answers: dict[str, list[str]] = {unit.arm: [] for unit in first}
    for number, task in enumerate(data.union.tasks):
        part = data.part(number, config.evaluate.split)
        index = spread(len(part), count)
        images.append(part[index].mul(255).round().to(torch.uint8))
        truth += [names[label] for label in part.labels[index].tolist()]
        tasks += [task] * len(index)
        for unit in first:
            ids = [part.ids[i] for i in index.tolist()]
            answers[unit.arm] += _answers(evaluation.folder, unit, f"{config.evaluate.split}-{task}", ids, names)
    return write_examples(path, torch.cat(images), truth, tasks, answers)


def spread(total: int, count: int) -> Tensor:
    """int64 (min(total, count),): positions evenly over 0 .. total - 1, ascending, none twice."""
    kept = min(total, count)
    return (2 * torch.arange(kept) + 1) * total // (2 * kept)


def _answers(folder: Path, unit: Unit, stem: str, ids: Sequence[str], names: Sequence[str]) -> list[str]:
    path = unit.folder / "records" / f"{stem}.jsonl"
    found = {row["id"]: row.get("clean") for row in read_lines(path) if "id" in row}
    lacking = next((name for name in ids if not isinstance(found.get(name), int) or not 0 <= found[name] < len(names)), None)
    if lacking is not None:
        raise UserError(f"examples: '{path}' says nothing of image '{lacking}'; `vismt evaluate {folder}` completes it.")
    return [names[found[name]] for name in ids]


# ---- routers
def write_routers(path: Path, net: PixelNet, images: Tensor) -> Path:
    """Write what the routers of an unmerged net weigh the patches of images with, whatever the fade is now.

    images: float (n, 3, h, w) in [0, 1]. omega: float16 (block, n, e, rows, columns), at fade 0, on the tokens as they are at
    the net's own fade, in the first, the middle and the last FFN with a router; class and register tokens are left out.
    blocks: int64, the index of each in the model of `depth` blocks. Raises UserError for a net without a router.
    """
    routed = [(name, part) for name, part in parts_of(net).items() if isinstance(part, MoEfiedMlp)]
    if not routed:
        raise UserError("routers: this net has no router; take one that was adapted with moe_lora and is not merged.")
    chosen = [routed[i] for i in sorted({round(i * (len(routed) - 1) / (ROUTED_BLOCKS - 1)) for i in range(ROUTED_BLOCKS)})]
    seen: dict[str, Tensor] = {}
    hooks = [part.register_forward_pre_hook(partial(_weigh, seen, name)) for name, part in chosen]
    training = net.training
    try:
        with torch.no_grad():
            net.eval()(images.to(next(net.parameters()).device))
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    rows, columns = net.backbone.grid
    patches = [seen[name][:, net.vit.num_prefix_tokens:] for name, _ in chosen]
    maps = [rearrange(omega, "b (r c) e -> b e r c", r=rows, c=columns) for omega in patches]
    return _write(path, "routers", {
        "images": images.detach().cpu().mul(255).round().clamp(0, 255).to(torch.uint8).numpy(),
        "omega": torch.stack(maps).to("cpu", torch.float16).numpy(),
        "blocks": np.array([int(re.search(r"blocks\.(\d+)", name)[1]) for name, _ in chosen], dtype=np.int64),
        "depth": np.array(net.backbone.depth, dtype=np.int64),
    })


def _weigh(seen: dict[str, Tensor], name: str, part: MoEfiedMlp, inputs: tuple[Tensor]) -> None:
    router = part.lora_router
    seen[name] = expert_weights(router(inputs[0].to(router.weight.dtype)) / part.temperature, 0.0)


def routers(evaluation: Evaluation, arm: str, path: Path) -> Path | None:
    """`write_routers` of an arm's first seed on four evaluated images, evenly over the tasks; None where nothing routes."""
    config, data = evaluation.config, evaluation.data
    method = arm_config(config, arm).adapt
    if method is None or method.method != "moe_lora":
        return None
    wanted = (torch.arange(ROUTED_IMAGES) * len(data.union.tasks) // ROUTED_IMAGES).tolist()
    images = []
    for task in sorted(set(wanted)):
        part = data.part(task, config.evaluate.split)
        images.append(part[spread(len(part), wanted.count(task))])
    unit = final_units(config, evaluation.folder, arm)[0]
    return write_routers(path, loaded(config, unit, data.union.num_classes), torch.cat(images))


# ---- files
def read_panel(path: Path, kind: str) -> dict[str, np.ndarray]:
    """The arrays of a panel of LAYOUTS; UserError, with the file's name, for one that is missing, damaged or another's."""
    try:
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as file:
            return _checked({name: file[name] for name in LAYOUTS[kind]}, kind)
    except (
        ValueError, KeyError, TypeError, AttributeError, EOFError, OSError, NotImplementedError, zipfile.BadZipFile, zlib.error,
    ) as error:
        raise UserError(f"report: '{path}' is no panel of {kind} ({error}); delete it and evaluate the run again.") from error


def _checked(arrays: dict[str, Any], kind: str) -> dict[str, np.ndarray]:
    """The arrays as they are, or a ValueError that says which does not fit the layout."""
    lengths: dict[str, int] = {"3": 3}
    for name, (dtype, axes) in LAYOUTS[kind].items():
        array = arrays[name]
        fits = array.dtype.kind == "U" if dtype == "str" else array.dtype == dtype
        if not fits or array.ndim != len(axes) or 0 in array.shape:
            raise ValueError(f"{name} is {array.dtype} {array.shape}, needed {dtype} ({', '.join(axes)})")
        for axis, length in zip(axes, array.shape):
            if lengths.setdefault(axis, length) != length:
                raise ValueError(f"{name} is {array.shape} on ({', '.join(axes)}), needed {lengths[axis]} for {axis}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite")
    return arrays


def _write(path: Path, kind: str, arrays: dict[str, np.ndarray]) -> Path:
    buffer = io.BytesIO()
    try:
        np.savez_compressed(buffer, **_checked(arrays, kind))
    except ValueError as error:
        raise UserError(f"{kind}: {error}; nothing is written to '{path}'.") from error
    atomic_write(path, buffer.getvalue())
    return path
