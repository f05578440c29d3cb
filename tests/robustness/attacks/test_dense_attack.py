"""Attacks on dense nets: direction, choice of tasks, budget, padding, partial labels, SegPGD's weights, and the errors."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.evaluation.attacks import Attacks
from vismt.evaluation.corruptions import Corruptions
from vismt.evaluation.sections import perturbations
from vismt.multitask.tasks import make_task
from vismt.robustness.attacks.attacks import AttackSpec
from vismt.robustness.attacks.dense_attack import DenseAttack, _balanced
from vismt.robustness.conditions import AttackConfig, CorruptionConfig, condition_of
from vismt.robustness.corruptions import CORRUPTIONS
from vismt.uncertainty.features import Inputs

TASKS = [make_task({"name": "semseg", "classes": 3}), make_task("depth")]
EPSILON = 4 / 255


class TwoHeads(nn.Module):
    """Segmentation and depth from shared features of 12 x 10 pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Tanh())
        self.heads = nn.ModuleDict({"semseg": nn.Conv2d(16, 3, 3, padding=1), "depth": nn.Conv2d(16, 1, 3, padding=1)})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.features(8 * (images - 0.5))
        return {name: head(features) for name, head in self.heads.items()}


def batch(count: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.rand(count, 3, 12, 10, generator=generator),
        "semseg": torch.randint(0, 3, (count, 12, 10), generator=generator),
        "depth": 1 + torch.rand(count, 12, 10, generator=generator),
    }


def attacked(sample: dict[str, Tensor], *tasks: str, inside: Tensor | None = None, ids=None, **options) -> Tensor:
    spec = AttackSpec("pgd", **{"epsilon": EPSILON, **options})
    net, images = TwoHeads(), sample["image"]
    inside = torch.ones(len(images), 1, 12, 10, dtype=torch.bool) if inside is None else inside
    ids = [str(i) for i in range(len(images))] if ids is None else ids
    return DenseAttack(spec, tasks).perturb(net, net, images, sample, TASKS, ids=ids, inside=inside)


