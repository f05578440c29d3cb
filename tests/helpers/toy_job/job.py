"""The toy job: an adapted two-layer net and a head that is always trained."""

from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from helpers.toy_job.config import ToyConfig, check
from vismt.engine import training_files
from vismt.engine.study import Training
from vismt.jobs.training_job import TrainingJob
from vismt.robustness.conditions import AttackConfig
from vismt.storage.files import atomic_write
from vismt.uncertainty.intervals import CLEAN, Measure, Score

HEAD = "head.safetensors"


def pairs(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Return numbers (count, 2), and for each pair the place of the larger one."""
    numbers = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return numbers, numbers.argmax(1)


class ToyNet(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        torch.manual_seed(config.seed)
        activation = nn.ReLU() if config.activation == "relu" else nn.GELU()
        self.stock = nn.Sequential(nn.Linear(2, 16), activation, nn.Linear(16, 16))
        self.head = nn.Linear(16, 2)

    def forward(self, numbers: Tensor) -> Tensor:
        return self.head(self.stock(numbers))


class ToyObjective(nn.Module):
    def __init__(self, net: ToyNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.net(batch[0]), batch[1])}


class ToyJob(TrainingJob[ToyConfig, ToyNet]):
    def __init__(self, config: ToyConfig, folder: Path, config_hash: str) -> None:
        check(config)
        super().__init__(config, folder, config_hash)

    def check_data(self) -> None:
        pass  # pairs can always be drawn

    def skeleton(self, config: ToyConfig) -> nn.Module:
        return ToyNet(config).stock

    def fresh(self, config: ToyConfig) -> ToyNet:
        return ToyNet(config)

    def heads(self, net: ToyNet) -> nn.Module:
        return net.head

    def objective(self, config: ToyConfig, net: ToyNet, balanced: Sequence[Tensor]) -> nn.Module:
        return ToyObjective(net)

    def batches(self, config: ToyConfig):
        return lambda number: pairs(1000 * config.seed + number, config.batch)

    def save(self, net: ToyNet, config: ToyConfig, folder: Path) -> None:
        atomic_write(folder / HEAD, safetensors.torch.save(training_files.state(net.head)))

    def loaded(self, training: Training) -> ToyNet:
        net = self.fresh(self.study.config_of(training))
        what = training_files.restore(net.stock, training)
        training_files.load_state(net.head, training.folder / HEAD, what)
        return net

    @torch.no_grad()
    def score(self, training: Training, split: str, attacks: Sequence[AttackConfig] | None) -> list[Score]:
        numbers, larger = pairs(-1 if split == "test" else -2, self.config.evaluate.examples)
        right = (self.final(training)(numbers).argmax(1) == larger).double().tolist()
        measure = Measure("accuracy", {f"pair {i}": value for i, value in enumerate(right)}, chance=0.5)
        return [Score("larger", "pairs", "one of 2 numbers", measure, CLEAN, "pairs")]


JOB = ToyJob
