"""What an attack finds is what the evaluation sees: every attack and norm, in two precisions, white-box and by transfer."""

from __future__ import annotations

import copy
from functools import cache
from importlib.util import find_spec

import pytest
import torch
from helpers.attack_parts import CLASSES, KEYS, victim_case
from torch import nn

from vismt.base.errors import UserError
from vismt.metatune import EpisodeSampler, ProtoNet, run_protocol
from vismt.robustness.attacks import attacks as module
from vismt.robustness.attacks import square
from vismt.robustness.attacks.attacks import KINDS, AttackSpec, robust_accuracy
from vismt.robustness.attacks.foreign import PREFIX
from vismt.robustness.classifier import PixelClassifier
from vismt.robustness.conditions import Transfer, TransferSource
from vismt.robustness.evaluate import evaluate_examples

FEW = slice(0, 12)
BUDGETS = {"linf": 0.07, "l2": 0.95, "l1": 9.0}
WEAK = ("fgsm", "pgd_paper", "square")  # get three times the budget
HOSTED = {"torchattacks:PGD": "linf", "torchattacks:PGDL2": "l2", "torchattacks:DeepFool": "l2"}
ATTACKS = [(name, norm) for name in sorted(KINDS) for norm in KINDS[name].norms]
ATTACKS += list(HOSTED.items()) if find_spec("torchattacks") else []
LENGTHS = {"fgsm": 1, "square": 40}
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def short_square(monkeypatch):
    monkeypatch.setattr(module, "QUERIES", {"autoattack": 40, "strong": 40})


@cache
def pixel_net(dtype):
    """The trained CNN as a classifier of float32 pixels with weights of a type."""
    net = copy.deepcopy(victim_case()[0]).to(dtype)
    return PixelClassifier(net, (12, 12), (0.0,) * 3, (1.0,) * 3, num_classes=CLASSES).eval().requires_grad_(False)


def case(name, norm, dtype):
    restarts = 2 if name in ("pgd", "square", "fab", "torchattacks:PGD") else None
    epsilon = BUDGETS[norm] * (3 if name in WEAK else 1)
    spec = AttackSpec(name, epsilon, norm=norm, steps=LENGTHS.get(name, 4), restarts=restarts)
    return spec, pixel_net(dtype), victim_case()[1][FEW], victim_case()[2][FEW]


def answers_of(net, images):
    with torch.no_grad():
        return net(images).argmax(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "norm"), ATTACKS)
def test_an_image_that_counts_as_broken_is_broken_also_when_the_attack_is_computed_as_a_transfer(name, norm, dtype):
    spec, net, images, labels = case(name, norm, dtype)
    options = {"num_classes": CLASSES, "keys": [(0, i) for i in range(len(images))]}
    right = answers_of(net, images) == labels
    broken = answers_of(net, spec.perturb(net, images, labels, **options)) != labels
    # Transfer from a model to itself is the white-box attack.
    transferred = answers_of(net, spec.perturb(net, images, labels, **options, exhaust=True)) != labels
    assert torch.equal(transferred[right], broken[right])
    assert torch.equal(~robust_accuracy(net, images, labels, [spec], num_classes=CLASSES), broken | ~right)
    # One step to 1 % of the pixels breaks nothing here.
    assert bool(broken[right].any()) or (name, norm) == ("fgsm", "l1")


