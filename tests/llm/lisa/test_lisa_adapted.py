"""LISA as a method: its record, the training loop under its schedule, files, unadapt, several processes."""

from __future__ import annotations

import copy
import pickle
import warnings
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from helpers.checkpoints import saved_tensors
from helpers.lisa_parts import DEPTH, FAMILIES, Objective, adamw, case, steps, tokens, train
from helpers.ranks import of_two
from helpers.tiny import holds, images, shake, snapshot, tiny_vit
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.config.sections import TrainConfig
from vismt.engine import loop, runtime
from vismt.engine.optimizer import make_optimizer, rate
from vismt.llm import LISA
from vismt.lowrank.model import record
from vismt.lowrank.model.record import record_of
from vismt.methods import schedules


def lisa_of(model: nn.Module) -> LISA:
    """Return the schedule of an adapted model, on an AdamW optimiser."""
    (lisa,) = schedules(model, adamw(model), steps=6)
    return lisa


# ---- adapt, merge, unadapt -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_adapted_trained_merged_and_undone(family: str, tmp_path: Path) -> None:
    setup = case(family)
    original = snapshot(setup.model)
    flags = {name: p.requires_grad for name, p in setup.model.named_parameters()}
    report = vismt.adapt(setup.model, "lisa", active=1, interval=2, seed=1)
    parameters = list(setup.model.parameters())
    assert report.trainable == report.total == sum(p.numel() for p in parameters)
    assert "1 of 4 layers at a time" in str(report) and "0 modules" not in str(report)
    assert all(p.requires_grad for p in parameters) and not any(".lora_" in name for name in setup.model.state_dict())
    losses = train(setup, lisa_of(setup.model), range(6))
    by_hand = case(family)
    assert losses == train(by_hand, LISA(by_hand.model, adamw(by_hand.model), active=1, interval=2, seed=1), range(6))
    trained = snapshot(setup.model)
    twin = copy.deepcopy(setup.model)
    assert vismt.merge(setup.model) is setup.model and holds(setup.model, trained)
    assert record_of(setup.model) is None and flags == {
        name: p.requires_grad for name, p in setup.model.named_parameters()
    }
    vismt.unadapt(twin)
    assert holds(twin, original)
    assert flags == {name: p.requires_grad for name, p in twin.named_parameters()}


def test_training_without_the_schedule_is_warned_of() -> None:
    model = tiny_vit()
    vismt.adapt(model, "lisa", active=1)
    with pytest.warns(
        UserWarning, match=r"LISA: 2 of 2 layers train at once, and 1 should, because no schedule"
    ) as said:
        model(images()).sum().backward()
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2):
            LISA(model, adamw(model), active=1, interval=1, cover=True).on_step(step)
            model(images()).sum().backward()
        vismt.unadapt(model)
        model(images()).sum().backward()


