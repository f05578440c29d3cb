"""AMT's step and task, reimplemented after the released code: the reference of `python -m scripts.bench amt`.

Same maths as vismt.metatune.amt.objective (support="clean", KL(clean || adv), both factors at once) and
vismt.metatune.amt.merging: same loss, gradients, zeta and prototypes. The differences are which operations run, and how often:

    layers   W_res is stored; B A x by two further products, in a fused qkv by forming the (3d, d) update in every forward
    step     a deep copy of the model; the clean logits again, with their graph, in every attack step; the two query
             branches separately: 8 query and 1 support forwards, 2 + 1 + 1 backwards at two attack steps
    task     a deep copy of the pool and a reload of its state; for each expert a copy of every weight, the merge, two
             support forwards, always, and the merge undone

As in vismt, so that only these differences are compared: timm's ViT, fp32, pixels in [0, 1], seeded draws, and weights
moved in a way that leaves the support's graph valid (the release's in-place change is an error outside of autocast).
Source: github.com/xyang583/AMT, one commit.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.backbones.vit import Backbone
from vismt.base.seeds import mix_seed
from vismt.lowrank.layers.base import adapter_layers
from vismt.metatune.amt.objective import Adversary
from vismt.metatune.amt.pool import ExpertPool
from vismt.metatune.amt.selection_rules import MergeSettings
from vismt.metatune.finetuning.diffaugment import diff_augment
from vismt.metatune.protonet import ProtoNet, cosine_logits, prototypes

TINY = 1e-20


class ReleasedLinear(nn.Module):
    """x -> W_res x + b + s B A x, A (g*r, i), B (o, r); with g > 1 blocks of outputs the update is formed as a matrix."""

    def __init__(self, residual: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(residual.clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().clone())
        self.scale, self.groups = scale, groups
        self.rows = torch.ones(len(residual), dtype=torch.bool)

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight, self.bias)
        if self.groups == 1:
            out += x @ self.lora_A.t() @ self.lora_B.t() * self.scale
        else:
            out += x @ grouped(self.lora_A, self.lora_B, self.groups, self.rows).t() * self.scale
        return out


class ReleasedPoolLinear(nn.Module):
    """A linear layer with W_res and every expert's factors, of which `merge` adds some to W_res."""

    def __init__(
        self, residual: Tensor, bias: Tensor | None, factors: list[tuple[Tensor, Tensor]], scale: float, groups: int
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(residual.clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.lora_A = nn.ParameterList([nn.Parameter(A.clone(), requires_grad=False) for A, _ in factors])
        self.lora_B = nn.ParameterList([nn.Parameter(B.clone(), requires_grad=False) for _, B in factors])
        self.scale, self.groups = scale, groups
        self.rows = torch.ones(len(residual), dtype=torch.bool)
        self.residual: nn.Parameter | None = None  # W_res while experts are merged

    def merge(self, experts: list[int], gates: Tensor) -> None:
        """Set the weight to W_res + sum of gate * s B A, with a copy of W_res."""
        self.residual = copy.deepcopy(self.weight)
        for expert, gate in zip(experts, gates):
            A, B = self.lora_A[expert], self.lora_B[expert]
            update = B @ A if self.groups == 1 else grouped(A, B, self.groups, self.rows)
            self.weight.data += gate * (update * self.scale)

    def unmerge(self) -> None:
        self.weight.data.copy_(self.residual)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def grouped(A: Tensor, B: Tensor, groups: int, rows: Tensor) -> Tensor:
    """Return (o, i): row block j is B_j A_j, by a grouped convolution over A's channels, scattered to the adapted rows."""
    update = F.conv1d(A[None], B[:, :, None], groups=groups)[0]
    whole = update.new_zeros(len(rows), update.shape[1])
    whole[rows.to(whole.device)] = update
    return whole


def released_net(net: ProtoNet) -> ProtoNet:
    """Return a copy of an adapted `net` with layers in the release's layout; factors and scale alone are trainable."""
    twin = copy.deepcopy(net)
    for path, layer in adapter_layers(twin.backbone).items():
        residual = layer.matrix(layer.weight).detach()
        if layer.lora_A0 is not None:
            pairs = zip(layer.lora_B0.split(layer.blocks, 0), layer.lora_A0.chunk(len(layer.blocks)))
            residual = residual - layer.scale * torch.cat([B @ A for B, A in pairs])
        released = ReleasedLinear(residual, layer.bias, layer.lora_A, layer.lora_B, layer.scale, len(layer.blocks))
        _replace(twin.backbone, path, released)
    return twin


def train_step(
    net: ProtoNet, optimiser: torch.optim.Optimizer, batch: Mapping[str, Tensor], adversary: Adversary
) -> Tensor:
    """Train on an episode (see AdversarialObjective) and return the loss, (); gradients stay in `.grad`."""
    truth, query, labels = batch["support_labels"], batch["query"], batch["query_labels"]
    proxy = copy.deepcopy(net)
    ascent = torch.optim.SGD(proxy.parameters(), lr=adversary.gamma)
    support = net.backbone(batch["support"])
    attacked = _attack(net, query, support, truth, adversary, int(batch["number"]))

    proxy.load_state_dict(net.state_dict())
    ascent.zero_grad()
    (-_loss(proxy, support.detach(), truth, query, attacked, labels, adversary.weight)).backward()
    ascent.step()
    nu = _directions(net, proxy)

    _move(net, nu, adversary.gamma)
    loss = _loss(net, support, truth, query, attacked, labels, adversary.weight)
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()
    _move(net, nu, -adversary.gamma)
    return loss.detach()


def _query(net: ProtoNet, support: Tensor, truth: Tensor, images: Tensor) -> Tensor:
    return cosine_logits(net.backbone(images), prototypes(support, truth), net.scale)


def _loss(
    net: ProtoNet, support: Tensor, truth: Tensor, query: Tensor, attacked: Tensor, labels: Tensor, weight: float
) -> Tensor:
    clean, adversarial = _query(net, support, truth, query), _query(net, support, truth, attacked)
    distance = F.kl_div(adversarial.log_softmax(1), clean.softmax(1), reduction="batchmean")
    return F.cross_entropy(clean, labels) + weight * distance


def _attack(net: ProtoNet, query: Tensor, support: Tensor, truth: Tensor, adversary: Adversary, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(mix_seed(adversary.seed, "attack", number))
    drawn = int(torch.randint(len(adversary.epsilons), (1,), generator=generator))
    epsilon = adversary.epsilons[drawn]
    deltas = []
    for cells, _ in adversary.pyramid:
        side = cells or query.shape[-1]
        start = torch.rand(*query.shape[:2], side, side, generator=generator)
        deltas.append((epsilon * (2 * start - 1)).to(query).requires_grad_(True))
    for _ in range(adversary.steps):
        adversarial = _query(net, support, truth, _compose(query, deltas, adversary))
        clean = _query(net, support, truth, query)
        distance = F.kl_div(adversarial.log_softmax(1), clean.softmax(1), reduction="sum")
        for delta, slope in zip(deltas, torch.autograd.grad(distance, deltas)):
            delta.data = (delta + adversary.step_ratio * epsilon * slope.sign()).clamp(-epsilon, epsilon).detach()
    return _compose(query, [delta.detach() for delta in deltas], adversary)


def _compose(images: Tensor, deltas: list[Tensor], adversary: Adversary) -> Tensor:
    """Move each cell of the images by its delta, clamped after every level; the side must be a multiple of the cells."""
    for delta, (_, multiplier) in zip(deltas, adversary.pyramid):
        side = images.shape[-1] // delta.shape[-1]
        cells = images.unflatten(3, (-1, side)).unflatten(2, (-1, side)) + multiplier * delta[:, :, :, None, :, None]
        images = cells.flatten(4).flatten(2, 3).clamp(0, 1)
    return images


@torch.no_grad()
def _directions(net: ProtoNet, proxy: ProtoNet) -> dict[str, Tensor]:
    """Return ||w|| / ||moved - w|| * (moved - w) of every factor."""
    start, moved = net.state_dict(), proxy.state_dict()
    changes = {name: moved[name] - weight for name, weight in start.items() if "lora" in name and weight.ndim > 1}
    return {name: start[name].norm() / (change.norm() + TINY) * change for name, change in changes.items()}


def _move(net: ProtoNet, nu: Mapping[str, Tensor], size: float) -> None:
    for name, parameter in net.named_parameters():
        if name in nu:
            parameter.data = parameter.data + size * nu[name]  # new storage: the support's graph keeps the old one


class ReleasedPool(nn.Module):
    """A backbone of `ReleasedPoolLinear` layers, and a copy of its state."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.saved = copy.deepcopy(backbone.state_dict())


def released_pool(pool: ExpertPool, rank: int) -> ReleasedPool:
    """Return the pool's backbone with W_res and the experts' factors in each adapted linear layer; rank: of a block's factors."""
    twin = copy.deepcopy(pool.backbone)
    for path in pool.paths:
        base = twin.vit.get_submodule(path)
        experts = [update.low_rank[path] for update in pool.updates]
        start = experts.pop() if len(experts) > len(pool) else None
        residual = base.weight.detach() if start is None else base.weight.detach() + start.delta()
        groups = experts[0].rank // rank
        factors = [(expert.A, _stacked(expert.B, groups)) for expert in experts]
        _replace(twin.vit, path, ReleasedPoolLinear(residual, base.bias, factors, experts[0].scale, groups))
    return ReleasedPool(twin)


def _stacked(diagonal: Tensor, groups: int) -> Tensor:
    """Return the blocks (o, r) of a block-diagonal factor (o, g*r)."""
    blocks = zip(diagonal.chunk(groups), range(groups))
    return torch.cat([rows.chunk(groups, 1)[number] for rows, number in blocks])


@torch.no_grad()
def task(pool: ReleasedPool, support: Tensor, labels: Tensor, settings: MergeSettings) -> tuple[Tensor, Tensor]:
    """Return zeta (P,) of a test task and the prototypes (N, d) under it; `pool` is not changed."""
    pool = copy.deepcopy(pool)
    net = pool.backbone
    net.load_state_dict(pool.saved)
    layers = [module for module in net.modules() if isinstance(module, ReleasedPoolLinear)]
    scored = support
    if settings.augment:
        scored = diff_augment(support, torch.Generator().manual_seed(settings.seed), mean=net.mean, std=net.std)
    members = F.one_hot(labels)
    shots, ways = members.sum(0), members.shape[1]
    scores = []
    for expert in range(len(layers[0].lora_A)):
        for layer in layers:
            layer.merge([expert], torch.ones(1, device=support.device))
        centres = prototypes(net(support), labels)
        cosines = cosine_logits(net(scored), centres, 1.0)
        compactness = (members.T.to(cosines) @ (cosines * members) / shots[:, None]).sum() / ways
        divergence = (members.T.to(cosines) @ (cosines * (1 - members) / (ways - 1)) / shots[:, None]).sum() / ways
        scores.append(settings.balance * compactness - (1 - settings.balance) * divergence)
        for layer in layers:
            layer.unmerge()
    weights = (settings.beta * (torch.stack(scores) - 1)).exp()
    gates, experts = weights.topk(settings.top_k)
    gates = gates / gates.sum()
    for layer in layers:
        layer.merge(experts.tolist(), gates)
    zeta = torch.zeros_like(weights).index_copy(0, experts, gates)
    return zeta, prototypes(net(support), labels)


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