@pytest.mark.parametrize("name", ["fab", "apgd_t", "strong", "autoattack", "square"])
def test_a_transfer_in_the_protocol_is_the_white_box_attack(name):
    labels = torch.arange(5).repeat_interleave(12)
    colours = torch.rand(5, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(60, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    pixels = (colours[labels] + 0.1 * noise).clamp(0, 1)
    spec = AttackSpec(name, 48 / 255, steps=LENGTHS.get(name, 4))
    net = ProtoNet(nn.Flatten())
    sampler = EpisodeSampler(labels, ways=5, shots=2, queries=5, seed=1)
    accuracies = run_protocol(
        net, pixels, sampler, episodes=2, attacks=[spec, Transfer(spec, TransferSource("itself", net, "a"))]
    )
    clean, white, transferred = accuracies.values()
    assert torch.equal(white, transferred) and white.mean() < clean.mean()


@pytest.mark.parametrize("name", ["pgd", "strong"])
def test_a_half_precision_model_is_attacked_at_the_pixels_that_it_is_evaluated_at(name):
    """Of a radius of half a grey value, bfloat16 pixels keep nothing near 1."""
    spec, net, images, labels = case(name, "linf", torch.bfloat16)
    seen = []
    hook = net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    rows = evaluate_examples(net, [(images, labels)], [spec], num_classes=CLASSES)
    hook.remove()
    assert set(seen) == {torch.float32}
    assert [row[f"{spec} lost"] for row in rows] == [0] * len(rows)


def test_a_module_that_takes_its_own_type_alone_gets_one_form_too():
    spec, _, images, labels = case("pgd", "linf", torch.bfloat16)
    for dtype in (torch.bfloat16, torch.float64):
        net = copy.deepcopy(victim_case()[0]).to(dtype)
        rows = evaluate_examples(net, [(images, labels)], [spec], num_classes=CLASSES)
        seen = [row["clean"] == row["label"] == row[str(spec)] for row in rows]
        assert robust_accuracy(net, images, labels, [spec], num_classes=CLASSES).tolist() == seen
        assert 0 < sum(seen) < len(seen)


def test_autocast_around_an_evaluation_changes_nothing():
    spec, net, images, labels = case("pgd", "linf", torch.float32)
    plain = evaluate_examples(net, [(images, labels)], [spec], num_classes=CLASSES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert evaluate_examples(net, [(images, labels)], [spec], num_classes=CLASSES) == plain


class Changing(nn.Module):
    """A net whose logits change by `noise` times theirs from call to call."""

    def __init__(self, noise):
        super().__init__()
        self.net, self.noise = pixel_net(torch.float32), noise
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, images):
        logits = self.net(images)
        return logits + self.noise * torch.randn(logits.shape, generator=self.generator)


def test_images_that_come_back_right_are_counted():
    images, labels = victim_case()[1:]
    # Small steps stop just beyond the boundary.
    spec = AttackSpec(epsilon=0.07, step_size=0.001, steps=60, restarts=1, random_start=False)
    rows = evaluate_examples(Changing(0.1), [(images, labels)], [spec], num_classes=CLASSES)
    lost = [row[f"{spec} lost"] for row in rows]
    assert 0 < sum(lost) < len(lost)
    assert all(row[str(spec)] == row["label"] for row in rows if row[f"{spec} lost"])


def test_a_model_that_answers_differently_from_call_to_call_is_an_error():
    spec, _, images, labels = case("pgd", "linf", torch.float32)
    with pytest.raises(UserError, match="images that it broke are right when they are evaluated again"):
        evaluate_examples(Changing(5.0), [(images, labels)], [spec], num_classes=CLASSES)
    with pytest.raises(UserError, match="answers differently from call to call"):
        robust_accuracy(Changing(5.0), images, labels, [spec], num_classes=CLASSES)


@pytest.mark.parametrize("name", ["square", "torchattacks:PGD"])
def test_every_restart_of_an_attack_with_draws_for_a_whole_batch_draws_anew(name, monkeypatch):
    """With the draws of the first restart, another one would search the same points."""
    if name.startswith(PREFIX):
        pytest.importorskip("torchattacks")
    spec, net, images, labels = case(name, "linf", torch.float32)
    drawn = []

    def kept(draw):
        def wrapped(*arguments, **options):
            result = draw(*arguments, **options)
            drawn.append(getattr(result, "corner", result).clone())
            return result

        return wrapped

    if name == "square":
        monkeypatch.setattr(square, "_draw_moves", kept(square._draw_moves))
    else:
        monkeypatch.setattr(torch.Tensor, "uniform_", kept(torch.Tensor.uniform_))
    spec.perturb(net, images[:1], labels[:1], num_classes=CLASSES, keys=KEYS[:1], exhaust=True)
    assert len(drawn) == spec.restarts == 2 and not torch.equal(*drawn)


@pytest.mark.parametrize(
    ("name", "norm", "words"),
    [
        ("torchattacks:PGDL2", "linf", "no linf form, it has l2; change the norm"),
        ("torchattacks:PGDRSL2", "l1", "no l1 form, it has l2"),
        ("torchattacks:MIFGSM", "l2", "no l2 form, its radius is of linf; give norm: linf"),
    ],
)
def test_a_hosted_attack_is_filed_under_the_norm_of_its_radius(name, norm, words):
    pytest.importorskip("torchattacks")
    _, net, images, labels = case("pgd", "linf", torch.float32)
    with pytest.raises(UserError, match=words):
        module.attack(net, images, labels, AttackSpec(name, 0.5, norm=norm), num_classes=CLASSES)


def test_trials_of_one_image_in_one_batch_leave_the_highest():
    """Also where a row comes several times, which an assignment leaves to chance on CUDA."""
    from vismt.robustness.attacks.active_set import Outcome

    clean, labels = torch.zeros(3, 3, 1, 1), torch.zeros(3, dtype=torch.int64)
    start = {"logits": torch.tensor([[1.0, 0.0]] * 3), "adversarial": clean.clone()}
    outcome = Outcome(clean, labels, [0] * 3, heights=torch.full((3,), -torch.inf), broken=labels > 0, **start)
    rows = torch.tensor([0, 1, 0, 1, 0, 2])
    images = torch.arange(1.0, 7.0).view(-1, 1, 1, 1).expand(-1, 3, 1, 1)
    # Against 1 of the label: the last is a tie, which argmax gets right.
    others = torch.tensor([0.5, 2.0, 3.0, 2.0, 1.5, 1.0])
    outcome.keep(rows, images, torch.stack([torch.ones(6), others], 1))
    assert outcome.adversarial[:, 0, 0, 0].tolist() == [3, 2, 6] and outcome.broken.tolist() == [True, True, False]
    outcome.keep(rows, images + 10, torch.stack([torch.ones(6), others], 1))  # no higher than before
    assert outcome.adversarial[:, 0, 0, 0].tolist() == [3, 2, 6] and outcome.heights.tolist() == [2, 1, 0]
