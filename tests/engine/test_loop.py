"""The training loop: exact resume, schedule, accumulation, and the stop on a loss that is not finite."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers.checkpoints import saved_tensors
from helpers.error_ranks import Weighed, rows_of, weighed
from helpers.toy_training import logged, train
from torch import Tensor, nn

from vismt.base.errors import Diverged, UserError
from vismt.config.sections import RunConfig, TrainConfig
from vismt.config.typed import build
from vismt.engine import loop, runtime
from vismt.engine.log import MetricsLog
from vismt.engine.optimizer import make_optimizer, rate
from vismt.storage.lines import read_lines, write_lines


class Toy(nn.Module):
    """A regression with dropout, so that the random state matters."""

    def __init__(self, bad_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.frozen = nn.Linear(4, 1), nn.Linear(4, 4).requires_grad_(False)
        self.calls, self.bad_at = 0, bad_at

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        hidden = nn.functional.dropout(self.frozen(batch["x"]), 0.3, self.training)
        loss = (self.layer(hidden) - batch["y"]).square().mean()
        if self.calls == self.bad_at:
            loss = loss * float("nan")
        return {"loss": loss, "size": torch.tensor(float(len(batch["x"])))}


def batches(number: int) -> dict[str, Tensor]:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
    return {"x": x, "y": x.sum(1, keepdim=True)}


def run(folder: Path, objective: Toy | None = None, **settings: object) -> Toy:
    settings = {"steps": 8, "lr": 0.05, "warmup": 2, "checkpoint_every": 3, **settings}
    return train(objective or Toy(), batches, folder, **settings)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path, optimizer: str, workers: int) -> None:
    whole = run(tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_after=5, optimizer=optimizer, workers=workers)
    torch.manual_seed(99)
    cut = run(tmp_path / "cut", optimizer=optimizer, workers=workers)
    assert cut.calls == 8 - 3
    for one, two in zip(whole.parameters(), cut.parameters()):
        assert torch.equal(one, two)
    rows = [logged(tmp_path / name) for name in ("whole", "cut")]
    assert rows[0] == rows[1] and [row["step"] for row in rows[1]] == list(range(1, 9))
    assert set(rows[0][0]) == {"step", "loss", "size", "lr", "grad_norm"}


def test_dropout_follows_the_seed_and_leaves_the_random_state_alone(tmp_path: Path) -> None:
    one, two, other = (run(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2)))
    assert torch.equal(one.layer.weight, two.layer.weight) and not torch.equal(one.layer.weight, other.layer.weight)
    toy = Toy()
    state = torch.get_rng_state()
    loop.train(toy, batches, TrainConfig(steps=2), tmp_path / "d", "hash", runtime.accelerator(), seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_resumed_processes_draw_numbers_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []

    def stop(_: nn.Module, step: int) -> None:
        states.append((step, torch.get_rng_state()))
        raise KeyboardInterrupt

    config = TrainConfig(steps=8, lr=0.05, warmup=2, checkpoint_every=3)
    for index in (0, 1):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / str(index), stop_after=5)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Accelerator, "process_index", property(lambda self, index=index: index))
            accelerator = runtime.accelerator()
            loop.train(Toy(), batches, config, tmp_path / str(index), "hash", accelerator, seed=1, after_step=stop)
    assert [step for step, _ in states] == [4, 4] and not torch.equal(states[0][1], states[1][1])


def test_buffers_and_extra_state_are_resumed_frozen_tensors_are_not_kept(tmp_path: Path) -> None:
    class Counting(Toy):
        """Counts its steps in a buffer, and by it scales the loss."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.int64))
            self.register_buffer("scratch", torch.zeros(2), persistent=False)

        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            self.count += 1
            return {"loss": super().forward(batch)["loss"] * self.count}

    whole = run(tmp_path / "whole", Counting())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", Counting(), stop_after=5)
    kept = saved_tensors(tmp_path / "cut")
    assert set(kept) == {"layer.weight", "layer.bias", "count"} and int(kept["count"]) == 3
    cut = run(tmp_path / "cut", Counting())
    assert int(cut.count) == 8 and torch.equal(whole.layer.weight, cut.layer.weight)


def test_rates_and_decay_by_name() -> None:
    toy = Toy()
    named = {name: value for name, value in toy.named_parameters() if value.requires_grad}
    made = make_optimizer(named, TrainConfig(lr=0.1, weight_decay=0.5, rates={"^layer[.]w": 10.0, "layer": 0.5}))
    seen = {tuple(group["params"][0].shape): (group["lr"], group["weight_decay"]) for group in made.param_groups}
    # The first pattern that fits counts; a bias is not decayed.
    assert seen == {(1, 4): (1.0, 0.5), (1,): (0.05, 0.0)}
    for rates, told in (
        ({"head": 1.0}, "'head' is found in no trained parameter"),
        ({"(": 1.0}, "is not a regular expression"),
    ):
        with pytest.raises(UserError, match=told):
            make_optimizer(named, TrainConfig(rates=rates))


