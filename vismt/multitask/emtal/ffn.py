"""The FFN of EMTAL: two linear layers with a LoRA pair each, and between them a router that weighs experts of hidden units.

    u = W_up x + b_up + B_1 A_1 x        omega = (1 - a) K softmax(W_r x / temperature) + a        (routing.py)
    y = W_down v + b_down + B_2 A_2 v,   v = act(u * omega)          unit h is weighed by the expert of its label

x is the FFN's input, after its norm. Each token is routed on its own and independently of its task. At a = 1 (fading.py) omega
is 1 and y is a plain FFN with merged weights. For a < 1 the layer cannot be merged, because the router acts before the
activation and depends on the token. Source: Zhong et al., NeurIPS 2024, arXiv 2501.06884. method.py says where paper and code
differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.errors import UserError, need_whole, require_known, shown_value
from vismt.lowrank.layers.base import AdapterModule, LayerSpec, register_module
from vismt.lowrank.layers.forms import LowRankLinear
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.model.starts import Initialiser, initialise, site_generator
from vismt.lowrank.svd import working_dtype
from vismt.multitask.emtal.clusters import fc1_weight, plain_mlp
from vismt.multitask.emtal.expert_pairs import ExpertPairs
from vismt.multitask.emtal.routing import expert_weights, gate, idle

INITS = ("normal", "zero")
STD = 0.02


def starter(init: str) -> Initialiser:
    """Return the initialiser of a pair: "normal" draws A and B from N(0, 0.02^2), "zero" sets B to zero."""
    require_known("emtal: init", [init], INITS)

    def start(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        dtype = working_dtype(weight)
        A = torch.empty(rank, weight.shape[1], dtype=dtype).normal_(0, STD, generator=generator)
        B = torch.empty(weight.shape[0], rank, dtype=dtype).normal_(0, STD, generator=generator)
        return A, B if init == "normal" else torch.zeros_like(B)

    return start


class Fade(Protocol):
    """A coefficient in [0, 1] that several routers share, see fading.FadeState."""

    value: float


def checked_fade(fade: float | Fade) -> float | Fade:
    """Return a number in [0, 1] as float, or an object with a `value` unchanged. Raise UserError for anything else."""
    is_number = isinstance(fade, Real) and not isinstance(fade, bool)
    if not (hasattr(fade, "value") or (is_number and 0 <= fade <= 1)):
        raise UserError(
            f"emtal: fade {shown_value(fade)}; it must be a number from 0 (routed) to 1 (faded), or a FadeState."
        )
    return float(fade) if isinstance(fade, Real) else fade


def refuse_routing(what: str, path: str, fade: float, where: str = "") -> None:
    """Raise UserError unless the router has faded."""
    if fade != 1:
        raise UserError(
            f"{what}: the router of '{path}' still routes (fade {fade:.12g} of 1{where}), which merged weights cannot express; "
            "train until it has faded, or change the function by vismt.multitask.emtal.method.set_fade(model, 1.0)."
        )


def check_unit_labels(labels: Tensor, hidden: int, n_experts: int) -> None:
    """Raise UserError unless labels are int64 (H,) and give each expert H / K units."""
    expected = torch.arange(hidden) // (hidden // n_experts)
    if labels.dtype != torch.int64 or not torch.equal(labels.sort().values.cpu(), expected):
        needed = f"({hidden},) int64 with {hidden // n_experts} units for each of 0 .. {n_experts - 1}"
        raise UserError(f"emtal: labels {tuple(labels.shape)} {labels.dtype}, needed {needed}; use cluster_neurons.")


@dataclass(frozen=True)
class RouterSettings:
    """Settings of a router in an FFN.

    n_experts: Number K of experts. temperature: Temperature of the softmax.
    """

    n_experts: int
    temperature: float


@register_module("moefied_ffn")
class MoEfiedMlp(AdapterModule):
    """A timm Mlp with a LoRA pair in fc1 and in fc2, and a router between fc1 and the activation. x (..., d) -> (..., d).

    Args:
        mlp: FFN (fc1, activation, fc2) of any width. Its weights are shared, not copied, and frozen. Updates that fc1 and fc2
            already have are kept.
        rank: Rank of both pairs, with scale 1. None adds no pairs.
        n_experts: Number K of experts, a divisor of the hidden width. Experts are contiguous units until `assign` sets the
            experts of a clustering.
        temperature: Temperature of the router's softmax, > 0.
        init: Start values of the pairs, "normal" or "zero", see `starter`.
        seed: Seed of the start values.

    Attributes:
        fade: Number in [0, 1] or a shared FadeState. 0 routes (the start), 1 is plain LoRA. The fade is state and not an
            argument of forward, and it is part of the state dict.
        lora_router: Linear layer with weight (K, d), truncated normal with std 0.02 at the start.
        labels: Expert of each hidden unit, int64 (H,).

    Raises:
        UserError: If the FFN is of another kind, a number is out of range, or `init` is unknown.
    """

    Settings = RouterSettings

    fc1: nn.Linear
    fc2: nn.Linear
    act: nn.Module
    drop1: nn.Module
    norm: nn.Module
    drop2: nn.Module
    labels: Tensor
    _fade: float | Fade

    def __init__(
        self,
        mlp: nn.Module,
        rank: int | None,
        n_experts: int,
        temperature: float = 5.0,
        init: str = "normal",
        seed: int = 0,
    ) -> None:
        self.check("mlp", mlp, RouterSettings(n_experts, temperature))
        start = starter(init)
        if rank is not None:
            need_whole("emtal: rank", rank)
        super().__init__(mlp)
        self.n_experts, self.temperature, self.fade = n_experts, float(temperature), 0.0
        for name in ("fc1", "fc2"):
            base = getattr(self, name)
            if rank is None or isinstance(base, LowRankLayer):
                continue
            site = LowRankLayer.plan(name, base, rank, None)
            base.requires_grad_(False)
            setattr(self, name, LowRankLinear(base, rank, site.settings.scale))
            initialise(getattr(self, name), site, start, seed, offset=False)
        weight = self.fc1.weight
        dtype = self.fc1.lora_A.dtype if isinstance(self.fc1, LowRankLayer) else working_dtype(weight)
        hidden, width = weight.shape
        # A plain construction would draw from the global generator.
        self.lora_router = nn.utils.skip_init(
            nn.Linear, width, n_experts, bias=False, device=weight.device, dtype=dtype
        )
        if not weight.is_meta:
            start_weight = torch.empty(n_experts, width)
            nn.init.trunc_normal_(start_weight, std=STD, generator=site_generator(seed, "lora_router"))
            with torch.no_grad():
                self.lora_router.weight.copy_(start_weight)
        self.register_buffer("labels", torch.arange(hidden, device=weight.device) // (hidden // n_experts))

    def forward(self, x: Tensor) -> Tensor:
        """Map the normed tokens (..., d) to (..., d). At fade 1 this is exactly the plain FFN, at its cost."""
        fade, units = self.fade_value, self.fc1(x)
        units = idle(units, self.lora_router.weight) if fade == 1 else gate(units, self._logits(x), self.labels, fade)
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(units)))))

    def omega(self, x: Tensor) -> Tensor:
        """Return omega (..., e) of tokens x (..., d) at the present fade, the factors of the experts' pre-activations."""
        return expert_weights(self._logits(x), self.fade_value)

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.lora_router.weight.to(x.dtype)) / self.temperature

    # ---- the fade
    @property
    def fade(self) -> float | Fade:
        return self._fade

    @fade.setter
    def fade(self, fade: float | Fade) -> None:
        self.__dict__["_fade"] = checked_fade(fade)

    @property
    def fade_value(self) -> float:
        """Present coefficient, a float in [0, 1]."""
        return self._fade if isinstance(self._fade, float) else self._fade.value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "fade":  # nn.Module would register a shared FadeState as a child of every block
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.fade_value, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        if isinstance(self._fade, float):
            self.fade = float(state)
        elif self._fade.value != float(state):  # a schedule returns to its value with its next step
            self._fade.value = float(state)

    def assign(self, labels: Tensor) -> None:
        """Set the expert of each hidden unit, labels (H,) of `cluster_neurons`."""
        check_unit_labels(labels, len(self.labels), self.n_experts)
        self.labels.copy_(labels)
        for linear in (self.fc1, self.fc2):
            if isinstance(linear, ExpertPairs):
                linear.expert.copy_(labels)

    # ---- interface of AdapterModule
    @classmethod
    def shapes_on(cls, base: nn.Module | None, spec: LayerSpec) -> dict[str, tuple[int, ...]]:
        return cls.check(spec.path, base, spec.settings)

    @classmethod
    def check(cls, path: str, base: nn.Module | None, settings: RouterSettings) -> dict[str, tuple[int, ...]]:
        """Return the shapes of `tensors()`. Raise UserError, with the reason, for unsuitable FFNs and wrong settings."""
        from timm.layers import Mlp

        n_experts, temperature = settings.n_experts, settings.temperature
        if base is None:
            raise UserError(f"emtal: this model has no '{path}' to put a router in.")
        need_whole("emtal: n_experts", n_experts)
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise UserError(f"emtal: temperature {shown_value(temperature)}; it must be a positive number.")
        adapted = any(isinstance(getattr(base, name, None), LowRankLayer) for name in ("fc1", "fc2"))
        if not adapted and not isinstance(base, cls):
            plain_mlp(base, f"'{path}'")
        if not isinstance(base, cls) and type(base).forward is not Mlp.forward:
            raise UserError(f"emtal: '{path}' is a {type(base).__name__}, needed timm's Mlp (fc1, an activation, fc2).")
        hidden, width = fc1_weight(base).shape
        if hidden % n_experts:
            divisors = ", ".join(str(k) for k in range(2, 65) if hidden % k == 0) or "1"
            raise UserError(
                f"emtal: n_experts {n_experts} does not divide the {hidden} hidden units of '{path}'; use one of {divisors}."
            )
        return {"lora_router.weight": (n_experts, width), "labels": (hidden,), "fade": ()}

    @classmethod
    def check_tensors(cls, what: str, spec: LayerSpec, tensors: Mapping[str, Tensor]) -> None:
        fade = tensors["fade"]
        if fade.dtype != torch.float64 or not 0 <= float(fade) <= 1:
            raise UserError(f"{what}.fade: {float(fade)} ({fade.dtype}); it must be float64, from 0 to 1.")
        check_unit_labels(tensors["labels"], len(tensors["labels"]), spec.settings.n_experts)
        super().check_tensors(what, spec, {"lora_router.weight": tensors["lora_router.weight"]})

    @classmethod
    def build(cls, base: nn.Module, spec: LayerSpec, **how: object) -> MoEfiedMlp:
        return cls(base, None, spec.settings.n_experts, spec.settings.temperature)

    def tensors(self) -> dict[str, Tensor]:
        return {"lora_router.weight": self.lora_router.weight, "labels": self.labels, "fade": self.get_extra_state()}

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        super().fill({name: value for name, value in tensors.items() if name != "fade"})
        self.set_extra_state(tensors["fade"])

    def check_mergeable(self, what: str, path: str) -> None:
        schedule: Any = self._fade
        where = ""
        if hasattr(schedule, "taken"):
            total = schedule.total_steps
            where = f", step {schedule.taken} of {total}, 1 from {math.ceil((schedule.end - 1e-9) * total)}"
        refuse_routing(what, path, self.fade_value, where)

    @classmethod
    def check_mergeable_saved(cls, what: str, path: str, tensors: Mapping[str, Tensor]) -> None:
        fade = tensors.get("fade")
        refuse_routing(
            what, path, float(fade) if fade is not None and fade.dtype == torch.float64 and not fade.ndim else 0.0
        )

    def extra_repr(self) -> str:
        return f"n_experts={self.n_experts}, temperature={self.temperature:g}, fade={self.fade_value:.4g}"
