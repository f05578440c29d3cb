"""The dense net and its objective: one forward for all tasks, partial labels, weights, balancing, retaining, several batches."""

from __future__ import annotations

import pytest
import torch
from helpers.tiny import images, tiny_vit
from torch import nn

from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError
from vismt.data.maps.dense_sample import collate
from vismt.multitask.balancing.base import make_balancer
from vismt.multitask.emtal.retain import QualityRetaining
from vismt.multitask.heads import make_map_head, make_pooled_head, resize_logits
from vismt.multitask.nets import DenseNet, Union, check_blocks, default_blocks
from vismt.multitask.objectives import WHOLE_IMAGES, MultitaskObjective
from vismt.multitask.tasks import make_task

MEAN = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
TASKS = [make_task({"name": "semseg", "classes": 4, "loss_weight": 2.0}), make_task("depth"), make_task("edge")]


def net(tasks=TASKS, seed: int = 0) -> DenseNet:
    """Return a net for images of 16 x 24, with a grid of 4 x 6."""
    backbone = Backbone(tiny_vit(seed, num_classes=0, img_size=(16, 24)), **MEAN)
    return DenseNet(backbone, {task.name: make_map_head("linear", [32, 32], task.channels) for task in tasks}, [0, 1])


def batch(count: int = 3, **without: tuple[int, ...]) -> dict:
    """Return a batch of samples of 16 x 24; `semseg=(0, 2)` leaves out that target of samples 0 and 2."""
    generator = torch.Generator().manual_seed(count)
    pictures = images(count, 24)[:, :, :16]
    samples = [
        {
            "image": pictures[i],
            "semseg": torch.randint(0, 4, (16, 24), generator=generator),
            "edge": torch.randint(0, 2, (16, 24), generator=generator),
            "depth": 1 + torch.rand(16, 24, generator=generator),
        }
        for i in range(count)
    ]
    return collate(
        [{k: v for k, v in sample.items() if i not in without.get(k, ())} for i, sample in enumerate(samples)]
    )


def test_one_forward_of_the_backbone_gives_every_head_its_taps() -> None:
    model = net()
    calls: list[torch.Size] = []
    model.backbone.vit.patch_embed.register_forward_hook(lambda module, inputs, out: calls.append(inputs[0].shape))
    logits = model(batch()["image"])
    assert {task: tuple(value.shape) for task, value in logits.items()} == {
        "semseg": (3, 4, 4, 6),
        "depth": (3, 1, 4, 6),
        "edge": (3, 1, 4, 6),
    }
    assert calls == [(3, 3, 16, 24)]
    taps = model.backbone.maps(batch()["image"], [0, 1])
    assert torch.equal(logits["depth"], model.heads["depth"](taps))
    assert not torch.allclose(logits["depth"], model.heads["depth"](taps[::-1]))


def test_the_loss_is_the_weighted_sum_of_the_tasks() -> None:
    model, data = net(), batch()
    scalars = MultitaskObjective(model, TASKS)(data)
    logits = model(data["image"])
    losses = {task.name: task.loss(resize_logits(logits[task.name], (16, 24)), data[task.key]) for task in TASKS}
    for name, value in losses.items():
        assert float(scalars[name]) == pytest.approx(value.item(), rel=1e-6)
    assert scalars["loss"].item() == pytest.approx(
        (2 * losses["semseg"] + losses["depth"] + 50 * losses["edge"]).item(), rel=1e-6
    )
    assert not scalars["depth"].requires_grad and scalars["loss"].requires_grad


@pytest.mark.parametrize("how", ["no key", "blank"])
@pytest.mark.parametrize("balancing", [None, "ew", "fairgrad"])
def test_an_absent_task_is_left_out_and_its_head_stays_in_the_graph(how: str, balancing: str | None) -> None:
    model = net()
    data = batch(depth=(0, 1, 2)) if how == "no key" else {**batch(), "depth": torch.zeros(3, 16, 24)}
    balancer = make_balancer(balancing, [task.name for task in TASKS]) if balancing else None
    objective = MultitaskObjective(model, TASKS, balancer=balancer, balanced=list(model.backbone.vit.parameters()))
    with torch.no_grad():
        model.heads["depth"].predict.bias.fill_(torch.inf)  # must not affect the loss
    scalars = objective(data)
    scalars["loss"].backward()
    assert scalars["depth"].isnan() and scalars["semseg"].isfinite() and scalars["loss"].isfinite()
    idle = [parameter.grad for parameter in model.heads["depth"].parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in idle)
    assert all(bool(p.grad.any()) for name in ("semseg", "edge") for p in model.heads[name].parameters())


