"""Attacks: equal to reference loops, within budget, with unchanged models and random state."""

import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vismt.errors import UserError
from vismt.metatune import EpisodeSampler, ProtoNet, run_protocol
from vismt.robustness import attacks
from vismt.robustness.attacks import TEXTS, AttackSpec, attack
from vismt.robustness.checks import _tiles, within_budget

CLASSES = 5


class Net(nn.Module):
    """Normalises its images; has a BatchNorm and a Dropout, which depend on the mode."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        generator = torch.Generator().manual_seed(classes)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.head = nn.Linear(8 * 25, classes)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3

    def forward(self, images):
        hidden = self.norm(self.conv((images - 0.5) / 0.25)).tanh()
        return self.head(self.drop(hidden).flatten(1))


@pytest.fixture
def case():
    net = Net().eval()
    images = torch.rand(6, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    return net, images, net(images).argmax(1)


def accuracy(net, images, labels):
    with torch.no_grad():
        return float((net.eval()(images).argmax(1) == labels).double().mean())


def quick(name, epsilon, norm="linf"):
    return AttackSpec(name, epsilon, norm=norm, steps={"square": 60, "autoattack": 5}.get(name))


@pytest.fixture(autouse=True)
def short_square(monkeypatch):
    monkeypatch.setattr(attacks, "AUTO_QUERIES", 60)


@pytest.mark.parametrize("random_start", [True, False])
def test_pgd_is_the_textbook_loop_to_the_bit(case, random_start):
    net, images, labels = case
    spec = AttackSpec(epsilon=8 / 255, step_size=2 / 255, steps=5, seed=3, random_start=random_start)
    moving = images.clone()
    if random_start:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            moving = (images + torch.empty_like(images).uniform_(-8 / 255, 8 / 255)).clamp(0, 1)
    for _ in range(5):
        moving.requires_grad_(True)
        gradient = torch.autograd.grad(F.cross_entropy(net(moving), labels), moving)[0]
        moving = moving.detach() + 2 / 255 * gradient.sign()  # ascent on the loss
        moving = (images + (moving - images).clamp(-8 / 255, 8 / 255)).clamp(0, 1)
    assert torch.equal(attack(net, images, labels, spec, num_classes=CLASSES), moving)


def test_pgd_l2_steps_along_the_normalised_gradient(case):
    net, images, labels = case
    spec = AttackSpec("pgd_l2", 0.5, step_size=0.2, steps=1, random_start=False)
    moved = images.clone().requires_grad_(True)
    gradient = torch.autograd.grad(F.cross_entropy(net(moved), labels), moved)[0]
    step = 0.2 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    attacked = attack(net, images, labels, spec, num_classes=CLASSES)
    assert torch.allclose(attacked, (images + step).clamp(0, 1), atol=1e-6)


CASES = [
    (name, norm, classes)
    for name in sorted(TEXTS)
    for norm in ("linf", "l2")
    for classes in (2, 3, 5, 12)
    if (norm == "linf" or name in {*attacks.EITHER_NORM, "pgd"}) and not (name == "apgd_t" and classes < 4)
]


@pytest.mark.parametrize(("name", "norm", "classes"), CASES)
def test_every_attack_keeps_its_budget_and_hurts(name, norm, classes):
    net = Net(classes).eval()
    images = torch.rand(6, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    labels = net(images).argmax(1)
    epsilon = 0.1 if norm == "linf" and name != "pgd_l2" else 2.0
    attacked = attack(net, images, labels, quick(name, epsilon, norm), num_classes=classes)
    change = (attacked - images).flatten(1)
    size = change.norm(dim=1) if epsilon == 2.0 else change.abs().amax(1)
    assert attacked.dtype == torch.float32 and size.max() <= epsilon + 1e-6 * max(1, epsilon)
    assert attacked.min() >= 0 and attacked.max() <= 1
    # These budgets are large for this net: an attack with the wrong sign leaves all six right.
    assert accuracy(net, attacked, labels) < 1


def test_autoattack_is_at_least_as_strong_as_its_parts(case):
    net, images, labels = case
    left = {
        n: accuracy(net, attack(net, images, labels, quick(n, 0.01), num_classes=CLASSES), labels)
        for n in ("autoattack", "apgd_ce", "apgd_t", "square")
    }
    assert left["autoattack"] <= min(left.values()) and left["square"] > left["autoattack"]


def test_few_way_rule_is_carried_out_and_said():
    spec = AttackSpec("autoattack", 8 / 255)
    assert spec.describe(3) == "AutoAttack (APGD-CE+FAB+Square) linf 8/255" and spec.describe(4) == str(spec)
    for classes, parts in ((3, ["APGD", "FAB", "Square"]), (4, ["APGD", "APGDT", "FAB", "Square"])):
        built = attacks._build(spec, attacks._Victim(Net(classes), torch.device("cpu")), classes, 0)
        assert [type(part).__name__ for part in built.attacks] == parts
        assert built.attacks[0].steps == 100  # torchattacks' own bundle would take 10
    with pytest.raises(UserError, match=r"needs 4 classes, here are 3: take apgd_ce"):
        attack(Net(3), torch.rand(2, 3, 10, 10), torch.tensor([0, 1]), AttackSpec("apgd_t"), num_classes=3)


def test_many_classes_are_attacked_at_the_nine_nearest():
    built = attacks._build(AttackSpec("autoattack"), attacks._Victim(Net(40), torch.device("cpu")), 40, 0)
    assert [part.n_target_classes for part in built.attacks[1:3]] == [9, 9]


@pytest.mark.parametrize("side", [4, 7, 12, 14, 16, 24, 28, 33, 64])
def test_l2_square_is_refused_exactly_where_the_library_breaks(side):
    import torchattacks

    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.marker = nn.Parameter(torch.zeros(()))
    images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    works = True
    with torch.random.fork_rng(devices=[]):
        try:
            torchattacks.Square(net, norm="L2", eps=0.5, n_queries=2)(images, net(images).argmax(1))
        except (RuntimeError, ZeroDivisionError):
            works = False
    assert works == _tiles(side, side)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_model_and_random_state_are_left_as_found(case, name):
    net, images, labels = case
    net.train()
    net.norm.eval()  # a frozen BatchNorm in a training model
    net.head.bias.requires_grad_(False)
    net.conv.weight.grad = torch.full_like(net.conv.weight, 7.0)
    weights = {key: value.clone() for key, value in net.state_dict().items()}
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = attack(net, images, labels, quick(name, 0.02), num_classes=CLASSES)
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(3)
    assert torch.equal(first, attack(net, images, labels, quick(name, 0.02), num_classes=CLASSES))
    assert net.training and net.drop.training and not net.norm.training
    assert [p.requires_grad for p in net.parameters()].count(False) == 1 and not net.head.bias.requires_grad
    assert net.conv.weight.grad.unique().tolist() == [7.0] and net.head.weight.grad is None
    assert all(torch.equal(weights[key], value) for key, value in net.state_dict().items())


def test_flags_come_back_after_an_error(case):
    net, images, labels = case
    net.train()
    with pytest.raises(UserError, match=r"logits of shape \(1, 5\).*need finite \(b, 7\)"):
        attack(net, images, labels, AttackSpec(), num_classes=7)
    assert net.training and all(p.requires_grad for p in net.parameters())


def test_no_grad_inference_mode_and_autocast_around_do_not_matter(case):
    net, images, labels = case
    spec = AttackSpec(epsilon=0.02)
    plain = attack(net, images, labels, spec, num_classes=CLASSES)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain, attack(net, images, labels, spec, num_classes=CLASSES))
    with torch.inference_mode():
        assert torch.equal(plain, attack(net, images, labels, spec, num_classes=CLASSES))


def test_half_precision_model_gives_float32_images(case):
    net, images, labels = case
    attacked = attack(net.to(torch.bfloat16), images, labels, AttackSpec(epsilon=0.05), num_classes=CLASSES)
    assert attacked.dtype == torch.float32 and (attacked - images).abs().max() > 0.04


def test_random_start_depends_on_the_seed(case):
    net, images, labels = case
    spec = AttackSpec(epsilon=0.02, steps=1)
    a, b = (attack(net, images, labels, replace(spec, seed=s), num_classes=CLASSES) for s in (0, 1))
    assert not torch.equal(a, b)


def test_a_flat_loss_leaves_the_image(case):
    class Flat(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :CLASSES] * 0 + torch.arange(5.0)

    # MI-FGSM divides the gradient by its mean size, 0 / 0; that must not give an image of NaN.
    _, images, labels = case
    attacked = attack(Flat(), images, labels, AttackSpec("mifgsm", 0.1), num_classes=CLASSES)
    assert torch.equal(attacked, images)


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_no_budget_returns_the_images(case, name):
    net, images, labels = case
    assert torch.equal(attack(net, images, labels, AttackSpec(name, 0.0), num_classes=CLASSES), images)


def test_a_broken_budget_is_not_passed_on(case):
    _, images, _ = case
    with pytest.raises(RuntimeError, match="left its budget"):
        within_budget(images, images + 0.02, AttackSpec(epsilon=0.01))
    with pytest.raises(RuntimeError, match="left its budget"):
        within_budget(images, images * float("nan"), AttackSpec(epsilon=0.01))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": torch.full((6, 3, 10, 10), 1.01)},
            r"run from 1.01 to 1.01, need \[0, 1\]: the model must normalise",
        ),
        ({"images": torch.full((6, 3, 10, 10), float("nan"))}, r"need \[0, 1\]"),
        ({"images": torch.zeros(6, 3, 10, 10, dtype=torch.uint8) + 200}, r"run from 200 to 200"),
        ({"labels": torch.tensor([0, 1, 2, 3, 4, 5])}, "labels 0 to 5 for 5 classes: need 0 to 4"),
        ({"labels": torch.tensor([0])}, r"labels \(1,\)"),
        ({"num_classes": 1}, "for 1 classes"),
        (
            {"images": torch.zeros(6, 3, 24, 24), "spec": AttackSpec("square", 1.0, norm="l2")},
            "cannot tile 24 x 24 pixels",
        ),
        (
            {"images": torch.zeros(6, 3, 4, 4), "spec": AttackSpec("autoattack", 1.0, norm="l2")},
            "cannot tile 4 x 4 pixels",
        ),
    ],
)
def test_input_errors(case, change, message):
    net, images, labels = case
    arguments = {"images": images, "labels": labels, "num_classes": CLASSES, "spec": AttackSpec()} | change
    with pytest.raises(UserError, match=message):
        attack(net, arguments["images"], arguments["labels"], arguments["spec"], num_classes=arguments["num_classes"])


def test_broken_model_is_an_error_not_a_robust_model(case):
    net, images, labels = case
    net.head.bias.data[0] = float("nan")
    with pytest.raises(UserError, match="finite: False"):
        attack(net, images, labels, AttackSpec(), num_classes=CLASSES)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "pdg"}, "attack 'pdg' is not known. Near: 'pgd'"),
        ({"norm": "linfty"}, "norm 'linfty' is not known. Near: 'linf'"),
        ({"name": "fgsm", "norm": "l2"}, "fgsm: no l2 form"),
        ({"epsilon": -1}, "need epsilon >= 0"),
        ({"epsilon": float("nan")}, "need epsilon >= 0"),
        ({"steps": 0}, "steps >= 1"),
        ({"step_size": 0.0}, "step_size > 0"),
    ],
)
def test_spec_errors(fields, message):
    with pytest.raises(UserError, match=message):
        AttackSpec(**fields)


def test_texts():
    assert str(AttackSpec()) == "PGD-10 linf 4.5/255"
    assert AttackSpec().step == pytest.approx(0.45 / 255) and AttackSpec().steps == 10
    assert str(AttackSpec("pgd", 0.5, norm="l2")) == "PGD-10 l2 0.5"
    assert str(AttackSpec("pgd", 8 / 255, step_size=2 / 255, steps=20)) == "PGD-20 linf 8/255 step 2/255"
    assert str(AttackSpec("fgsm", 0.01 / 255)) == "FGSM linf 0.01/255"
    assert str(AttackSpec("autoattack", 4 / 255)) == "AutoAttack linf 4/255"
    assert str(AttackSpec("square", 4 / 255, steps=100, seed=2)) == "Square-100 linf 4/255 seed 2"
    assert str(AttackSpec(random_start=False)) == "PGD-10 linf 4.5/255 no random start"
    same = {str(AttackSpec(name)) for name in TEXTS if name != "pgd_l2"}
    assert len(same) == len(TEXTS) - 1


# The few-shot protocol under attack: invariant I12.

LABELS = torch.arange(6).repeat_interleave(24)


class Colour(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 12, 4, stride=4)
        generator = torch.Generator().manual_seed(2)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3

    def forward(self, images):
        return self.mix(images).tanh().flatten(1)


class Pixels:
    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        pattern = torch.rand(6, 3, 8, 8, generator=generator)
        noise = torch.randn(144, 3, 8, 8, generator=generator)
        self.images = (0.5 + 0.25 * (pattern[LABELS] - 0.5) + 0.08 * noise).clamp(0, 1)

    def __getitem__(self, index):
        return self.images[index]


def test_few_shot_robustness_behaves():
    radii = [0.0, 2 / 255, 4.5 / 255, 16 / 255, 64 / 255]
    specs = [AttackSpec(epsilon=radius) for radius in radii]
    sampler = EpisodeSampler(LABELS, ways=5, shots=5, queries=10, seed=0)
    net = ProtoNet(Colour())
    result = run_protocol(net, Pixels(), sampler, episodes=6, attacks=specs)
    assert torch.equal(result["clean"], result["PGD-10 linf 0/255"])
    means = [float(result[str(spec)].mean()) for spec in specs]
    assert means[0] > 0.8 and all(b <= a + 0.01 for a, b in pairwise(means))
    assert means[-1] <= 0.2 and means[2] < means[0]  # 64/255: chance of 5 ways or below
    weaker = run_protocol(net, Pixels(), sampler, episodes=6, attacks=[AttackSpec(epsilon=16 / 255, steps=1)])
    assert means[3] <= float(weaker["PGD-1 linf 16/255"].mean())
    again = run_protocol(ProtoNet(Colour()), Pixels(), sampler, episodes=6, attacks=specs[2:3])
    assert torch.equal(again[str(specs[2])], result[str(specs[2])])


def test_missing_library_names_what_to_install(case, monkeypatch):
    net, images, labels = case
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(UserError, match="pip install"):
        attack(net, images, labels, AttackSpec(), num_classes=CLASSES)
