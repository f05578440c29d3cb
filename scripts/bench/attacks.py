"""`python -m scripts.bench attacks`: AutoAttack and the few-shot PGD protocol, against torchattacks and other packages.

AutoAttack of linf 8/255 at its published lengths (APGD-CE 100 steps, APGD-T and FAB-T 100 steps x 9 targets, Square 5,000
queries) on two small ViTs (16 px patterns of 10 classes, 48 wide, 3 blocks, 16 images): one trained without attacks, which
breaks at once, one trained against them, of whose images about half survive. torchattacks: its own classes at these lengths.
"as packages work" runs our own attacks in the order of the authors' package: attack, target and restart one after the other
on all images that the earlier ones left, each to its end; Square alone leaves out what it has broken.

The protocol: 5-way 5-shot episodes with 15 queries a class of a prototype classifier on a random ViT, PGD-10 of step epsilon
/ 10 on every query. "vismt 0.1" attacks the queries of one episode after the other with torchattacks.PGD.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.bench.timing import Ratios, interleave
from vismt.backbones.vit import Backbone
from vismt.base import console
from vismt.metatune.protocol.episodes import EpisodeSampler
from vismt.metatune.protocol.protocol import run_protocol
from vismt.metatune.protonet import ProtoNet
from vismt.robustness.attacks.active_set import Outcome, Wave
from vismt.robustness.attacks.attacks import TARGETS, AttackSpec, _parts, _rounds, _trial, robust_accuracy
from vismt.robustness.attacks.foreign import attack_class
from vismt.robustness.attacks.victim import Victim, frozen

SIZE, CLASSES, IMAGES, EPSILON = 16, 10, 16, 8 / 255
STEPS, BATCH = 250, 32  # of training
QUERIES, EPISODES = 5000, 16
VISMT, TORCHATTACKS, IN_TURN, OLD = "vismt", "torchattacks", "as packages work", "vismt 0.1"


def run(rounds: int = 9, device: str = "cpu") -> list[Ratios]:
    """Time AutoAttack on both ViTs and the protocol. A quarter of the rounds is spent on the robust ViT, without warm-up."""
    where = torch.device(device)
    return [
        autoattack(False, rounds, where),
        autoattack(True, max(1, rounds // 4), where),
        protocol(rounds, where),
    ]


def autoattack(robust: bool, rounds: int, device: torch.device) -> Ratios:
    """Time AutoAttack on the ViT that was trained with or without attacks."""
    net = trained(robust, device)
    images, labels = (part.to(device) for part in patterns(IMAGES, 1))
    spec = AttackSpec("autoattack", EPSILON)
    candidates: dict[str, Callable[[], Tensor]] = {
        VISMT: lambda: robust_accuracy(net, images, labels, [spec], num_classes=CLASSES),
        TORCHATTACKS: lambda: by_torchattacks(net, images, labels, spec),
        IN_TURN: lambda: in_turn(net, images, labels, spec),
    }
    left: dict[str, int] = {}

    def counted(name: str) -> Callable[[], None]:
        return lambda: left.update({name: int(candidates[name]().sum())})

    clean = int((net(images).argmax(1) == labels).sum())
    label = f"AutoAttack linf 8/255, {'robust' if robust else 'non-robust'} ViT"
    calls = {name: counted(name) for name in candidates}
    timing = interleave(calls, rounds, label=label, device=device, warmup=0 if robust else 1)
    outcome = ", ".join(f"{name} {count}" for name, count in left.items())
    targets = [(VISMT, TORCHATTACKS, 0.4), (VISMT, IN_TURN, 0.8)]
    return Ratios(f"{label}; of {clean} right images survive: {outcome}", timing, targets)


def patterns(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return images (count, 3, SIZE, SIZE) in [0, 1] of class patterns whose contrast differs from image to image, and labels."""
    generator = torch.Generator().manual_seed(seed)
    means = (torch.rand(CLASSES, 3, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5).sign()
    means = means.repeat_interleave(SIZE // 4, 2).repeat_interleave(SIZE // 4, 3)
    labels = torch.arange(count) % CLASSES
    contrast = 0.02 + 0.1 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = 0.02 * torch.randn(count, 3, SIZE, SIZE, generator=generator)
    return (0.5 + contrast * means[labels] + noise).clamp(0, 1), labels


def small_vit(num_classes: int) -> nn.Module:
    """Return a random ViT of 16 px images."""
    import timm

    torch.manual_seed(0)
    shape = {"img_size": SIZE, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **shape)


class _Centred(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net((images - 0.5) / 0.1)


def trained(robust: bool, device: torch.device) -> nn.Module:
    """Return a ViT trained on patterns; a robust one against single-step attacks whose radius grows to EPSILON."""
    net = _Centred(small_vit(CLASSES)).to(device)
    images, labels = (part.to(device) for part in patterns(1000, 0))
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(STEPS if robust else STEPS // 5):
        chosen = torch.randint(len(images), (BATCH,), generator=generator).to(device)
        batch, answers = images[chosen], labels[chosen]
        if robust:
            radius = EPSILON * min(1.0, 2 * step / STEPS)
            start = radius * (2 * torch.rand(batch.shape, generator=generator) - 1).to(device)
            leaf = (batch + start).requires_grad_(True)
            (slope,) = torch.autograd.grad(F.cross_entropy(net(leaf), answers), leaf)
            batch = batch + (start + 1.25 * radius * slope.sign()).clamp(-radius, radius)
        optimiser.zero_grad()
        F.cross_entropy(net(batch.clamp(0, 1)), answers).backward()
        optimiser.step()
    return net.eval()


def by_torchattacks(net: nn.Module, images: Tensor, labels: Tensor, spec: AttackSpec) -> Tensor:
    """Return which images withstand the parts of torchattacks' AutoAttack, each on the images that the earlier ones left."""
    options = {"norm": spec.norm.capitalize(), "eps": spec.epsilon, "n_restarts": 1}
    attacks = [
        attack_class("APGD")(net, steps=spec.length, loss="ce", **options),
        attack_class("APGDT")(net, steps=spec.length, n_classes=TARGETS + 1, **options),
        attack_class("FAB")(net, steps=spec.length, multi_targeted=True, n_classes=TARGETS + 1, **options),
        attack_class("Square")(net, n_queries=QUERIES, **options),
    ]
    left = _right(net, images, labels)
    for attack in attacks:
        rows = left.nonzero().flatten()
        if len(rows):
            left[rows] = _right(net, attack(images[rows], labels[rows]), labels[rows])
    return left


class _WholeWave(Wave):
    """A wave whose trials all run to their end."""

    def settle(self, images: Tensor, logits: Tensor, inside: Tensor | None = None) -> None:
        wrong = logits.argmax(1) != self.labels
        self.outcome.broken[self.rows] |= wrong if inside is None else wrong & inside


def in_turn(net: nn.Module, images: Tensor, labels: Tensor, spec: AttackSpec) -> Tensor:
    """Return which images withstand our attacks run one target and restart after the other, on all that the last one left."""
    with frozen(net):
        victim = Victim(net, CLASSES, str(spec))
        outcome = Outcome.start(victim, images, labels, range(len(images)), len(images), exhaust=False)
        for part in _parts(spec, CLASSES):
            kind = Wave if part.name == "square" else _WholeWave
            for single in _rounds(part, CLASSES):
                rows = (~outcome.broken).nonzero().flatten()
                if len(rows):
                    _trial(part)(victim, kind(outcome, rows, [single], part.name, fill=1))
    return ~outcome.broken


@torch.no_grad()
def _right(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return net(images).argmax(1) == labels


def protocol(rounds: int, device: torch.device) -> Ratios:
    """Time the few-shot PGD protocol."""
    net = prototypes(device)
    images, labels = patterns(CLASSES * 40, 2)
    sampler = EpisodeSampler(labels, ways=5, shots=5, queries=15, seed=0)
    spec = AttackSpec("pgd_paper", EPSILON)
    accuracy: dict[str, float] = {}

    def packed() -> None:
        with console.quiet():
            result = run_protocol(net, images, sampler, episodes=EPISODES, attacks=[spec])
        accuracy["clean"], accuracy[VISMT] = float(result["clean"].mean()), float(result[str(spec)].mean())

    def single() -> None:
        right = [episode[1] for episode in one_by_one(net, images, sampler, spec, device)]
        accuracy[OLD] = float(torch.cat(right).double().mean())

    label = "PGD-10 protocol, 5-way 5-shot"
    timing = interleave({VISMT: packed, OLD: single}, rounds, label=label, device=device)
    outcome = ", ".join(f"{name} {100 * value:.1f}" for name, value in accuracy.items())
    return Ratios(f"{label}, {EPISODES} episodes; accuracy in %: {outcome}", timing, [(VISMT, OLD, 0.5)])


def prototypes(device: torch.device) -> ProtoNet:
    """Return a few-shot model on a random ViT."""
    return ProtoNet(Backbone(small_vit(0), mean=(0.5,) * 3, std=(0.1,) * 3)).to(device).eval()


def one_by_one(
    net: ProtoNet, images: Tensor, sampler: EpisodeSampler, spec: AttackSpec, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield which queries of each episode are right when clean and under attack, as version 0.1 found them."""
    options = {"eps": spec.epsilon, "alpha": spec.step, "steps": spec.length}
    for index in range(EPISODES):
        episode = sampler[index]
        support, query = images[episode.support].to(device), images[episode.query].to(device)
        labels = episode.query_labels.to(device)
        classifier = net.classifier(support, episode.support_labels.to(device)).eval()
        attacked = attack_class("PGD")(classifier, **options)(query, labels)
        yield _right(classifier, query, labels), _right(classifier, attacked, labels)
