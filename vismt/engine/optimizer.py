"""The optimiser of a training, with its groups by rate and weight decay, and the schedule of its rate."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from vismt.base.errors import UserError, near
from vismt.config.sections import TrainConfig

OPTIMIZERS = ("adamw", "sgd")


def with_own_prior(objective: nn.Module) -> set[str]:
    """Return the names of parameters in modules with `own_prior`. Their loss has a prior, and weight decay would add a second."""
    modules = [(path, module) for path, module in objective.named_modules() if getattr(module, "own_prior", False)]
    return {name for path, module in modules for name, _ in module.named_parameters(path)}


def make_optimizer(parameters: Mapping[str, Tensor], config: TrainConfig, undecayed: Collection[str] = ()) -> Optimizer:
    """Return AdamW, or SGD with momentum, with a group for each learning rate, with and without weight decay.

    undecayed: Names of matrices without weight decay. Raise UserError for a pattern of train.rates that is not a regular
    expression or matches no name.
    """
    groups: dict[tuple[float, bool], list[Tensor]] = {}
    matched = {name: next((key for key in config.rates if _search(key, name)), "") for name in parameters}
    for name, parameter in parameters.items():
        decays = parameter.ndim > 1 and name not in undecayed
        groups.setdefault((config.rates.get(matched[name], 1.0), decays), []).append(parameter)
    for pattern in config.rates:
        if pattern not in matched.values():
            near_names = near(pattern, parameters)
            raise UserError(f"train.rates or tune.fixed: '{pattern}' is found in no trained parameter.{near_names}")
    settings = [
        {"params": group, "lr": config.lr * factor, "weight_decay": config.weight_decay if decays else 0.0}
        for (factor, decays), group in groups.items()
    ]
    if config.optimizer == "sgd":
        return SGD(settings, lr=config.lr, momentum=config.momentum)
    return AdamW(settings, lr=config.lr)


def _search(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error as error:
        raise UserError(f"train.rates: '{pattern}' is not a regular expression ({error}).") from error


def make_schedule(optimizer: Optimizer, config: TrainConfig, updates: int) -> LambdaLR:
    """Return the schedule of the rate after a number of updates."""
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return LambdaLR(optimizer, lambda step: rate(step, config) / config.lr, updates - 1)


def rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of step 0, 1, ...: linear over `warmup` steps to lr, a half cosine to min_lr, then `cooldown`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    share = (step - config.warmup) / max(1, config.steps - config.warmup - config.cooldown)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
