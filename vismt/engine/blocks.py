"""How the blocks of a net run during training: checkpointed, under torch.compile, with attention by products on a CPU.

A block is a child of the net's largest stack of equal layers, in any library. A checkpointed block keeps its input, and runs
again in the backward pass with the tensors, gates and kernels of its forward pass. torch.utils.checkpoint does not know that
inner loops and attacks on weights replace a block's tensors for one call.

On a CPU, the backward pass of torch's fused attention in bf16 takes up to seven times as long for short sequences as the
backward pass of its products, softmax(Q K^T / sqrt(d)) V.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from vismt.base.errors import UserError
from vismt.config.sections import TrainConfig
from vismt.engine import runtime
from vismt.llm.lisa.shares import stacks
from vismt.lowrank.contexts import Repeatable
from vismt.lowrank.layers.gates import recompute_gates
from vismt.methods import freezes

BACKEND = "inductor"
KERNELS = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
}
COMPILERS = ("g++", "clang++", "c++")
SHORT = 256  # tokens (longer sequences would store large attention maps for little time)


@contextmanager
def running_blocks(objective: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Run the blocks of the objective's net as the train section says, inside the block. Afterwards they run as before.

    Raise UserError for a net without blocks, for train.compile with a method that freezes parameters in turn, and for a CPU
    without a C++ compiler.
    """
    products = not config.compile and config.precision == "bf16" and runtime.net_device().type == "cpu"
    with ExitStack() as undo:
        changes = config.checkpointing or config.compile
        blocks = find_blocks(objective) if changes else []
        if changes and not blocks:
            raise UserError(
                "train.checkpointing and train.compile: the net has no list of equal blocks; leave them out."
            )
        if config.compile:
            check_compile(objective)
            undo.enter_context(_kept_buffers())
        for block in blocks:
            if config.checkpointing:
                block.forward = _Checkpointed(block, products).checkpointed
                undo.callback(block.__dict__.pop, "forward", None)
            else:
                undo.callback(setattr, block, "_compiled_call_impl", None)
        if config.compile:
            compile_blocks(blocks)
        if products:
            undo.enter_context(_AttentionByProducts())
        yield


class _AttentionByProducts(TorchFunctionMode):
    """Compute the attention of short sequences by its products if gradients are recorded. Masks are left to torch."""

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Collection[type],
        args: tuple[Tensor, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        options = kwargs or {}
        if function is F.scaled_dot_product_attention and len(args) == 3:
            q, k, v = args
            plain = options.get("attn_mask") is None and not any(options.values())
            if plain and torch.is_grad_enabled() and k.shape[-2] <= SHORT:
                weights = (q * q.shape[-1] ** -0.5) @ k.mT
                return weights.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        return function(*args, **options)


def find_blocks(objective: nn.Module) -> list[nn.Module]:
    """Return the blocks of the largest stack of equal layers, and of other stacks at least half as large (a second net)."""
    sizes = stacks(objective)
    largest = max(sizes.values(), default=0)
    chosen = [objective.get_submodule(path) for path, size in sizes.items() if 2 * size >= largest]
    return [block for stack in chosen for block in stack.children()]


class _Checkpointed(nn.Module):
    """A block whose forward is computed again in the backward pass, with the tensors that it had."""

    def __init__(self, block: nn.Module, products: bool) -> None:
        super().__init__()
        self.block = block
        self.run = block.forward
        self.products = products

    def checkpointed(self, *args: Any, **options: Any) -> object:
        return checkpoint(self._with, self._tensors(), *args, use_reentrant=False, context_fn=self._contexts, **options)

    def forward(self, *args: object, **options: object) -> object:
        return self.run(*args, **options)

    def _with(self, tensors: dict[str, Tensor], *args: object, **options: object) -> object:
        now = self._tensors()
        changed = {name: tensor for name, tensor in tensors.items() if now[name] is not tensor}
        return functional_call(self, changed, args, options) if changed else self.run(*args, **options)

    def _tensors(self) -> dict[str, Tensor]:
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Return the contexts of the forward pass and of its repetition, with the present gates and attention kernels."""
        outside, gates = recompute_gates()
        kernels = [kernel for kernel, enabled in KERNELS.items() if enabled()]

        def as_now() -> list[AbstractContextManager]:
            # torch runs a backward pass outside the modes around it.
            products = _AttentionByProducts() if self.products else nullcontext()
            return [gates, sdpa_kernel(kernels), products]

        return outside, Repeatable(as_now)


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Run blocks under torch.compile from now on, with static shapes. Blocks of one kind share their code."""
    for block in blocks:
        block.compile(backend=BACKEND, dynamic=False)


def check_compile(objective: nn.Module) -> None:
    """Raise UserError for a method that freezes parameters in turn, and for a CPU without a C++ compiler."""
    if freezes(objective):
        raise UserError(
            "train.compile: the method's schedule freezes parameters in turn, and torch.compile would compile again at every "
            "turn; leave it out."
        )
    on_cpu = not torch.cuda.is_available()
    if on_cpu and BACKEND == "inductor" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), *COMPILERS))):
        raise UserError(f"train.compile: needs a C++ compiler on a CPU ({', '.join(COMPILERS)}), none was found.")


def _kept_buffers() -> AbstractContextManager[object]:
    """Return a context in which a compiled backward pass may run twice (retain_graph), as attacks and balancers need.

    A release of torch without this private setting either allows that, or says in an error how to allow it.
    """
    try:
        import torch._functorch.config as settings
    except ImportError:
        return nullcontext()
    return settings.patch(donated_buffer=False) if hasattr(settings, "donated_buffer") else nullcontext()