def test_a_batch_without_any_label_has_a_loss_of_zero() -> None:
    model = net()
    data = {"image": batch()["image"]}
    retain = QualityRetaining(4)
    objective = MultitaskObjective(model, TASKS, retain={"semseg": retain})
    scalars = objective(data)
    scalars["loss"].backward()
    objective.step()
    assert float(scalars["loss"].detach()) == 0 and scalars["semseg"].isnan() and not bool(retain.bank.any())
    assert all(parameter.grad is not None for parameter in model.heads.parameters())


def test_a_sample_without_labels_moves_no_loss() -> None:
    whole, partial = batch(3), batch(3, depth=(1,))
    partial["image"] = partial["image"].clone()
    changed = {**partial, "image": torch.where(torch.arange(3)[:, None, None, None] == 1, 0.0, partial["image"])}
    model = net()
    depth, other, of_all = (MultitaskObjective(model, TASKS)(data)["depth"] for data in (partial, changed, whole))
    assert torch.allclose(depth, other) and not torch.allclose(depth, of_all)


def test_equal_weighting_is_the_sum_and_balancers_get_their_parameters() -> None:
    data, plain, balanced = batch(), net(), net()
    MultitaskObjective(plain, TASKS)(data)["loss"].backward()
    shared = list(balanced.backbone.vit.parameters())
    scalars = MultitaskObjective(
        balanced, TASKS, balancer=make_balancer("ew", [t.name for t in TASKS]), balanced=shared
    )(data)
    scalars["loss"].backward()
    assert {"weight/semseg", "weight/depth", "weight/edge"} <= set(scalars)
    pairs = zip(plain.named_parameters(), balanced.parameters())
    assert all(
        torch.allclose(first.grad, second.grad, atol=1e-6) for (_, first), second in pairs if first.grad is not None
    )


def test_retaining_sees_the_heads_own_logits_of_all_batches_of_a_step() -> None:
    model, retain, alone = net(), QualityRetaining(4), QualityRetaining(4)
    objective = MultitaskObjective(model, TASKS, retain={"semseg": retain})
    first, second = batch(3), batch(2)
    scalars = [objective(first), objective(second)]
    assert not bool(retain.bank.any())
    objective.step()
    logits = [model(data["image"])["semseg"].detach() for data in (first, second)]
    pull = alone.loss(logits[0], first["semseg"])
    assert float(scalars[0]["retain"]) == pytest.approx(pull.item(), rel=1e-5)
    alone.update(torch.cat(logits), torch.cat([first["semseg"], second["semseg"]]))
    assert torch.allclose(retain.bank, alone.bank) and torch.allclose(retain.ema, alone.ema)
    plain = MultitaskObjective(model, TASKS)(first)["loss"]
    assert scalars[0]["loss"].item() == pytest.approx((plain + pull).item(), rel=1e-5)
    objective(batch(1, semseg=(0,)))
    objective.step()  # a step without a labelled image does not change the bank
    assert torch.allclose(retain.bank, alone.bank)


def test_retaining_adds_its_gradient_to_the_balanced_one() -> None:
    model, data, retain = net(), batch(), QualityRetaining(4)
    shared = list(model.backbone.vit.parameters())
    found = []
    for own in (None, {"semseg": retain}):
        model.zero_grad()
        balancer = make_balancer("fairgrad", [task.name for task in TASKS])
        MultitaskObjective(model, TASKS, balancer=balancer, balanced=shared, retain=own)(data)["loss"].backward()
        found.append(model.heads["semseg"].predict.weight.grad.clone())
    pull = retain.loss(model(data["image"])["semseg"], data["semseg"])
    (expected,) = torch.autograd.grad(pull, model.heads["semseg"].predict.weight)
    assert bool(expected.any()) and torch.allclose(found[1] - found[0], expected, atol=1e-5)


