"""The FFN of EMTAL: two linears with a LoRA pair each, and between them a router that weighs the experts of hidden units.

    u = W_up x + b_up + B_1 A_1 x        omega = (1 - a) K softmax(W_r x / temperature) + a        (routing.py)
    y = W_down v + b_down + B_2 A_2 v,   v = act(u * omega)          unit h is weighed by expert h // (H / K)

x is the FFN's input, after its norm; each token is routed for itself, no task is told. At a = 1 (fading.py) omega is 1 and
y an FFN with merged weights. Before, nothing merges: the router stands before the activation and depends on the token.
Source: Zhong et al., NeurIPS 2024, arXiv 2501.06884; where paper and code differ, see moe_lora.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.errors import UserError, near
from vismt.lowrank.init import working_dtype
from vismt.lowrank.inject import Initialiser, initialise, site_generator
from vismt.lowrank.layer_spec import plan_site
from vismt.lowrank.linear import Adapted, AdaptedLinear
from vismt.lowrank.wrappers import Part
from vismt.multitask.experts import plain_mlp
from vismt.multitask.routing import expert_weights, gate, idle

INITS = ("normal", "zero")
STD = 0.02
TABLES = {
    "fc1": (("weight", 0), ("bias", 0), ("lora_B", 0)),
    "fc2": (("weight", 1), ("lora_A", 1)),
}  # axes of hidden units


def starter(init: str) -> Initialiser:
    """Start values of a pair: "normal" draws A and B from N(0, 0.02^2), "zero" leaves B at zero."""
    if init not in INITS:
        raise UserError(f"moe_lora: init {init!r}.{near(str(init), INITS)}")

    def start(weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        kind = working_dtype(weight)
        A, B = (torch.empty(shape, dtype=kind).normal_(0, STD, generator=generator) for shape in _shapes(weight, rank))
        return A, B if init == "normal" else torch.zeros_like(B)

    return start


def _shapes(weight: Tensor, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    return (rank, weight.shape[1]), (weight.shape[0], rank)


class Fade(Protocol):
    """What several routers may share: a coefficient in [0, 1], see fading.FadeState."""

    value: float


def checked_fade(fade: float | Fade) -> float | Fade:
    """A number in [0, 1] as a float, or the object with a `value` as it is."""
    number = isinstance(fade, Real) and not isinstance(fade, bool)
    if not (hasattr(fade, "value") or (number and 0 <= fade <= 1)):
        raise UserError(f"moe_lora: fade {fade!r}; it must be a number from 0 (routed) to 1 (faded), or a FadeState.")
    return float(fade) if number else fade


def refuse_routing(what: str, path: str, fade: float, where: str = "") -> None:
    """UserError unless the router has faded."""
    if fade != 1:
        raise UserError(
            f"{what}: the router of '{path}' still routes (fade {fade:.12g} of 1{where}), merged weights cannot; "
            "train until it has faded, or accept another function with vismt.multitask.moe_lora.set_fade(model, 1.0)."
        )


def check_labels(labels: Tensor, hidden: int, n_experts: int) -> None:
    """Labels (H,) int64 that give each expert H / K units, or a UserError."""
    fits = labels.dtype == torch.int64 and labels.shape == (hidden,)
    if not fits or not torch.equal(labels.sort().values.cpu(), torch.arange(hidden) // (hidden // n_experts)):
        needed = f"({hidden},) int64 with {hidden // n_experts} units for each of 0 .. {n_experts - 1}"
        raise UserError(f"moe_lora: labels {tuple(labels.shape)} {labels.dtype}, needed {needed}; use cluster_neurons.")


class MoEfiedMlp(Part):
    """A timm Mlp with a LoRA pair in fc1 and in fc2 and a router between fc1 and the activation; x (..., d) -> (..., d).

    mlp: fc1, activation, fc2 of any width; its weights are used, not copied, and frozen; fc1 and fc2 that carry updates
    already keep those. rank: of both pairs (None: no new ones), scale 1. n_experts divides the hidden width; units are
    taken in the order in which they lie, `assign` orders them by a clustering. init: "normal" or "zero", see above.
    fade: number in [0, 1] or a shared FadeState; 0 routes (the start), 1 is plain LoRA. It is state: forward has no
    argument for it, and it is in the state dict. temperature > 0. lora_router.weight: (K, d), truncated normal, std 0.02.
    Raises UserError for another FFN, a wrong number, or an init that is not known.
    """

    labels: Tensor

    def __init__(
        self,
        mlp: nn.Module,
        rank: int | None,
        n_experts: int,
        temperature: float = 5.0,
        init: str = "normal",
        seed: int = 0,
    ) -> None:
        self.check("mlp", mlp, {"n_experts": n_experts, "temperature": temperature})
        start = starter(init)
        if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
            raise UserError(f"moe_lora: rank {rank!r}; it must be a whole number, at least 1.")
        super().__init__(mlp)
        self.n_experts, self.temperature, self.fade = n_experts, float(temperature), 0.0
        for name in ("fc1", "fc2"):
            base = getattr(self, name)
            if rank is None or isinstance(base, Adapted):
                continue
            site = plan_site(name, base, rank, None, rslora=False, clamp_rank=False, split_qkv=False)
            base.requires_grad_(False)
            setattr(self, name, AdaptedLinear(base, rank, site.scale))
            initialise(getattr(self, name), site, start, seed, offset=False)
        weight = self.fc1.weight
        kind = self.fc1.lora_A.dtype if isinstance(self.fc1, Adapted) else working_dtype(weight)
        hidden, width = weight.shape
        # A plain construction would draw from the global generator.
        self.lora_router = nn.utils.skip_init(nn.Linear, width, n_experts, bias=False, device=weight.device, dtype=kind)
        if not weight.is_meta:
            drawn = torch.empty(n_experts, width)
            nn.init.trunc_normal_(drawn, std=STD, generator=site_generator(seed, "lora_router"))
            with torch.no_grad():
                self.lora_router.weight.copy_(drawn)
        # Expert of each unit in stock order; while `ordered`, the tensors lie in order of expert.
        self.register_buffer("labels", torch.arange(hidden, device=weight.device) // (hidden // n_experts))
        self.ordered = True

    def forward(self, x: Tensor) -> Tensor:
        """X (..., d), the normed tokens -> (..., d). Exactly the plain FFN, at its cost, once the fade is at 1."""
        fade, units = self.fade_value, self.fc1(x)
        units = idle(units, self.lora_router.weight) if fade == 1 else gate(units, self._logits(x), fade)
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(units)))))

    def omega(self, x: Tensor) -> Tensor:
        """Omega (..., e) of tokens x (..., d) at the present fade: what each expert's pre-activations are multiplied with."""
        return expert_weights(self._logits(x), self.fade_value)

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(x, self.lora_router.weight.to(x.dtype)) / self.temperature

    # ---- the fade
    @property
    def fade(self) -> float | Fade:
        return self._fade

    @property
    def fade_value(self) -> float:
        """The coefficient in force, a float in [0, 1]."""
        return self._fade if isinstance(self._fade, float) else self._fade.value

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "fade":  # past nn.Module, which would make a shared FadeState a child of every block
            self.__dict__["_fade"] = checked_fade(value)
        else:
            super().__setattr__(name, value)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.fade_value, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        if isinstance(self._fade, float):
            self.fade = float(state)
        elif self._fade.value != float(state):  # a schedule goes back to its own value with its next step
            self._fade.value = float(state)

    # ---- the order of the hidden units
    def assign(self, labels: Tensor) -> None:
        """Give each hidden unit (in stock order) its expert, labels (H,) of `cluster_neurons`, and order the tensors so."""
        check_labels(labels, len(self.labels), self.n_experts)
        self.to_stock_order()
        self.labels.copy_(labels)
        self.to_own_order()

    def to_stock_order(self) -> None:
        if self.ordered:
            self._move(self.labels.argsort(stable=True).argsort())
        self.ordered = False

    def to_own_order(self) -> None:
        if not self.ordered:
            self._move(self.labels.argsort(stable=True))
        self.ordered = True

    @torch.no_grad()
    def _move(self, order: Tensor) -> None:
        """New unit h becomes old unit order[h], in place, in the weights and in the factors."""
        if order.is_meta or bool((order.diff() == 1).all()):
            return
        for linear, axes in TABLES.items():
            for name, axis in axes:
                tensor = getattr(getattr(self, linear), name, None)
                if tensor is not None:
                    tensor.copy_(tensor.index_select(axis, order))

    # ---- what the core asks of a part
    @classmethod
    def check(cls, path: str, base: nn.Module, settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of `tensors()`; UserError, with the reason, for an FFN that cannot be routed and for wrong settings."""
        from timm.layers import Mlp

        n_experts, temperature = settings.get("n_experts"), settings.get("temperature")
        if isinstance(n_experts, bool) or not isinstance(n_experts, int) or n_experts < 1:
            raise UserError(f"moe_lora: n_experts {n_experts!r}; it must be a whole number, at least 1.")
        if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
            raise UserError(f"moe_lora: temperature {temperature!r}; it must be a positive number.")
        adapted = any(isinstance(getattr(base, name, None), Adapted) for name in ("fc1", "fc2"))
        if not adapted and not isinstance(base, cls):
            plain_mlp(base, f"'{path}'")
        if not isinstance(base, cls) and type(base).forward is not Mlp.forward:
            raise UserError(
                f"moe_lora: '{path}' is a {type(base).__name__}, needed timm's Mlp: fc1, an activation, fc2."
            )
        hidden, width = base.fc1.weight.shape
        if hidden % n_experts:
            fitting = ", ".join(str(k) for k in range(2, 65) if hidden % k == 0) or "1"
            seen = f"n_experts {n_experts} does not divide the {hidden} hidden units of '{path}'"
            raise UserError(f"moe_lora: {seen}; take one of {fitting}.")
        return {"lora_router.weight": (n_experts, width), "labels": (hidden,), "fade": ()}

    @classmethod
    def around(cls, base: nn.Module, settings: Mapping[str, Any]) -> MoEfiedMlp:
        return cls(base, None, settings["n_experts"], settings["temperature"])

    def settings(self) -> dict[str, Any]:
        return {"n_experts": self.n_experts, "temperature": self.temperature}

    def tensors(self) -> dict[str, Tensor]:
        return {"lora_router.weight": self.lora_router.weight, "labels": self.labels, "fade": self.get_extra_state()}

    def restore(self, name: str, value: Tensor) -> None:
        self.set_extra_state(value) if name == "fade" else self.labels.copy_(value)

    def need_idle(self, what: str, path: str) -> None:
        taken, total = getattr(self._fade, "taken", None), getattr(self._fade, "total_steps", None)
        where = (
            "" if taken is None else f", step {taken} of {total}, 1 from {math.ceil((self._fade.end - 1e-9) * total)}"
        )
        refuse_routing(what, path, self.fade_value, where)

    @classmethod
    def need_idle_saved(cls, what: str, path: str, tensors: Mapping[str, Tensor]) -> None:
        refuse_routing(what, path, float(tensors.get("fade", 0.0)))

    def extra_repr(self) -> str:
        return f"n_experts={self.n_experts}, temperature={self.temperature:g}, fade={self.fade_value:.4g}"
