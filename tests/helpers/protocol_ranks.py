"""Evaluate episodes as one of several processes: `python protocol_ranks.py FOLDER`, in the environment of torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from helpers.amt_parts import backbone, drawn
from vismt.base import ranks
from vismt.engine import runtime
from vismt.metatune import EpisodeSampler, ProtoNet, run_protocol
from vismt.robustness.attacks.attacks import AttackSpec

LABELS = torch.arange(6).repeat_interleave(8)


class Pixels:
    """Images that count how often they are read."""

    key = "gratings"

    def __init__(self) -> None:
        self.images, self.reads = drawn(LABELS, 3), 0

    def __getitem__(self, index: Tensor) -> Tensor:
        self.reads += 1
        return self.images[index]


def evaluate(records: Path, pixels: Pixels, episodes: int = 11, panel: Path | None = None) -> dict[str, Tensor]:
    """Run the protocol under an attack that packs episodes."""
    net = ProtoNet(backbone().requires_grad_(False)).requires_grad_(False).eval()
    sampler = EpisodeSampler(LABELS, ways=3, shots=2, queries=4, seed=1)
    spec = AttackSpec("pgd", 8 / 255, steps=2)
    return run_protocol(
        net, pixels, sampler, episodes=episodes, attacks=[spec], records=records, panel=panel, probabilities=True
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    rank = runtime.processes().process_index
    pixels = Pixels()
    with ranks.shared():
        result = evaluate(folder / "shared.jsonl", pixels, panel=folder / "panel.npz")
        first, names = pixels.reads, list(result)
        result |= {f"again {name}": values for name, values in evaluate(folder / "shared.jsonl", pixels, 19).items()}
    if rank == 0:
        result |= {f"alone {name}": values for name, values in evaluate(folder / "alone.jsonl", pixels).items()}
        torch.save(torch.tensor([first, pixels.reads]), folder / "reads.pt")
    else:
        result |= {f"alone {name}": result[name] for name in names}
    torch.save(result, folder / f"{rank}.pt")
    runtime.leave()
