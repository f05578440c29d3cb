"""The two modules of MTLoRA: a linear with a pair of factors for each task, and the block around three of them.

    shared   y   = W x + b + s B A d(x)                    d: dropout
    task t   y_t = W x + b + s_t B_t A_t x_t               x: shared input; x_t: input of the task, d(x) in proj

In the last block of a stage (input x, attention output o, LN2 one norm for all):

    h   = x + proj(o)              u   = fc1(LN2 h)             y   = h + fc2(act u)           goes on through the network
    h_t = x + proj_t(o)            u_t = fc1_t(LN2 h, LN2 h_t)  y_t = h_t + fc2_t(act u, act u_t)     leaves for the decoder of t

The frozen product is computed from the shared input, and the task's output does not include the shared pair. A task therefore
costs low-rank products, and no product with W. Rows of a batch are stream-major, the shared features first: (s b), s = 1 + t.
This is Agiza et al., CVPR 2024, arXiv 2403.20320, mode "matrix" of the released code, see method.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.layers.base import AdapterModule, LayerSpec, in_autocast, register_module, spec_of
from vismt.lowrank.layers.forms import LowRankLinear
from vismt.lowrank.layers.low_rank import LowRankLayer, LowRankSettings
from vismt.lowrank.model.starts import Initialiser
from vismt.multitask.streams import task_features
from vismt.storage.files import JsonObject

if TYPE_CHECKING:
    pass

PAIR_SCALE = 4.0  # scale of both kinds of pairs in every released configuration, for any rank
SITES = ("attn.proj", "mlp.fc1", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2")  # linears of a block (a SwiGLU has two fc1)


@dataclass(frozen=True)
class TaskSettings(LowRankSettings):
    """Settings of a linear with pairs of tasks.

    rank, scale: Rank and scale of the shared pair. task_rank, task_scale: r_t and s_t.
    """

    tasks: tuple[str, ...] = ()
    task_rank: int = 4
    task_scale: float = PAIR_SCALE

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "tasks", tuple(self.tasks))
        if not self.tasks or len(set(self.tasks)) < len(self.tasks) or self.task_rank < 1 or len(self.blocks) > 1:
            raise ValueError(f"tasks {self.tasks} of rank {self.task_rank}")


@register_module("task_linear")
class TaskLinear(LowRankLinear):
    """nn.Linear with a shared pair and a pair for each task.

    forward: x (..., i) -> (..., o), the shared features. Inside `task_features` the rows of x are streams, (s b) ... i, and so
    are the rows of the result. The projection of attention takes only the shared rows, and opens the streams. The parameters
    task_A (r_t, i) and task_B (o, r_t) of each task are in lists in the order of `tasks`.
    """

    Settings = TaskSettings
    takes_prequantized = False
    weight_readable = False
    export_refusal = "has a pair for each task beside the shared pair, so no single weight can hold its update"
    combine_refusal = export_refusal

    def __init__(
        self,
        base: nn.Module,
        settings: TaskSettings,
        opens: bool,
        *,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(base, settings.rank, settings.scale, blocks=settings.blocks, dropout=dropout, dtype=dtype)
        self.tasks, self.task_scale, self.opens = settings.tasks, settings.task_scale, opens
        A, B, r = self.lora_A, self.lora_B, settings.task_rank
        self.task_A = nn.ParameterList(A.new_empty(r, A.shape[1]) for _ in self.tasks)
        self.task_B = nn.ParameterList(B.new_empty(B.shape[0], r) for _ in self.tasks)

    @classmethod
    def plan(
        cls,
        path: str,
        module: nn.Module,
        rank: int,
        alpha: float | None,
        *,
        of_tasks: Mapping[str, JsonObject] | None = None,
        **options: Any,
    ) -> LayerSpec:
        """Return the spec of a linear. A linear that `of_tasks` (settings by path) does not name is a plain low-rank layer.

        Without alpha the scale is `PAIR_SCALE`.
        """
        spec = LowRankLayer.plan(path, module, rank, alpha, **options)
        settings = spec.settings if alpha is not None else replace(spec.settings, scale=PAIR_SCALE)
        own = (of_tasks or {}).get(path)
        if own is None:
            return replace(spec, settings=settings)
        largest, task_rank = min(spec.shape), own["task_rank"]
        if task_rank > largest:
            raise UserError(
                f"mtlora: task_rank {task_rank} for '{path}' ({spec.shape[0]} x {spec.shape[1]}) is larger than {largest}."
            )
        return spec_of(path, module, cls, TaskSettings(**asdict(settings), **own))

    @classmethod
    def build(
        cls, base: nn.Module, spec: LayerSpec, *, dropout: float = 0.0, dtype: torch.dtype | None = None
    ) -> TaskLinear:
        return cls(base, spec.settings, spec.path.endswith(SITES[0]), dropout=dropout, dtype=dtype)

    @classmethod
    def tensor_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        (outputs, inputs), r = spec.shape, spec.settings.task_rank
        shapes = super().tensor_shapes(spec)
        for number in range(len(spec.settings.tasks)):
            shapes |= {f"task_A.{number}": (r, inputs), f"task_B.{number}": (outputs, r)}
        return shapes

    @classmethod
    def optional_shapes(cls, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        return {}

    @classmethod
    def count_parameters(cls, spec: LayerSpec) -> int:
        settings = spec.settings
        return super().count_parameters(spec) + len(settings.tasks) * settings.task_rank * sum(spec.shape)

    @classmethod
    def describe(cls, spec: LayerSpec) -> tuple[str, str]:
        settings, (rank, scale) = spec.settings, super().describe(spec)
        return f"{rank} + {len(settings.tasks)} x {settings.task_rank}", f"{scale}, {settings.task_scale:g}"

    def tensors(self) -> dict[str, Tensor]:
        pairs = {"task_A": self.task_A, "task_B": self.task_B}
        return super().tensors() | {f"{name}.{k}": value for name, of in pairs.items() for k, value in enumerate(of)}

    @torch.no_grad()
    def start_more(self, init: Initialiser, generator: torch.Generator) -> None:
        for A, B in zip(self.task_A, self.task_B):
            start = init(self.matrix(self.weight), len(A), self.task_scale, generator)
            A.copy_(start[0])
            B.copy_(start[1])

    def check_mergeable(self, what: str, path: str) -> None:
        raise UserError(
            f"{what}: '{path}' has a pair for each task, which one weight cannot hold; "
            "vismt.multitask.merge_shared(model) merges the shared pairs of all other layers, and "
            "task_features(names, per_sample=True) takes a task for each sample of a batch."
        )

    def forward(self, x: Tensor) -> Tensor:
        scope = task_features.scope()
        if scope is None:
            return super().forward(x)
        x = in_autocast(x)
        # Sizes come from `shape` and not from `len`, so that an exported graph keeps the batch free.
        shared = x if self.opens else x[: x.shape[0] // (1 + scope.streams)]
        rows = shared.shape[0]
        base = F.linear(shared, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        dropped = F.dropout(shared, self.dropout, self.training)
        # Groups of rows with one task: a stream, or a sample of a mixed batch.
        groups = [self.tasks.index(task) for task in scope.tasks]
        own = torch.cat([dropped] * scope.streams) if self.opens else x[rows:]
        A = torch.stack([self.task_A[task] for task in groups]).to(x.dtype)
        B = torch.stack([self.task_B[task] for task in groups]).to(x.dtype)
        out = torch.cat([base] * (1 + scope.streams))  # a copy, because it is added to in place (`expand` makes none)
        width = x.shape[-1]
        hidden = dropped.reshape(-1, width) @ self.lora_A.to(x.dtype).t()
        out[:rows].view(-1, out.shape[-1]).addmm_(hidden, self.lora_B.to(x.dtype).t(), alpha=self.scale)
        hidden = own.reshape(len(groups), -1, width) @ A.mT
        out[rows:].view(len(groups), -1, out.shape[-1]).baddbmm_(hidden, B.mT, alpha=self.task_scale)
        return out


@dataclass(frozen=True)
class BlockSettings:
    """Settings of a block with features of tasks.

    last: Whether it is the model's last block.
    """

    tasks: tuple[str, ...]
    last: bool

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))


@register_module("task_block")
class TaskBlock(AdapterModule):
    """A timm block (of a ViT, an EVA or a Swin) whose projection, fc1 and fc2 are `TaskLinear`s.

    forward: x (b, ..., d) -> the shared features of the same shape. Inside `task_features`, the features of tasks, (t b) rows,
    are put into its `own`. With `per_sample` the model's last block returns them, one row for each sample.
    """

    Settings = BlockSettings
    not_sharded = (
        "a block returns features of tasks beside its output, and FSDP watches only the output in the backward pass"
    )
    shell: nn.Module

    def __init__(self, block: nn.Module, settings: BlockSettings) -> None:
        super().__init__(block)
        self.about = settings

    def adopt(self, base: nn.Module | None) -> None:
        super().adopt(base)
        # The forward of the shell runs on the present children. Its mask of windows and its layer scales belong to this
        # module too.
        self.shell._modules = self._modules
        for table in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[table] = getattr(self.shell, table)

    def detach(self, model: nn.Module) -> nn.Module | None:
        stock = super().detach(model)
        self._parameters, self._buffers, self._non_persistent_buffers_set = {}, {}, set()
        return stock

    def __getattr__(self, name: str) -> Any:
        """Return other attributes of the block. timm changes the input size of a model block by block."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__.get("shell"), name)

    def forward(self, x: Tensor, **options: object) -> Tensor:
        scope, block = task_features.scope(), self.shell
        if scope is None:
            return block.forward(x, **options)
        batch = x.shape[0]
        scope.check(self.about.tasks, batch)
        parts: Any = block
        attend = getattr(block, "_attn", parts.attn)  # attention of a Swin cuts windows around it
        first, second = (_layer_scale(block, branch) for branch in (1, 2))
        h = parts.drop_path1(first(attend(parts.norm1(x), **options)))
        h = (x + h.unflatten(0, (1 + scope.streams, batch))).flatten(0, 1)
        y = h + parts.drop_path2(second(parts.mlp(parts.norm2(h))))
        shared, own = y[:batch], y[batch:]
        if self.about.last:
            # Nothing reads the shared output. A term of no elements keeps its pair in the graph, where several
            # processes wait.
            own = own + shared[:0].sum()
            if scope.per_sample:
                return own
        scope.own[self] = own
        return shared

    # ---- interface of AdapterModule
    @classmethod
    def check(cls, path: str, base: nn.Module | None) -> None:
        """Raise UserError unless a module is a block whose forward is known."""
        from timm.models.eva import EvaBlock
        from timm.models.swin_transformer import SwinTransformerBlock
        from timm.models.vision_transformer import Block

        known = [kind.forward for kind in (Block, EvaBlock, SwinTransformerBlock)]
        if not isinstance(base, cls) and (base is None or type(base).forward not in known):
            seen = "no such module" if base is None else f"a {type(base).__name__}"
            raise UserError(
                f"mtlora: '{path}' is {seen}, needed a Block of timm's ViT, an EvaBlock or a SwinTransformerBlock."
            )

    @classmethod
    def shapes_on(cls, base: nn.Module | None, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        cls.check(spec.path, base)
        return {}

    @classmethod
    def build(cls, base: nn.Module, spec: LayerSpec, **how: object) -> TaskBlock:
        return cls(base, spec.settings)


def _layer_scale(block: object, branch: int) -> Callable[[Tensor], Tensor]:
    """Return the layer scale of a branch. A ViT's block has a module, an EVA's block has a parameter."""
    gamma = getattr(block, f"gamma_{branch}", None)
    return getattr(block, f"ls{branch}", nn.Identity()) if gamma is None else partial(torch.mul, gamma)
