"""Training under FSDP2, as `accelerate launch` with fsdp_version 2 asks for it: each process holds a part of every weight.

A copy of the objective is sharded by torch's fully_shard, block by block, and trained instead of the objective. The objective
stays whole on the CPU and gets the trained values at every checkpoint. Checkpoints and adapters are therefore the same files as
in any other training, and one process or several may continue, sharded or not. torch.distributed.checkpoint would write the
parts without gathering them, but its reader unpickles the index of a checkpoint, which can run code.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vismt.base.errors import UserError
from vismt.config.sections import TrainConfig
from vismt.engine.blocks import find_blocks
from vismt.engine.checkpoint import moving_state
from vismt.lowrank.model.record import RECORD
from vismt.lowrank.tensors import part_like, whole


def check_sharded(objective: nn.Module, config: TrainConfig) -> None:
    """Raise UserError for an objective with a part that needs whole weights, and for options that FSDP excludes."""
    reasons = [reason for module in objective.modules() if (reason := getattr(module, "not_sharded", ""))]
    if config.compile:
        reasons.append("train.compile compiles blocks that hold whole weights; set it to false")
    if config.precision == "fp16":
        reasons.append("train.precision: the gradient scale of fp16 is not shared among parts; take bf16")
    if reasons:
        raise UserError(f"FSDP: {reasons[0]}; or launch without FSDP.")


class Shards:
    """The sharded copy of an objective that is whole on the CPU, and its optimiser on the device of this process.

    optimizer: Optimiser of the objective, with the state to start from. It takes no step. make: Function that returns an
    optimiser of another module.
    """

    def __init__(
        self, objective: nn.Module, optimizer: Optimizer, make: Callable[[nn.Module], Optimizer], device: torch.device
    ) -> None:
        self.objective = objective
        self.kept = optimizer
        for value in moving_state(objective).values():  # equal on all processes, as DistributedDataParallel makes them
            sent = value.to(device).contiguous()
            torch.distributed.broadcast(sent, 0)
            value.copy_(sent)
        self.module = _sharded_copy(objective, device)
        self.optimizer = make(self.module)
        for kept, parameter in self._pairs():
            for key, value in optimizer.state.get(kept, {}).items():
                self.optimizer.state[parameter][key] = part_like(value, parameter) if value.ndim else value

    @torch.no_grad()
    def gather(self) -> None:
        """Copy the trained values and the optimiser's state into the whole objective. All processes call it together."""
        trained = {parameter for group in self.optimizer.param_groups for parameter in group["params"]}
        values = {name: whole(value).cpu() for name, value in moving_state(self.module, trained).items()}
        self.objective.load_state_dict(values, strict=False)
        self.kept.state.clear()
        for kept, parameter in self._pairs():
            state = {key: whole(value) for key, value in self.optimizer.state.get(parameter, {}).items()}
            if state and torch.distributed.get_rank() == 0:  # this process writes the checkpoint
                self.kept.state[kept] = {key: value.cpu() for key, value in state.items()}

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return each parameter of the whole objective with its part in the copy."""
        parts = dict(self.module.named_parameters())
        return [(parameter, parts[name]) for name, parameter in self.objective.named_parameters()]


def _sharded_copy(objective: nn.Module, device: torch.device) -> nn.Module:
    """Return a copy of the modules with sharded parameters. Tensors on the CPU are shared until their part is taken."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    own = list(objective.parameters())
    whole_ones = [nn.Parameter(parameter.detach().contiguous(), parameter.requires_grad) for parameter in own]
    shared: dict[int, object] = {id(parameter): copied for parameter, copied in zip(own, whole_ones)}
    for module in objective.modules():  # originals for undoing an adaptation, which training does not change
        for name, value in vars(module).items():
            if name == RECORD or isinstance(value, Tensor):
                shared.setdefault(id(value), value)
    twin = copy.deepcopy(objective, shared)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for block in find_blocks(twin):
        fully_shard(block, mesh=mesh)
    fully_shard(twin, mesh=mesh)
    for parameter in whole_ones:  # the objective's other attributes may refer to them
        parameter.data = parameter.data.new_empty(0)
    return twin
