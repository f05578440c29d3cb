"""A problem with known losses and gradients for the tests of balancing, and the script of their two-process run."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from vismt.engine.runtime import leave
from vismt.multitask.balancing.base import make_balancer

TASKS = ("depth", "edges", "normals")
STEPS = 4


def matrix(seed=0, tasks=3, size=7, dtype=torch.float64):
    """Return gradients (T, P), some of them in conflict."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, size, generator=generator, dtype=dtype)


def problem(gradients, values=None):
    """Return (losses, parameters): losses with these values, linear in two parameters with these gradients (T, P)."""
    tasks, size = gradients.shape
    parameters = [nn.Parameter(torch.zeros(shape, dtype=gradients.dtype)) for shape in ((2,), (1, size - 2))]
    flat = torch.cat([parameter.flatten() for parameter in parameters])
    values = torch.ones(tasks).tolist() if values is None else values
    names = [TASKS[number] if number < 3 else f"task{number}" for number in range(tasks)]
    return {name: row @ flat + value for name, row, value in zip(names, gradients, values)}, parameters


def direction(balancer, gradients, values=None, keep=None):
    """Return the gradient (P,) of the balancer's result with the tasks in `keep` (None: all) present."""
    losses, parameters = problem(gradients, values)
    losses = {name: loss for name, loss in losses.items() if keep is None or name in keep}
    balancer.combine(losses, parameters).backward()
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters])


class Net(nn.Module):
    """objective((x, targets)) -> scalar: a shared layer, a head for each task, a balancer.

    targets: targets of the first rows of x by task; tasks without targets are absent.
    """

    def __init__(self, method, **options):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.shared = nn.Linear(5, 4, dtype=torch.float64)
        self.heads = nn.ModuleDict({task: nn.Linear(4, 1, dtype=torch.float64) for task in TASKS})
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        self.balancer = make_balancer(method, TASKS, **options)

    def losses(self, batch):
        x, targets = batch
        hidden = self.shared(x).tanh()
        return {task: (self.heads[task](hidden)[: len(y), 0] - y).square().mean() for task, y in targets.items()}

    def forward(self, batch):
        scalar = self.balancer.combine(self.losses(batch), list(self.shared.parameters()))
        # DistributedDataParallel needs every head in every graph.
        return scalar + sum(p.flatten()[:0].sum() for p in self.heads.parameters())


def batch_of(step, rank, lacking=()):
    """Return (x, targets) of a process. lacking: tasks without targets on process 1."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    targets = {task: torch.randn(6, generator=generator, dtype=torch.float64) for task in TASKS}
    return x, {task: y for task, y in targets.items() if rank == 0 or task not in lacking}


def whole_batch(step, lacking=()):
    """Return the concatenated batches of both processes."""
    (x, targets), (more_x, more_targets) = batch_of(step, 0, lacking), batch_of(step, 1, lacking)
    joined = {task: torch.cat([y, more_targets[task]]) if task in more_targets else y for task, y in targets.items()}
    return torch.cat([x, more_x]), joined


def train(net, wrapped, step_batches, accumulate=1):
    """Take STEPS steps of SGD with clipping; return all parameters and buffers."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(STEPS):
        for part in range(accumulate):
            batch = step_batches(step * accumulate + part)
            if part < accumulate - 1 and wrapped is not net:
                with wrapped.no_sync():
                    (wrapped(batch) / accumulate).backward()
            else:
                (wrapped(batch) / accumulate).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in [*net.named_parameters(), *net.named_buffers()]}


CASES = (((), 1), (("edges",), 1), (TASKS, 1), ((), 2))  # (lacking, accumulate)


def run_rank(folder, methods):
    """Train with every method on a process of two, and write the final parameters and buffers."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for method in methods:
        for lacking, accumulate in CASES:
            net = Net(method)
            wrapped = nn.parallel.DistributedDataParallel(net)
            final = train(net, wrapped, lambda step, lacking=lacking: batch_of(step, rank, lacking), accumulate)
            torch.save(final, Path(folder) / f"{method}-{len(lacking)}-{accumulate}-{rank}.pt")
    del net, wrapped
    leave()


if __name__ == "__main__":
    run_rank(sys.argv[1], sys.argv[2].split(","))
