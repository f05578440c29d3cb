"""Three tiny models of four layers, their other parameters, and a training loop driven by LISA."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from helpers.tiny import images, tiny_vit
from vismt.llm import LISA

FAMILIES = ("llama", "gpt2", "vit")
DEPTH, VOCABULARY = 4, 30


@dataclass
class Case:
    """A model, loss(number) of a batch, the path of its stack of layers, and the parameters before and after the stack."""

    model: nn.Module
    loss: Callable[[int], Tensor]
    stack: str
    before: tuple[str, ...]
    after: tuple[str, ...]

    def layers(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.stack).children())

    def outside(self) -> list[nn.Parameter]:
        return [self.model.get_parameter(name) for name in (*self.before, *self.after)]

    def names(self, layer: int) -> list[str]:
        return [name for name, _ in self.model.named_parameters() if name.startswith(f"{self.stack}.{layer}.")]


def case(family: str, seed: int = 0) -> Case:
    if family == "vit":
        model = tiny_vit(seed, depth=DEPTH).train()
        labels = torch.tensor([0, 1, 4])
        return Case(
            model,
            lambda number: nn.functional.cross_entropy(model(images(seed=number)), labels),
            "blocks",
            ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"),
            ("norm.weight", "norm.bias", "head.weight", "head.bias"),
        )
    from helpers.language_models import random_lm

    shape = {"hidden_size": 16, "num_hidden_layers": DEPTH, "intermediate_size": 24, "vocab_size": VOCABULARY}
    if family == "gpt2":
        model = random_lm(family, seed, **shape, max_position_embeddings=16)
        parts = (
            "transformer.h",
            ("transformer.wte.weight", "transformer.wpe.weight"),
            ("transformer.ln_f.weight", "transformer.ln_f.bias"),
        )
    else:
        model = random_lm(family, seed, **shape, tie_word_embeddings=False)
        parts = "model.layers", ("model.embed_tokens.weight",), ("model.norm.weight", "lm_head.weight")
    model.train()

    def loss(number: int) -> Tensor:
        tokens = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(number))
        return model(input_ids=tokens, labels=tokens).loss

    return Case(model, loss, *parts)


def adamw(model: nn.Module, **options: object) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-2, "weight_decay": 0.1, **options})


def train(setup: Case, lisa: LISA, steps: range, set_to_none: bool = True) -> list[float]:
    """Run the usual loop, on_step and then an optimiser step, and return the losses."""
    losses = []
    for step in steps:
        lisa.on_step(step)
        loss = setup.loss(step)
        loss.backward()
        lisa.optimizer.step()
        lisa.optimizer.zero_grad(set_to_none=set_to_none)
        losses.append(loss.item())
    return losses


def numel(parameters: list[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)


# ---- one of two processes: python lisa_parts.py FOLDER, with torchrun's environment ------------------------------------------


def tokens(number: int) -> Tensor:
    return torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(number))


class Objective(nn.Module):
    """The loss of the model on a batch of tokens, as an objective of the engine's loop."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return {"loss": self.model(input_ids=batch, labels=batch).loss}


def steps(model: nn.Module, lisa: LISA, numbers: Callable[[int], list[int]]) -> list[list[int]]:
    """Take six optimiser steps, each on the mean loss of its batches, and return the active layers."""
    active = []
    for step in range(6):
        lisa.on_step(step)
        active.append(lisa.active_layers)
        for number in numbers(step):
            batch = tokens(number)
            (model(input_ids=batch, labels=batch).loss / len(numbers(step))).backward()
        assert all((parameter.grad is None) == (not parameter.requires_grad) for parameter in model.parameters())
        lisa.optimizer.step()
        lisa.optimizer.zero_grad()
    return active


def rank_main(folder: Path) -> None:
    """Train the tiny Llama under DDP, FSDP2 and the engine's loop, and write the results."""
    import numpy as np
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    import vismt
    from vismt.config.sections import TrainConfig
    from vismt.engine import loop, runtime

    dist.init_process_group("gloo")
    rank, results = dist.get_rank(), {}
    np.random.seed(rank)

    def mine(step: int) -> list[int]:
        return [2 * step + rank]

    model = case("llama").model
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    lisa = LISA(wrapped, adamw(wrapped), active=1, interval=2, seed=0)
    results["layers"] = torch.tensor(steps(wrapped, lisa, mine))
    results.update({f"ddp.{name}": value.detach() for name, value in model.named_parameters()})

    wrapped = DistributedDataParallel(case("llama").model)
    try:
        steps(wrapped, LISA(wrapped, adamw(wrapped), active=1, interval=2, seed=0), mine)
    except RuntimeError as error:
        results["refused"] = torch.tensor("find_unused_parameters" in str(error))

    model = case("llama").model
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    lisa = LISA(model, adamw(model), active=1, interval=2, seed=0)
    steps(model, lisa, mine)
    assert set(lisa.optimizer.state) == {parameter for parameter in model.parameters() if parameter.requires_grad}
    results.update({f"fsdp.{name}": value.full_tensor().detach() for name, value in model.named_parameters()})

    model = case("llama").model
    vismt.adapt(model, "lisa", active=1, interval=2, seed=0)
    config = TrainConfig(steps=6, lr=1e-2, weight_decay=0.1, clip=None, checkpoint_every=4)
    loop.train(Objective(model), tokens, config, folder / "run", "hash", runtime.accelerator(), seed=0)
    results.update({f"loop.{name}": value.detach() for name, value in model.named_parameters()})
    torch.save(results, folder / f"{rank}.pt")
    del model, wrapped, lisa
    runtime.leave()


if __name__ == "__main__":
    rank_main(Path(sys.argv[1]))
