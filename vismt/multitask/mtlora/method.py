"""MTLoRA: a shared pair of factors in every linear of the blocks, and a pair for each task where a decoder reads (layers.py).

Agiza, Neseem and Reda, CVPR 2024, arXiv 2403.20320; released code scale-lab/MTLoRA at 333a375. In the last block of each stage
the projection of attention, fc1 and fc2 give every task features of its own, which leave the network there. A plain ViT has one
stage and heads that read several blocks. Its task blocks are the four evenly spaced blocks that dense heads read
(`default_blocks`), so that every map of a head belongs to the task, as in the paper. For T tasks in blocks of width D and
hidden width 4 D, a shared pair has 16 D r numbers a block, a task block 12 D r_t T more.

Two forms were compared. The released one, y_t = W x + b + s_t B_t A_t x_t with the frozen product of the shared input, is
implemented. In the other one a task's rows run through W + both updates, y_t = (W + s B A + s_t B_t A_t) x_t:

    form       Swin-T at 448 px, 4 tasks, r_t 4, over 17.9 G multiply-adds      merges
    released   +0.43 G (2 %)                                                    the shared pairs outside of task blocks' three
    rows       +16.6 G (93 %): 9 D^2 a token, task and task block               see below

A task's rows in the last block of a plain ViT would merge into a stock ViT. With task blocks in several stages they would not.
A merged block hands its task features to the next stage, which reads the shared features here. (So `combine` of a shared and a
task's adapter gives the task's model only if its pairs are in the last block.) The price is the whole saving of the paper.

Four things differ from the released code. Taps are before Swin's merging and not after it. Tables of positions, norms and
mergings are trained only if also_train names them (the code always trains them). Tasks have a scale of their own (the code's
TASK_SCALE is not read). While a task has no gradient, the optimiser skips its pairs (weight decay too). As in the code, dropout
reaches a task's pair in proj alone. Left out: the modes "addition", "matrixv2" and "lora_only", trained scales, ranks that
differ by task. The shared pair of fc2 in the last block reaches no head. Its numbers are counted, as in the paper.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from vismt.base.errors import UserError, need_names, shown_value
from vismt.lowrank.layers.base import adapter_layers
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.layers.stock_modules import kind_of
from vismt.lowrank.model.inject import InjectOptions, LayerChoice, attach, inject
from vismt.lowrank.model.merge import forget
from vismt.lowrank.model.record import AdaptReport, need_record, refuse_adapted, refuse_offloaded, refuse_others
from vismt.lowrank.model.targets import Targets, pattern_values
from vismt.lowrank.svd import kaiming
from vismt.lowrank.tensors import need_finite
from vismt.methods import Method, register_method
from vismt.multitask.mtlora.layers import PAIR_SCALE, SITES, BlockSettings, TaskBlock, TaskLinear
from vismt.multitask.nets import default_blocks

if TYPE_CHECKING:
    from typing_extensions import Unpack

_BLOCK = re.compile(r"(?:.*\.)?blocks\.\d+")
LINEARS = re.compile(rf"{_BLOCK.pattern}\.(?:attn\.(?:qkv|[qkv]_proj|proj)|mlp\.fc(?:1|1_g|1_x|2))")


def mtlora(
    model: nn.Module,
    *,
    targets: Targets,
    seed: int,
    tasks: Sequence[str] = (),
    task_rank: int | Mapping[str, int] = 4,
    task_scale: float | Mapping[str, float] = PAIR_SCALE,
    task_blocks: Sequence[str] | None = None,
    **options: Unpack[InjectOptions],
) -> AdaptReport:
    """Add a shared pair at `targets` (None: qkv, proj, fc1, fc2 of all blocks) and pairs of tasks in some blocks.

    alpha: None means a scale of 4, for any rank. tasks: Names of the tasks, which a dense run gives itself. task_rank,
    task_scale: Rank and scale of the pairs of tasks, as one number, or one for each block, {pattern of its path: number}.
    task_blocks: Paths of blocks. None means the last block of each stage, or four evenly spaced blocks in a plain ViT. Further
    options are the options of `inject`.
    """
    refuse_adapted(model)
    tasks = need_names("mtlora: tasks", tasks)
    if not tasks or len(set(tasks)) < len(tasks):
        raise UserError(
            f"mtlora: tasks {shown_value(tasks)}; give a list of different names, tasks=['semseg', 'depth']."
        )
    every = [path for path, _ in model.named_modules() if _BLOCK.fullmatch(path)]
    chosen = _stage_ends(every) if task_blocks is None else need_names("mtlora: task_blocks", task_blocks)
    paths = list(dict.fromkeys(chosen))
    modules = dict(model.named_modules())
    if not every:
        raise UserError(f"mtlora: {type(model).__name__} has no blocks; it needs a ViT or a Swin of timm.")
    for path in paths:
        TaskBlock.check(path, modules.get(path))
    if every[-1] not in paths:
        raise UserError(f"mtlora: task_blocks {paths}; the last block, '{every[-1]}', has to be among them.")
    ranks, scales = (_by_block(name, of, paths) for name, of in (("task_rank", task_rank), ("task_scale", task_scale)))
    sites = {
        f"{path}.{leaf}": {"tasks": tuple(tasks), "task_rank": ranks[path], "task_scale": scales[path]}
        for path in paths
        for leaf in SITES
        if f"{path}.{leaf}" in modules
    }
    if targets is None:
        targets = [path for path, module in modules.items() if LINEARS.fullmatch(path) and kind_of(module) == "linear"]
    on_tasks: LayerChoice = {"layer": TaskLinear, "settings": {"of_tasks": sites}}
    report = inject(model, "mtlora", kaiming, offset=False, targets=targets, seed=seed, **on_tasks, **options)
    missing = sites.keys() - {spec.path for spec in report.specs}
    if missing:
        raise UserError(f"mtlora: targets leave out '{min(missing)}', which carries pairs of tasks; name it as well.")
    settings = {path: BlockSettings(tuple(tasks), path == every[-1]) for path in paths}
    attach(model, {path: TaskBlock(model.get_submodule(path), settings[path]) for path in paths}, settings)
    return replace(report, extras=[f"pairs of {len(tasks)} tasks in {', '.join(paths)}"])


def _stage_ends(blocks: Sequence[str]) -> list[str]:
    """Return the last block of each stage. For a single stage, return the blocks that dense heads read."""
    stages: dict[str, list[str]] = {}
    for path in blocks:
        stages.setdefault(path.rpartition(".")[0], []).append(path)
    if len(stages) > 1:
        return [stage[-1] for stage in stages.values()]
    return [stage[number] for stage in stages.values() for number in dict.fromkeys(default_blocks(len(stage)))]


def _by_block(name: str, value: object, paths: Sequence[str]) -> dict[str, float]:
    table = value if isinstance(value, Mapping) else {path: value for path in paths}
    matched = pattern_values(f"mtlora: {name}", table, paths)
    values = {}
    for path in paths:
        number = matched.get(path)
        kinds = int if name == "task_rank" else (int, float)
        if isinstance(number, bool) or not isinstance(number, kinds) or not 0 < number <= sys.float_info.max:
            kind = "whole number, at least 1" if kinds is int else "positive, finite number"
            raise UserError(f"mtlora: {name} of '{path}' is {shown_value(number)}; it must be a {kind}.")
        values[path] = number
    return values


def merge_shared(model: nn.Module) -> nn.Module:
    """Fold the shared pairs into their weights, outside of the linears with pairs of tasks.

    The functions stay the same, and run faster.

    Args:
        model: Model adapted by "mtlora", changed in place. Afterwards it has no adapter that can be undone or saved.
            Save its state dict.

    Returns:
        The model.

    Raises:
        UserError: If the model has another method or further adapters, or an update is not finite.
    """
    record = need_record(model, "merge_shared")
    refuse_offloaded(model, "merge_shared")
    refuse_others(model, "merge_shared")
    layers = adapter_layers(model)
    if not any(isinstance(layer, TaskLinear) for layer in layers.values()):
        raise UserError(f"merge_shared: '{record.method}' has no pairs of tasks; call vismt.merge.")
    shared = {path: layer for path, layer in layers.items() if not isinstance(layer, TaskLinear)}
    need_finite(
        "merge_shared", {f"{path}.{n}": v for path, layer in shared.items() for n, v in layer.tensors().items()}
    )
    for path, layer in shared.items():
        model.set_submodule(path, layer.merged())
    forget(model, record)
    return model


def skip_absent(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """Let the optimiser skip the pairs of a task whose gradient is zero everywhere, without decay or momentum."""
    layers = [layer for layer in adapter_layers(model).values() if isinstance(layer, TaskLinear)]

    def skip(*_: object) -> None:
        for task in range(len(layers[0].tasks)):
            pairs = [of[task] for layer in layers for of in (layer.task_A, layer.task_B)]
            largest = [pair.grad.abs().amax() for pair in pairs if pair.grad is not None]
            if largest and not torch.stack(largest).any():
                for pair in pairs:
                    pair.grad = None

    optimizer.register_step_pre_hook(skip)
    return optimizer


LAYERS = (LowRankLayer, TaskLinear, TaskBlock)
_NEEDS = {"tasks": "'mtlora' gives each task features of its own"}
register_method(
    Method("mtlora", mtlora, LAYERS, optimizer=skip_absent, needs=lambda options: _NEEDS, merges=False, exports=False)
)
