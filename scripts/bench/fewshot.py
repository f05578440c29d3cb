"""`python -m scripts.bench fewshot`: The few-shot protocol, against a plain loop over episodes as in easyfsl and P>M>F.

5-way 5-shot episodes with 15 queries a class on 1,000 digits at 48 px (10 tokens): clean with a random ViT-Ti/16, whose forward
pass is short, so that all other work of the protocol counts, and attacked with a random ViT-S/16. The plain loop runs the
backbone on support and queries of every episode; under attack it runs every step of PGD-10 on all queries, one episode after
another. Both read the same decoded images. "vismt" starts with an empty cache folder in every round, "vismt, next run"
with the features of an earlier run. The clean accuracies of all episodes must be equal, else the benchmark ends with an error.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scripts.bench.timing import Ratios, interleave
from vismt.backbones.timm_models import create
from vismt.base import console
from vismt.base.errors import UserError
from vismt.data.images import open_images
from vismt.data.pixels import Pixels
from vismt.metatune.protocol.episodes import EpisodeSampler
from vismt.metatune.protocol.protocol import run_protocol
from vismt.metatune.protonet import ProtoNet, cosine_logits
from vismt.robustness.attacks.attacks import AttackSpec

CLEAN, MODEL, SIZE, IMAGES = "vit_tiny_patch16_224", "vit_small_patch16_224", 48, 1000
EPISODES = {100: 0.15, 600: 0.05}  # clean ones, and the aim; each image once is 0.10 and 0.017 of the loop
ATTACKED = 8
VISMT, AGAIN, LOOP = "vismt", "vismt, next run", "plain loop"
SPEC = AttackSpec("pgd_paper", 4.5 / 255, random_start=False)


def run(rounds: int = 9, device: str = "cpu") -> list[Ratios]:
    """Time clean episodes, in at most 3 rounds, and attacked ones."""
    where = torch.device(device)
    clean, attacked = (FewShotBench(create(name, SIZE), where) for name in (CLEAN, MODEL))
    found = [clean.clean(episodes, min(rounds, 3), aim) for episodes, aim in EPISODES.items()]
    return [*found, attacked.attacked(ATTACKED, rounds)]


class FewShotBench:
    """The benchmark on one backbone."""

    def __init__(self, backbone: nn.Module, device: torch.device, size: int = SIZE) -> None:
        self.net = ProtoNet(backbone).to(device).requires_grad_(False).eval()
        self.device = device
        self.pixels = Pixels(open_images("digits").take(range(IMAGES)), size, cache=False)
        self.sampler = EpisodeSampler(self.pixels.labels, ways=5, shots=5, queries=15, seed=0)

    def clean(self, episodes: int, rounds: int, aim: float) -> Ratios:
        found: dict[str, Tensor] = {}

        def protocol(name: str, folder: str) -> None:
            with console.quiet(), mock.patch.dict(os.environ, VISMT_CACHE=folder):
                found[name] = run_protocol(self.net, self.pixels, self.sampler, episodes=episodes)["clean"]

        def fresh() -> None:
            with tempfile.TemporaryDirectory() as folder:
                protocol(VISMT, folder)

        def loop() -> None:
            right = [clean for clean, _ in self.plain(episodes, attack=False)]
            found[LOOP] = torch.stack(right).double().mean(1)

        with tempfile.TemporaryDirectory() as kept:
            protocol(AGAIN, kept)
            calls: dict[str, Callable[[], None]] = {VISMT: fresh, AGAIN: lambda: protocol(AGAIN, kept), LOOP: loop}
            timing = interleave(calls, rounds, label="clean episodes", device=self.device, warmup=0)
        different = [name for name in (VISMT, AGAIN) if not torch.equal(found[name], found[LOOP])]
        if different and self.device.type == "cpu":
            raise UserError(f"bench fewshot: {different[0]} and {LOOP} have other accuracies; the ratio means nothing.")
        title = f"{episodes} clean episodes, accuracies equal" if not different else f"{episodes} clean episodes"
        return Ratios(title, timing, [(VISMT, LOOP, aim), (AGAIN, LOOP, aim)])

    def attacked(self, episodes: int, rounds: int) -> Ratios:
        accuracy: dict[str, float] = {}

        def protocol() -> None:
            with (
                tempfile.TemporaryDirectory() as folder,
                mock.patch.dict(os.environ, VISMT_CACHE=folder),
                console.quiet(),
            ):
                result = run_protocol(self.net, self.pixels, self.sampler, episodes=episodes, attacks=[SPEC])
            accuracy[VISMT] = float(result[str(SPEC)].mean())

        def loop() -> None:
            right = [clean & attacked for clean, attacked in self.plain(episodes, attack=True)]
            accuracy[LOOP] = float(torch.stack(right).double().mean())

        timing = interleave({VISMT: protocol, LOOP: loop}, rounds, label="attacked episodes", device=self.device)
        outcome = ", ".join(f"{name} {100 * value:.1f}" for name, value in accuracy.items())
        return Ratios(f"{episodes} episodes under {SPEC}; accuracy in %: {outcome}", timing, [(VISMT, LOOP, 0.5)])

    def plain(self, episodes: int, *, attack: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield which queries (m,) of each episode are right when clean and, with `attack`, after PGD."""
        backbone = self.net.backbone
        for index in range(episodes):
            episode = self.sampler[index]
            support, query = (self.pixels[rows].to(self.device) for rows in (episode.support, episode.query))
            labels, truth = (part.to(self.device) for part in (episode.support_labels, episode.query_labels))
            with torch.no_grad():
                features = backbone(support)
                centres = torch.stack([features[labels == way].mean(0) for way in range(episode.ways)])
                clean = cosine_logits(backbone(query), centres, self.net.scale).argmax(1) == truth
            if not attack:
                yield clean.cpu(), clean.cpu()
                continue
            changed = query
            for _ in range(SPEC.length):
                leaf = changed.detach().requires_grad_(True)
                loss = F.cross_entropy(cosine_logits(backbone(leaf), centres, self.net.scale), truth)
                (slope,) = torch.autograd.grad(loss, leaf)
                moved = leaf.detach() + SPEC.step * slope.sign()
                changed = (query + (moved - query).clamp(-SPEC.epsilon, SPEC.epsilon)).clamp(0, 1)
            with torch.no_grad():
                wrong = cosine_logits(backbone(changed), centres, self.net.scale).argmax(1) != truth
            yield clean.cpu(), ~wrong.cpu()