def test_famo_is_updated_with_the_weighted_losses_after_the_step() -> None:
    model, data = net(), batch(2)
    shared = list(model.backbone.vit.parameters())
    balancer = make_balancer("famo", [task.name for task in TASKS])
    objective = MultitaskObjective(model, TASKS, balancer=balancer, balanced=shared)
    losses = objective.losses(data)
    scalars = objective(data)
    for task in TASKS:
        assert losses[task.name].item() == pytest.approx(task.loss_weight * float(scalars[task.name]), rel=1e-5)
    distances = balancer.before.exp()
    assert distances.tolist() == pytest.approx([losses[name].item() for name in balancer.tasks], rel=1e-4)
    objective.step()
    assert int(balancer.updates) == 1 and balancer.before.isnan().all()


def test_state_of_all_parts_is_saved() -> None:
    objective = MultitaskObjective(
        net(),
        TASKS,
        balancer=make_balancer("dwa", [t.name for t in TASKS]),
        balanced=[nn.Parameter(torch.zeros(1))],
        retain={"semseg": QualityRetaining(4)},
    )
    assert {"retain.semseg.bank", "retain.semseg.ema", "balancer.calls"} <= set(objective.state_dict())


def test_taps_are_spread_evenly() -> None:
    assert default_blocks(12) == [2, 5, 8, 11] and default_blocks(24) == [5, 11, 17, 23]
    assert default_blocks(6) == [1, 2, 4, 5] and default_blocks(2) == [0, 0, 1, 1]
    assert check_blocks([2, -1], 12) == [2, 11]


def test_errors() -> None:
    model = net()
    for blocks in ([], [0], [1, 0], [0, 2], [-3, 1]):
        with pytest.raises(UserError, match="name blocks from 0 to 1"):
            check_blocks(blocks, 2)
    with pytest.raises(UserError, match="no head"):
        DenseNet(model.backbone, {}, [0, 1])
    with pytest.raises(UserError, match=r"takes taps of widths \[32\], the net has \[32, 32\]"):
        DenseNet(model.backbone, {"depth": make_map_head("linear", [32], 1)}, [0, 1])
    with pytest.raises(UserError, match="must be the same"):
        MultitaskObjective(model, TASKS[:2])


def test_classes_of_whole_images_and_of_pixels_are_retained_side_by_side() -> None:
    """A batch with a class for its second image alone: the bank of whole images takes that image, the bank of maps all."""
    backbone = Backbone(tiny_vit(0, num_classes=0, img_size=(16, 24)), **MEAN)
    heads = {"semseg": make_map_head("linear", [32, 32], 4), "a": make_pooled_head([32, 32], 2)}
    model = DenseNet(backbone, {**heads, "b": make_pooled_head([32, 32], 3)}, [0, 1], union=["a", "b"])
    union = Union(("a", "b"), (2, 3))
    retain = {"semseg": QualityRetaining(4), WHOLE_IMAGES: QualityRetaining(5, union.task_of_class())}
    data = {**batch(), "class:a": torch.tensor([-1, -1, -1]), "class:b": torch.tensor([-1, 2, -1])}
    objective = MultitaskObjective(model, TASKS[:1], union, retain=retain)
    scalars = objective(data)
    outputs = model(data["image"])
    whole, maps = QualityRetaining(5, union.task_of_class()), QualityRetaining(4)
    pull = whole.loss(outputs["a"][1:2], torch.tensor([4])) + maps.loss(outputs["semseg"], data["semseg"])
    assert scalars["retain"].item() == pytest.approx(pull.item(), rel=1e-5)
    plain = MultitaskObjective(model, TASKS[:1], union)(data)["loss"]
    assert scalars["loss"].item() == pytest.approx((plain + pull).item(), rel=1e-5)
    objective.step()
    assert torch.allclose(retain[WHOLE_IMAGES].bank[4, 1], outputs["b"][1]) and not retain[WHOLE_IMAGES].bank[:4].any()
    assert retain["semseg"].bank.any()
    objective({**data, "class:b": torch.tensor([-1, -1, -1])})["loss"].backward()  # no image with a class
    assert all(parameter.grad is not None for parameter in model.heads.parameters())