@pytest.mark.parametrize("where", ["memory", "file"])
def test_originals_outlive_any_change_copies_and_pickles(monkeypatch, where: str) -> None:
    monkeypatch.setattr(record, "IN_MEMORY", 0 if where == "file" else 2**26)
    model = tiny_vit()
    original = snapshot(model)
    vismt.adapt(model, "lisa", active=1)
    originals = model.vismt_record.also_train
    pointers = {value.untyped_storage().data_ptr() for value in originals.values()}
    assert (len(pointers) == 1) == (where == "file")  # one mapped file for all of them
    shake(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        assert not torch.equal(twin.head.weight, original["head.weight"])
        assert holds(vismt.unadapt(twin), original)


def test_large_originals_lie_in_a_file_that_is_gone_when_they_are(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record, "IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tensors = {
        "odd": torch.arange(3, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "matrix": torch.randn(4, 5).t(),
        "none": torch.empty(0),
        "double": torch.randn(3, dtype=torch.float64),
        "meta": torch.empty(2, device="meta"),
    }
    stored = record.backup_tensors(tensors)
    assert not list(tmp_path.iterdir())  # the file has been unlinked
    assert stored.pop("meta").is_meta
    for name, value in stored.items():
        assert value.dtype == tensors[name].dtype and torch.equal(value, tensors[name]), name
    stored["odd"].fill_(7)
    assert torch.equal(stored["double"], tensors["double"]) and torch.equal(
        tensors["odd"], torch.arange(3, dtype=torch.bfloat16)
    )
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"no room for .* of original weights in .*missing.*Point TMPDIR"):
        record.backup_tensors(tensors)


def test_what_is_excluded_stays_frozen_and_is_not_kept() -> None:
    model = tiny_vit(depth=DEPTH)
    vismt.adapt(model, "lisa", active=1, train_embeddings=False, exclude="blocks.0")
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == set(model.vismt_record.also_train)
    assert not any(name.startswith(("blocks.0.", "patch_embed", "cls_token", "pos_embed")) for name in names)
    assert {"head.weight", "norm.weight", "blocks.1.norm1.weight"} <= names


def test_no_is_said_clearly(tmp_path: Path) -> None:
    model = tiny_vit()
    before = snapshot(model)
    for options, message in (
        ({"targets": ["fc1"]}, "'lisa', which trains whole layers: set layers"),
        ({"alpha": 2.0}, "leave alpha out"),
        ({"active": 3}, "from 0 to 2"),
        ({"layer": "blocks"}, "'lisa' has no option 'layer'.*'layers'"),
    ):
        with pytest.raises(UserError, match=message):
            vismt.adapt(model, "lisa", **options)
        assert record_of(model) is None and holds(model, before)
    vismt.adapt(model, "lisa", active=1)
    with pytest.raises(UserError, match="already carries 'lisa'"):
        vismt.adapt(model, "lora")
    with pytest.raises(UserError, match="'lisa' has no low-rank factors; merge"):
        vismt.export_peft(model, tmp_path)


# ---- files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_file_holds_what_changed_and_nothing_else(family: str, tmp_path: Path) -> None:
    import safetensors.torch

    setup = case(family)
    vismt.adapt(setup.model, "lisa", active=1, interval=5, seed=1)
    lisa = lisa_of(setup.model)
    train(setup, lisa, range(2))
    vismt.save_adapter(setup.model, tmp_path / "a")
    (file,) = (tmp_path / "a").glob("*.safetensors")
    assert set(safetensors.torch.load_file(file)) == {*setup.before, *setup.after, *setup.names(lisa.active_layers[0])}
    stock = case(family)
    vismt.load_adapter(stock.model, tmp_path / "a")
    assert holds(stock.model, setup.model.state_dict())
    # The schedule is loaded too, so training can continue.
    again = lisa_of(stock.model)
    assert again.state_dict() == lisa.state_dict()
    # Into a model with other changes: parameters that are not in the file return to the original.
    other = case(family)
    vismt.adapt(other.model, "lisa", active=2)
    shake(other.model)
    vismt.load_adapter(other.model, tmp_path / "a")
    assert holds(other.model, setup.model.state_dict())
    for model in (stock.model, other.model):
        assert holds(vismt.unadapt(model), case(family).model.state_dict())


def test_another_base_or_a_damaged_description_is_refused(tmp_path: Path) -> None:
    setup = case("vit")
    vismt.adapt(setup.model, "lisa", active=1)
    train(setup, lisa_of(setup.model), range(2))
    vismt.save_adapter(setup.model, tmp_path)
    other = case("vit", seed=5).model
    before = snapshot(other)
    with pytest.raises(UserError, match="Load the base it was trained on"):
        vismt.load_adapter(other, tmp_path)
    assert record_of(other) is None and holds(other, before)
    shallow = case("vit").model
    del shallow.blocks[3]
    with pytest.raises(UserError, match=r"this model has no parameter 'blocks\.3\."):
        vismt.load_adapter(shallow, tmp_path)
    text = (tmp_path / "adapter.json").read_text()
    (tmp_path / "adapter.json").write_text(text.replace('"unchanged": [', '"unchanged": ["blocks", '))
    with pytest.raises(UserError, match="was changed after it was written"):
        vismt.load_adapter(case("vit").model, tmp_path)


# ---- the training loop -----------------------------------------------------------------------------------------------


def run(folder: Path, stop_after: int | None = None, **options: object) -> nn.Module:
    model = case("gpt2").model
    vismt.adapt(model, "lisa", **{"active": 1, "interval": 3, "seed": 2, **options})

    def after(_: nn.Module, step: int) -> None:
        if step == stop_after:
            raise KeyboardInterrupt

    config = TrainConfig(steps=9, lr=1e-2, weight_decay=0.1, clip=1.0, warmup=2, checkpoint_every=2)
    loop.train(Objective(model), tokens, config, folder, "hash", runtime.accelerator(), seed=1, after_step=after)
    return model


@cache
def undisturbed(policy: str) -> nn.Module:
    with TemporaryDirectory() as folder:
        return run(Path(folder), state_policy=policy)


@pytest.mark.parametrize("policy", ["drop", "keep", "reset_all"])
@pytest.mark.parametrize(
    "cut", [3, 5, 8]
)  # resumes after steps 2, 4 and 6: within an interval, after a switch, at a switch
def test_the_loop_drives_the_schedule_and_resumes_bit_for_bit(tmp_path: Path, policy: str, cut: int) -> None:
    whole = undisturbed(policy)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_after=cut, state_policy=policy)
    saved = saved_tensors(tmp_path / "cut")
    assert set(saved) >= {f"model.{name}" for name, _ in whole.named_parameters()}  # frozen layers have moved before
    resumed = run(tmp_path / "cut", state_policy=policy)
    assert holds(resumed, whole.state_dict())