def test_a_module_with_its_own_prior_is_not_decayed(tmp_path: Path) -> None:
    weights = []
    for number, (own, decay) in enumerate(((True, 0.5), (False, 0.5), (False, 0.0))):
        toy = Toy()
        toy.layer.own_prior = own
        weights.append(run(tmp_path / str(number), toy, weight_decay=decay).layer.weight)
    assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[1], weights[2])


def test_a_factor_of_the_rate_holds_at_every_step(tmp_path: Path) -> None:
    """With SGD a step is rate * gradient: ten times the rate is the same as ten times the loss."""

    class Scaled(Toy):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"loss": self.factor * (self.layer(batch["x"]) - batch["y"]).square().mean()}

    weights = []
    for factor, rates in ((1.0, {"layer": 10.0}), (10.0, {}), (1.0, {})):
        toy = Scaled()
        toy.factor = factor
        folder, settings = tmp_path / f"{len(weights)}", {"optimizer": "sgd", "lr": 1e-3, "momentum": 0.0, "clip": None}
        weights.append(run(folder, toy, rates=rates, **settings).layer.weight)
    assert torch.allclose(weights[0], weights[1]) and not torch.allclose(weights[0], weights[2])
    assert (
        read_lines(tmp_path / "0" / "metrics.jsonl")[3]["lr"] == read_lines(tmp_path / "2" / "metrics.jsonl")[3]["lr"]
    )


def test_a_finished_run_trains_no_further(tmp_path: Path) -> None:
    first = run(tmp_path)
    again = run(tmp_path)
    assert again.calls == 0 and torch.equal(first.layer.weight, again.layer.weight)


def test_learning_rate_golden_numbers() -> None:
    config = TrainConfig(steps=10, lr=1.0, min_lr=0.2, warmup=2)
    # warm-up: 1/2, 2/2. Cosine over the 8 steps that remain: step 6 is half way, 0.2 + 0.8 * 0.5 * (1 + cos(pi / 2)) = 0.6.
    assert [rate(step, config) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert rate(6, config) == pytest.approx(0.6) and rate(10, config) == pytest.approx(0.2)
    # Four steps of cool-down leave four for the cosine: step 4 is half way, from step 6 on it is min_lr.
    config.cooldown = 4
    assert [rate(step, config) for step in (4, 6, 7, 9)] == pytest.approx([0.6, 0.2, 0.2, 0.2])


def test_accumulation_is_the_mean_over_its_batches(tmp_path: Path) -> None:
    class Plain(Toy):
        def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"loss": (self.layer(batch["x"]) - batch["y"]).square().mean()}

    one = run(tmp_path, Plain(), steps=1, accumulate=2, optimizer="sgd", momentum=0.0, clip=None, warmup=0)
    model = Plain()
    losses = [model(batches(number))["loss"] for number in (0, 1)]
    (sum(losses) / 2).backward()
    assert torch.allclose(one.layer.weight, model.layer.weight - 0.05 * model.layer.weight.grad)


def test_no_steps_leave_the_start_as_it_is(tmp_path: Path) -> None:
    start = Toy()
    before = [value.clone() for value in start.parameters()]
    untrained = run(tmp_path, start, steps=0, warmup=0)
    assert untrained.calls == 0 and all(torch.equal(a, b) for a, b in zip(before, untrained.parameters()))
    assert not list(tmp_path.glob("checkpoint*"))


