"""iLoRA: LoRA with its rank split into E groups, which a gate of the user weighs (arXiv 2408.10159).

    y_b = W x_b + s sum_e g_be B_e A_e x_b        A_e (r/E, i), B_e (o, r/E),  s = alpha / (r/E),  g_b = softmax(W_g u_b)

One gate g (b, E) of the user's representation u (b, width) serves all layers, tokens and generation steps. The product is ((x
A^T) * spread(g)) B^T, which is plain LoRA and one multiplication of the hidden width. The released code builds an output for
each group, which it calls an expert. A uniform gate is plain LoRA with alpha / r. "Balance" in the paper means this rank and
not a balancing loss.

Paper and released code differ. The paper's gate is linear (the default here). Every shipped script uses a 1-D ResNet-20
("cnn"), whose batch norms mix the samples of a batch while training. Their running statistics are saved here. The released code
drops them, so that it reloads other gates. In the released code, merging ignores the gate and every error returns zeros. Here
merging and export take one user's gates or are refused, and gates that do not match the batch are an error. Left out: gates per
layer and top-k, noisy or MLP gates, which the released code builds and never uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.errors import UserError, need_whole, require_known
from vismt.lowrank.layers.base import AdapterModule, LayerSpec, register_module
from vismt.lowrank.layers.gates import instance_gates, recompute_gates, unwatch_expansion, watch_expansion
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.model.inject import InjectOptions, attach, inject
from vismt.lowrank.model.record import AdaptReport, count_parameters, refuse_adapted
from vismt.lowrank.model.starts import site_generator
from vismt.lowrank.model.targets import Targets
from vismt.lowrank.svd import kaiming
from vismt.methods import Method, register_method

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["InstanceGate", "gate_of", "gate_part", "ilora", "instance_gates", "recompute_gates"]

_PATH = "instance_gate"
_KINDS = ("linear", "cnn")
_LARGEST = 2**20  # largest number of rank groups, and largest width of a user's representation


def ilora(
    model: nn.Module,
    *,
    targets: Targets,
    seed: int,
    n_experts: int = 4,
    gate: str | None = "linear",
    user_width: int = 64,
    **options: Unpack[InjectOptions],
) -> AdaptReport:
    """Add gated factors with kaiming A and zero B. Under any gates the function is unchanged until the first step.

    n_experts: Number E of rank groups, a divisor of the rank. gate: Kind of the network `gate_of(model)`, "linear" or "cnn",
    from user representations (b, user_width) to gates. None if the gates come from elsewhere. user_width: Width of the user
    representations. Further options are the options of `inject`.

    The adapted model runs only inside `with instance_gates(gates):`.
    """
    refuse_adapted(model)
    about = GateSettings(gate, n_experts, user_width)
    InstanceGate.check(_PATH, getattr(model, _PATH, None), about)
    report = inject(
        model, "ilora", kaiming, offset=False, targets=targets, seed=seed, settings={"experts": n_experts}, **options
    )
    gate_seed = int(torch.randint(2**62, (), generator=site_generator(seed, _PATH)))
    instance_gate = InstanceGate(gate, n_experts, user_width, gate_seed)
    attach(model, {_PATH: instance_gate}, {_PATH: about})
    trainable, total = count_parameters(model)
    size = sum(parameter.numel() for parameter in instance_gate.parameters())
    extras = [f"{gate} gate, {user_width} to {n_experts} rank groups   {size:,}"] if gate else []
    return replace(report, trainable=trainable, total=total, extras=extras)


def gate_of(model: nn.Module) -> InstanceGate:
    """Return the gate network of an adapted model. Raise UserError if the model has none."""
    gate = gate_part(model)
    if gate is None or gate.network is None:
        raise UserError("gate_of: this model has no gate network; adapt it with 'ilora' and gate='linear' or 'cnn'.")
    return gate


def gate_part(model: nn.Module) -> InstanceGate | None:
    """Return the InstanceGate of an adapted model, with or without a network. Return None for a model of another method."""
    gate = getattr(model, _PATH, None)
    return gate if isinstance(gate, InstanceGate) else None


@dataclass(frozen=True)
class GateSettings:
    """Settings of the gate network.

    kind: "linear" or "cnn", None for no network.
    """

    kind: str | None
    n_experts: int
    user_width: int


@register_module("instance_gate")
class InstanceGate(AdapterModule):
    """Network from user representations (b, width) to gates (b, E). Gates are not negative, and each row sums to one.

    It runs in the dtype of its weights, which is fp32 (fp64 in an fp64 model) until the model is cast. Without a kind there is
    no network.
    """

    Settings = GateSettings

    def __init__(self, kind: str | None, rank_groups: int, user_width: int, seed: int = 0) -> None:
        super().__init__()
        self.rank_groups, self.user_width = rank_groups, user_width
        with torch.random.fork_rng(devices=[]):  # torch's initial values, from the given seed
            torch.default_generator.manual_seed(seed)
            self.network = network(kind, rank_groups, user_width)

    @classmethod
    def shapes_on(cls, base: nn.Module | None, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        return cls.check(spec.path, base, spec.settings)

    @classmethod
    def check(cls, path: str, base: nn.Module | None, settings: GateSettings) -> dict[str, tuple[int, ...]]:
        """Return the shapes of `tensors()`. Raise UserError for wrong settings, and if the path is taken."""
        kind, rank_groups, user_width = settings.kind, settings.n_experts, settings.user_width
        if path != _PATH:
            raise UserError(f"ilora: the gate network of a model lies at '{_PATH}', not at '{path}'.")
        if base is not None and not isinstance(base, InstanceGate):
            raise UserError(f"ilora: the model already has a '{path}', a {type(base).__name__}; rename it.")
        require_known("adapt.gate:", [] if kind is None else [kind], _KINDS)
        for name, value in (("n_experts", rank_groups), ("user_width", user_width)):
            need_whole(f"adapt.{name}:", value, 1, _LARGEST)
        with torch.device("meta"):
            planned = network(kind, rank_groups, user_width)
        state = {} if planned is None else planned.state_dict()
        return {f"network.{name}": tuple(value.shape) for name, value in state.items()}

    @classmethod
    def check_tensors(cls, what: str, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> None:
        counts = {name: value for name, value in tensors.items() if name.endswith(".num_batches_tracked")}
        for name, value in counts.items():
            if value.dtype != torch.int64:
                raise UserError(f"{what}.{name}: {value.dtype}; it must be int64.")
        super().check_tensors(what, spec, {name: value for name, value in tensors.items() if name not in counts})

    @classmethod
    def build(cls, base: object, spec: LayerSpec, **how: object) -> InstanceGate:
        return cls(spec.settings.kind, spec.settings.n_experts, spec.settings.user_width)

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters and the running statistics of batch norms, which the gates depend on."""
        if self.network is None:
            return {}
        return {f"network.{name}": value for name, value in self.network.state_dict().items()}

    def attach(self, model: nn.Module, names: Sequence[str]) -> None:
        first = next(model.parameters())
        self.to(first.device, torch.promote_types(first.dtype, torch.float32)).train(model.training)
        super().attach(model, names)
        watch_expansion(model)

    def detach(self, model: nn.Module) -> nn.Module | None:
        unwatch_expansion(model)
        return super().detach(model)

    def forward(self, users: Tensor) -> Tensor:
        if self.network is None or users.ndim != 2 or users.shape[1] != self.user_width:
            fix = "" if self.network is None else f", needed (samples, {self.user_width})"
            lack = "this model was adapted without a gate network; " if self.network is None else ""
            raise UserError(f"instance gate: {lack}user representations are {tuple(users.shape)}{fix}.")
        return self.network(users.to(next(self.network.parameters()).dtype)).softmax(-1)