def test_the_loop_is_the_usual_loop_with_on_step(tmp_path: Path) -> None:
    """The same steps by hand: layers and Adam states of each interval, learning rate and clipping of the loop."""
    trained = run(tmp_path)
    model = case("gpt2").model
    config = TrainConfig(steps=9, lr=1e-2, weight_decay=0.1, clip=1.0, warmup=2)
    optimizer = make_optimizer(dict(model.named_parameters()), config)
    lisa = LISA(model, optimizer, active=1, interval=3, seed=2)
    for step in range(9):
        lisa.on_step(step)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, config)
        Objective(model)(tokens(step))["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert holds(trained, model.state_dict())
    plain = case("gpt2").model
    loop.train(
        Objective(plain),
        tokens,
        TrainConfig(steps=9, lr=1e-2, weight_decay=0.1, clip=1.0, warmup=2),
        tmp_path / "full",
        "hash",
        runtime.accelerator(),
        seed=1,
    )
    assert not holds(trained, plain.state_dict())


def test_an_adapted_part_of_an_objective_is_found(tmp_path: Path) -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit, self.scale = tiny_vit(depth=DEPTH), nn.Parameter(torch.ones(()))

        def forward(self, number: Tensor) -> dict[str, Tensor]:
            return {"loss": (self.scale * self.vit(images(seed=int(number)))).square().mean()}

    objective = Classifier()
    vismt.adapt(objective.vit, "lisa", active=1, interval=4)
    before = snapshot(objective)
    config = TrainConfig(steps=3, lr=1e-2)
    loop.train(objective, torch.tensor, config, tmp_path, "hash", runtime.accelerator(), seed=1)
    moved = {name for name, value in objective.named_parameters() if not torch.equal(value, before[name])}
    blocks = {name.split(".")[2] for name in moved if name.startswith("vit.blocks.")}
    assert len(blocks) == 1 and {"scale", "vit.cls_token", "vit.head.weight"} <= moved


# ---- several processes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_are_one_on_both_batches(tmp_path: Path) -> None:
    """DDP, FSDP2 and the engine's loop over gloo draw the same layers on both ranks and reach the weights of one process."""
    results = of_two("lisa_parts.py", tmp_path)
    alone = case("llama").model
    active = steps(
        alone, LISA(alone, adamw(alone), active=1, interval=2, seed=0), lambda step: [2 * step, 2 * step + 1]
    )
    assert results[0]["layers"].tolist() == active and results[0]["refused"]
    assert len({tuple(layers) for layers in active}) > 1
    for name, value in alone.named_parameters():
        for kind in ("ddp", "fsdp"):
            assert torch.allclose(results[0][f"{kind}.{name}"], value, atol=1e-4), (kind, name)


def test_the_blocks_of_all_stages_of_a_resnet_are_drawn() -> None:
    """Its last stage has most of the weights; as the only stack, both of its blocks and all other stages would always train."""
    model = ResNet(BasicBlock, [1, 2, 2, 2], num_classes=3, channels=(4, 8, 16, 32), stem_width=4)
    report = vismt.adapt(model, "lisa")
    assert "2 of 7 layers at a time" in str(report)
    outside = {name for name in record_of(model).also_train if not name.startswith("layer")}
    assert outside == {"conv1.weight", "bn1.weight", "bn1.bias", "fc.weight", "fc.bias"}
    lisa, drawn = lisa_of(model), set()
    for step in range(0, 400, 20):
        lisa.on_step(step)
        awake = {name[:8] for name, p in model.named_parameters() if p.requires_grad and name.startswith("layer")}
        assert len(awake) == 2  # layer1.0, layer2.1, ...
        drawn |= {block[:6] for block in awake}
    assert drawn == {"layer1", "layer2", "layer3", "layer4"}