@pytest.mark.parametrize("sizes", [(2, 40), (1, 1, 7)])
def test_batches_of_a_step_weigh_by_their_examples(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    parts = rows_of(*sizes)
    several, one = weighed(tmp_path / "several", parts), weighed(tmp_path / "one", [torch.cat(parts)])
    assert torch.allclose(several, one, rtol=1e-5) and one.abs().min() > 0.01
    logged = [read_lines(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("several", "one")]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_batches_of_two_processes_weigh_by_the_examples_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = (rows_of(2, 3), rows_of(40, 9))
    mean_count = torch.tensor([5.0, 49.0]).mean()
    trained = []
    with monkeypatch.context() as patched:
        # The processes run one after the other. The count is all that the forward passes share.
        patched.setattr(Accelerator, "reduce", lambda self, value, how: mean_count if value.numel() == 1 else value)
        for process, parts in enumerate(shares):
            objective = Weighed()
            training = loop._Training(
                objective,
                parts.__getitem__,
                TrainConfig(steps=1, lr=0.1, optimizer="sgd", momentum=0, clip=None, warmup=0, accumulate=2),
                tmp_path / str(process),
                "hash",
                runtime.accelerator(),
                None,
            )
            training._update()
            trained.append(objective.weight.detach())
    one = weighed(tmp_path / "one", [torch.cat([*shares[0], *shares[1]])])
    # SGD takes the mean of the gradients over the processes, so the mean of the weights.
    assert torch.allclose(sum(trained) / 2, one, rtol=1e-5) and one.abs().min() > 0.01


class Shared(nn.Module):
    """A shared parameter with a gradient of length 5 and a head with one of 12,000."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.shared, self.head = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
        self.clipped = [self.shared] if alone else None

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": 3 * self.shared[0] + 4 * self.shared[1] + 12000 * self.head.sum()}


def test_the_objective_names_what_is_clipped(tmp_path: Path) -> None:
    for alone, moved, of_head in ((True, 1.0, 12000.0), (False, 5 / 12000, 1.0)):
        folder = tmp_path / str(alone)
        objective = run(folder, Shared(alone), steps=1, optimizer="sgd", momentum=0.0, clip=1.0, warmup=0, lr=1.0)
        assert objective.shared.norm().item() == pytest.approx(moved, rel=1e-4)
        assert objective.head.abs().item() == pytest.approx(of_head, rel=1e-4)
        assert read_lines(folder / "metrics.jsonl")[0]["grad_norm"] == pytest.approx(12000, rel=1e-4)  # of all


def test_clipping_bounds_the_step_and_logs_the_norm_before(tmp_path: Path) -> None:
    start = Toy().layer.weight.detach().clone()
    moved = run(tmp_path, steps=1, optimizer="sgd", momentum=0.0, clip=1e-3, warmup=0)
    # lr 0.05 times a gradient of norm at most 1e-3
    assert (moved.layer.weight - start).norm() <= 0.05 * 1e-3 + 1e-7
    assert read_lines(tmp_path / "metrics.jsonl")[0]["grad_norm"] > 1e-2


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_loss_that_is_not_finite_stops_at_its_step_and_keeps_the_checkpoint(tmp_path: Path, log_every: int) -> None:
    with pytest.raises(UserError, match=r"not finite at step 5; the last good checkpoint is kept in .*checkpoint-3-"):
        run(tmp_path, Toy(bad_at=5), log_every=log_every)
    assert all(torch.isfinite(value).all() for value in saved_tensors(tmp_path).values())
    with pytest.raises(UserError, match="no checkpoint had been written"):
        run(tmp_path / "early", Toy(bad_at=1))


def test_the_step_that_is_not_finite_is_that_of_any_process(tmp_path: Path) -> None:
    gathered = SimpleNamespace(gather=lambda _: torch.tensor([0.0, 7.0]))
    training = SimpleNamespace(accelerator=gathered, first_bad=torch.zeros(()), folder=tmp_path)
    with pytest.raises(Diverged, match="not finite at step 7"):
        loop._Training._need_finite(training)


@pytest.mark.parametrize(
    "settings,match",
    [
        ({"optimizer": "adam"}, "'adam'.*'adamw'"),
        ({"steps": -1}, r"train\.steps is -1"),
        ({"lr": 0.0}, r"train\.lr"),
        ({"clip": -1.0}, r"train\.clip"),
        ({"momentum": -1.0}, r"train\.momentum"),
        ({"weight_decay": -1.0}, r"train\.weight_decay"),
        ({"accumulate": 0}, r"train\.accumulate"),
    ],
)
def test_impossible_settings_are_named(settings: dict, match: str) -> None:
    with pytest.raises(UserError, match=match):
        build(RunConfig, {"train": settings}, "f.yaml")


def test_precision_that_the_machine_lacks_is_named() -> None:
    with pytest.raises(UserError, match=r"fp16 needs a GPU|^$"):
        if torch.cuda.is_available():
            raise UserError("")
        runtime.accelerator("fp16")
    with pytest.raises(UserError, match=r"'bf61'.*'bf16'"):
        runtime.accelerator("bf61")


def test_nothing_to_train_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is trainable"):
        run(tmp_path, Toy().requires_grad_(False))


def test_log_drops_a_torn_line_and_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_lines(path, [{"step": step, "elapsed_s": 2.0 * step} for step in (1, 2, 3)])
    path.write_text(path.read_text() + '{"step": 4, "el')
    log = MetricsLog(tmp_path, 2, 2, True)
    assert [row["step"] for row in read_lines(path)] == [1, 2] and log.elapsed_s == 4.0
    log.add({"step": 3, "loss": float("inf")})
    log.sync()
    assert read_lines(path)[-1] == {"step": 3, "loss": None}


def test_the_next_batch_is_prepared_while_the_last_one_is_used():
    from threading import Event, current_thread, main_thread

    from vismt.engine.stream import prepared_ahead

    begun = {number: Event() for number in range(4)}

    def batches(number):
        assert current_thread() is not main_thread()
        begun[number].set()
        if number == 3:
            raise ValueError("batch 3")
        return number

    stream = prepared_ahead(batches, range(1, 4))
    assert not begun[1].is_set()
    assert next(stream) == 1 and begun[2].wait(10)
    assert next(stream) == 2 and begun[3].wait(10) and not begun[0].is_set()
    with pytest.raises(ValueError, match="batch 3"):
        next(stream)