def network(kind: str | None, rank_groups: int, user_width: int) -> nn.Module | None:
    """Return the network (b, user_width) -> logits of the gates (b, E). Return None without a kind."""
    if kind is None:
        return None
    return nn.Linear(user_width, rank_groups) if kind == "linear" else ConvGate(rank_groups)


class ConvGate(nn.Module):
    """The gate of the released scripts: ResNet-20 along the user's vector as one channel.

    It has 16, 32 and 64 channels, and takes the mean over the length.
    """

    def __init__(self, rank_groups: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 16, 3, padding=1, bias=False), nn.BatchNorm1d(16)
        sizes = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.blocks = nn.Sequential(*(Residual(*size) for size in sizes))
        self.head = nn.Linear(64, rank_groups)

    def forward(self, users: Tensor) -> Tensor:
        """Return the logits (b, E) of users (b, width)."""
        return self.head(self.blocks(F.relu(self.norm(self.conv(users[:, None])))).mean(-1))


class Residual(nn.Module):
    """Two convolutions beside a shortcut without weights, which takes every stride-th position and zeros for new channels."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.stride, self.pad = stride, (outer - inner) // 2
        self.conv1 = nn.Conv1d(inner, outer, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm1d(outer)
        self.conv2 = nn.Conv1d(outer, outer, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm1d(outer)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(out + F.pad(x[:, :, :: self.stride], (0, 0, self.pad, self.pad)))


_NEEDS = {"users": "'ilora' is gated by a user's history"}
register_method(Method("ilora", ilora, layers=(LowRankLayer, InstanceGate), needs=lambda options: _NEEDS))