def losses(images: Tensor, sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the training losses of each image (b,), by task and their sum."""
    predictions = TwoHeads()(images)
    by_task = {
        task.name: torch.stack(
            [task.loss(predictions[task.name][i : i + 1], sample[task.key][i : i + 1]) for i in range(len(images))]
        ).detach()
        for task in TASKS
    }
    return {**by_task, "sum": by_task["semseg"] + by_task["depth"]}


@pytest.mark.parametrize(("norm", "epsilon"), [("linf", EPSILON), ("l2", 0.3)])
def test_the_attack_is_stronger_than_any_noise_of_its_size(norm: str, epsilon: float) -> None:
    sample = batch()
    images = attacked(sample, norm=norm, epsilon=epsilon)
    change = (images - sample["image"]).flatten(1)
    length = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert bool((length <= epsilon + 1e-6).all()) and bool((length > 0.9 * epsilon).all())
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    reached, noise = losses(images, sample)["sum"], []
    for seed in range(30):
        drawn = torch.randn(sample["image"].shape, generator=torch.Generator().manual_seed(seed))
        drawn = drawn.sign() if norm == "linf" else drawn / drawn.flatten(1).norm(dim=1)[:, None, None, None]
        noise.append(losses((sample["image"] + epsilon * drawn).clamp(0, 1), sample)["sum"])
    clean = losses(sample["image"], sample)["sum"]
    assert bool((reached > torch.stack(noise).amax(0)).all())
    assert bool((reached - clean > 3 * (torch.stack(noise).amax(0) - clean)).all())


def test_each_attack_raises_most_what_it_attacks() -> None:
    sample = batch()
    results = {
        name: losses(attacked(sample, *tasks), sample)
        for name, tasks in (("sum", ()), ("semseg", ("semseg",)), ("depth", ("depth",)))
    }
    clean = losses(sample["image"], sample)
    for name in results:
        for other in results:
            assert name == other or bool((results[name][name] > results[other][name]).all()), (name, other)
    rises = {task: (results["depth"][task] - clean[task]).mean() / clean[task].mean() for task in ("depth", "semseg")}
    assert rises["depth"] > 2 * abs(rises["semseg"])


def test_the_weights_of_the_losses_are_those_of_training() -> None:
    sample = batch()
    net, inside = TwoHeads(), torch.ones(4, 1, 12, 10, dtype=torch.bool)
    heavy = [TASKS[0], make_task({"name": "depth", "loss_weight": 1000.0})]
    attack = DenseAttack(AttackSpec("pgd", EPSILON))
    weighted = attack.perturb(net, net, sample["image"], sample, heavy, ids=list("0123"), inside=inside)
    reached, alone, even = (losses(x, sample)["depth"] for x in (weighted, attacked(sample, "depth"), attacked(sample)))
    assert bool((reached > even + 0.8 * (alone - even)).all()) and bool((alone > even).all())


def test_the_best_iterate_of_all_restarts_is_kept() -> None:
    sample = batch()
    # Steps of the whole ball from side to side: the last iterate is seldom the best.
    rough = {"steps": 3, "step_size": 2 * EPSILON}
    once, often = (losses(attacked(sample, restarts=n, **rough), sample)["sum"] for n in (1, 4))
    assert bool((often >= once).all()) and bool((often > once).any())
    assert bool((once >= losses(sample["image"], sample)["sum"]).all())


def test_an_image_does_not_depend_on_its_batch() -> None:
    sample = batch()
    whole = attacked(sample)
    part = {name: values[2:3] for name, values in sample.items()}
    assert torch.allclose(attacked(part, ids=["2"]), whole[2:3], atol=1e-6)
    assert torch.equal(attacked(sample), whole) and not torch.equal(attacked(sample, seed=1), whole)


def test_padding_and_images_without_labels_stay() -> None:
    sample = batch()
    inside = torch.ones(4, 1, 12, 10, dtype=torch.bool)
    inside[0, :, 8:], inside[1, :, :, 6:] = False, False
    sample["semseg"][0, 8:], sample["depth"][0, 8:] = 255, 0
    sample["depth"][3] = 0
    images = attacked(sample, "depth", inside=inside, norm="l2", epsilon=0.3)
    same = (images == sample["image"]).all(1)
    assert bool(same[0, 8:].all()) and bool(same[1, :, 6:].all()) and not bool(same[0, :8].any())
    assert bool(same[3].all())  # partial labels: no depth in this image
    sample["depth"][:] = 0
    assert torch.equal(attacked(sample, "depth"), sample["image"])
    assert torch.equal(attacked(batch(), epsilon=0.0), batch()["image"])


def test_segmentation_is_weighted_as_segpgd_does() -> None:
    logits = torch.tensor([[4.0, 0.0], [1.0, 3.0], [0.0, 2.0]]).T[None, :, None]  # (1, 2 classes, 1, 3 pixels)
    target = torch.tensor([[[0, 0, 255]]])  # right, wrong, without a label
    task = make_task({"name": "semseg", "classes": 2})
    right, wrong = F.cross_entropy(logits[0, :, 0, :2].T, target[0, 0, :2], reduction="none")
    for progress in (0.1, 0.5, 1.0):
        expected = ((1 - progress / 2) * right + progress / 2 * wrong) / 2
        assert _balanced(logits, target, task, progress) == pytest.approx(float(expected))


def test_a_net_without_gradients_is_not_reported_as_robust() -> None:
    sample, net = batch(), TwoHeads()
    inside = torch.ones(4, 1, 12, 10, dtype=torch.bool)
    attack = DenseAttack(AttackSpec("pgd"))

    def rounded(images: Tensor) -> dict[str, Tensor]:
        return net((images * 4).round() / 4)

    @torch.no_grad()
    def detached(images: Tensor) -> dict[str, Tensor]:
        return net(images)

    for predict in (rounded, detached):
        with pytest.raises(UserError, match="no finite gradient"):
            attack.perturb(net, predict, sample["image"], sample, TASKS, ids=list("0123"), inside=inside)
    net.train()
    attack.perturb(net, net, sample["image"], sample, TASKS, ids=list("0123"), inside=inside)
    assert net.training and all(p.requires_grad and p.grad is None for p in net.parameters())


def test_conditions_of_a_dense_run() -> None:
    attacks = [
        AttackConfig("pgd"),
        AttackConfig("pgd", "8/255", tasks=["depth"]),
        AttackConfig("pgd", tasks=["b", "depth"]),
    ]
    features = [Attacks(attacks), Corruptions([CorruptionConfig("all", [3])])]
    specs = perturbations(features, Inputs(tasks=["depth", "b"]))
    assert [spec.label for spec in specs[:3]] == [
        "PGD-10 linf 4.5/255 on all tasks",
        "PGD-10 linf 8/255 on depth",
        "PGD-10 linf 4.5/255 on depth+b",
    ]
    condition = condition_of(specs[1])
    assert (condition.kind, condition.family, condition.level) == ("attack", "PGD linf on depth", 8 / 255)
    names = [spec.name for spec in specs[3:]]
    assert names == [name for name in CORRUPTIONS if name != "elastic_transform"] and len(names) == 14
    assert {"elastic_transform"} < {spec.name for spec in CorruptionConfig().specs()}


@pytest.mark.parametrize(
    ("attacks", "corruptions", "words"),
    [
        ([AttackConfig("autoattack")], [], "dense runs have pgd"),
        ([AttackConfig("pgdd")], [], "'pgdd' is not known"),
        ([AttackConfig("pgd", tasks=["depht"])], [], "no task 'depht'. Near: 'depth'"),
        ([AttackConfig("pgd", source="frozen")], [], "few-shot"),
        ([AttackConfig(), AttackConfig()], [], "asked for twice"),
        ([], [CorruptionConfig("elastic_transform")], "moves pixels away from their labels"),
        ([], [CorruptionConfig("fogg")], "'fogg'"),
    ],
)
def test_errors(attacks: list, corruptions: list, words: str) -> None:
    with pytest.raises(UserError) as error:
        perturbations([Attacks(attacks), Corruptions(corruptions)], Inputs(tasks=["depth"]))
    assert words in str(error.value)


def test_tasks_are_refused_for_classifiers() -> None:
    with pytest.raises(UserError, match="dense runs"):
        AttackConfig("pgd", tasks=["depth"]).spec()


def test_the_class_of_an_image_may_be_one_of_the_tasks() -> None:
    class Classes(TwoHeads):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            maps = super().forward(images)
            return {"depth": maps["depth"], "classify": maps["semseg"].mean((2, 3))}

    net, sample = Classes(), batch()
    sample["class"] = torch.tensor([0, 2, -1, 1])
    tasks = [TASKS[1], make_task({"name": "classify", "classes": 3})]
    inside = torch.ones(4, 1, 12, 10, dtype=torch.bool)
    attack = DenseAttack(AttackSpec("pgd", EPSILON), ("classify",))
    images = attack.perturb(net, net, sample["image"], sample, tasks, ids=list("0123"), inside=inside)
    assert torch.equal(images[2], sample["image"][2])  # without a class
    entropies = [
        F.cross_entropy(net(x)["classify"], sample["class"], ignore_index=-1, reduction="none")
        for x in (images, sample["image"])
    ]
    assert bool((entropies[0] > entropies[1])[sample["class"] >= 0].all())
