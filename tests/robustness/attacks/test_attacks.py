"""Attacks: specs and texts, budgets, unchanged models and random state, the active set, ensembles, user errors."""

import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vismt.base.errors import UserError
from vismt.base.norm_balls import size, within_budget
from vismt.metatune import EpisodeSampler, ProtoNet, run_protocol
from vismt.robustness.attacks.attacks import KINDS, AttackSpec, attack, robust_accuracy
from vismt.robustness.conditions import AttackConfig

CLASSES = 5
NAMES = sorted(KINDS)
BUDGETS = {"linf": 0.1, "l2": 2.0, "l1": 30.0}


class Net(nn.Module):
    """Normalises its images; has a BatchNorm and a Dropout, which depend on the mode. Counts its images."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        generator = torch.Generator().manual_seed(classes)
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.norm, self.drop = nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.head = nn.Linear(8 * 25, classes)
        self.count = 0
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3

    def forward(self, images):
        self.count += len(images)
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


def quick(name, epsilon, norm="linf", **options):
    steps = {"square": 60, "autoattack": 5, "strong": 5, "fab": 10, "apgd_ce": 10, "apgd_t": 10, "apgd_dlr": 10}
    return AttackSpec(name, epsilon, norm=norm, steps=steps.get(name), **options)


@pytest.fixture(autouse=True)
def short_square(monkeypatch):
    from vismt.robustness.attacks import attacks

    monkeypatch.setattr(attacks, "QUERIES", {"autoattack": 60, "strong": 60})


def ways(name):
    """Return numbers of classes: the least and one more, and all around the nine targets of attacks with targets."""
    least = max(2, KINDS[name].classes)
    return [n for n in (2, 3, 5, 12) if n >= least] if name in ("apgd_t", "fab", "autoattack", "strong") else [least, 5]


CASES = [(name, norm, classes) for name in NAMES for norm in KINDS[name].norms for classes in ways(name)]


@pytest.mark.parametrize(("name", "norm", "classes"), CASES)
def test_every_attack_keeps_its_budget_and_hurts(name, norm, classes):
    net = Net(classes).eval()
    images = torch.rand(6, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    labels = net(images).argmax(1)
    spec = quick(name, BUDGETS[norm], norm)
    attacked = attack(net, images, labels, spec, num_classes=classes)
    assert attacked.dtype == torch.float32
    assert size(attacked - images, norm).max() <= spec.epsilon + 1e-6 * max(1, spec.epsilon)
    assert attacked.min() >= 0 and attacked.max() <= 1
    # These budgets are large for this net: an attack with the wrong sign leaves all six right.
    assert accuracy(net, attacked, labels) < 1
    robust = robust_accuracy(net, images, labels, [spec], num_classes=classes)
    assert robust.dtype == torch.bool and float(robust.double().mean()) == accuracy(net, attacked, labels)


# ---- the active set


def test_images_that_are_wrong_when_clean_are_not_attacked_and_count_as_broken(case):
    net, images, labels = case
    labels = labels.clone()
    labels[::2] = (labels[::2] + 1) % CLASSES
    attacked = attack(net, images, labels, AttackSpec(epsilon=0.05), num_classes=CLASSES)
    assert torch.equal(attacked[::2], images[::2]) and (attacked[1::2] != images[1::2]).any()
    robust = robust_accuracy(net, images, labels, [], num_classes=CLASSES)
    assert robust.tolist() == [False, True] * 3


@pytest.mark.parametrize("name", NAMES)
def test_an_image_has_the_same_outcome_in_every_batch(case, name):
    """Random numbers are functions of the image's key, so dropping broken images changes nothing for the others."""
    net, images, labels = case
    net.double()  # so that rounding, which depends on the batch, does not matter
    spec = quick(name, 0.02, seed=4)
    keys = [(9, i) for i in range(6)]
    whole = spec.perturb(net, images, labels, num_classes=CLASSES, keys=keys)
    parts = [
        spec.perturb(net, images[i : i + 1], labels[i : i + 1], num_classes=CLASSES, keys=keys[i : i + 1])
        for i in range(6)
    ]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
    other = spec.perturb(net, images, labels, num_classes=CLASSES, keys=[(8, i) for i in range(6)])
    assert name in ("fgsm", "fab") or not torch.allclose(whole, other, atol=1e-5)


def test_broken_images_are_left_out_of_the_rest(case):
    net, images, labels = case
    easy = AttackSpec(epsilon=0.5, steps=20, restarts=4)
    net.count = 0
    assert not robust_accuracy(net, images, labels, [easy] * 3, num_classes=CLASSES).any()
    # At most the clean pass and a few steps of the first restart, not 3 x 4 x 20 passes over 6 images.
    assert net.count < 6 * 20


def test_the_worst_case_is_the_union_of_its_attacks(case):
    net, images, labels = case
    specs = [quick(name, 0.012) for name in ("apgd_ce", "apgd_t", "fab")]
    alone = [robust_accuracy(net, images, labels, [spec], num_classes=CLASSES) for spec in specs]
    worst = robust_accuracy(net, images, labels, specs, num_classes=CLASSES)
    assert torch.equal(worst, torch.stack(alone).all(0)) and 0 < worst.sum() < 6
    mixed = [AttackSpec(epsilon=0.001), AttackSpec(epsilon=2.0, norm="l2")]
    assert not robust_accuracy(net, images, labels, mixed, num_classes=CLASSES).any()


def test_exhaust_attacks_broken_images_to_the_end(case):
    net, images, labels = case
    spec, keys = AttackSpec(epsilon=0.1, restarts=1), [(0, i) for i in range(6)]
    early = spec.perturb(net, images, labels, num_classes=CLASSES, keys=keys)
    full = spec.perturb(net, images, labels, num_classes=CLASSES, keys=keys, exhaust=True)

    def loss(changed):
        return F.cross_entropy(net(changed), labels)

    assert loss(full) > loss(early) + 0.5 and accuracy(net, full, labels) <= accuracy(net, early, labels)


# ---- ensembles


def test_ensembles_are_at_least_as_strong_as_their_parts(case):
    net, images, labels = case

    def left(name):
        return robust_accuracy(net, images, labels, [quick(name, 0.012)], num_classes=CLASSES)

    parts = {name: left(name) for name in ("apgd_ce", "apgd_t", "square")}
    assert not (left("strong") & ~parts["apgd_ce"]).any() and not (left("strong") & ~parts["apgd_t"]).any()
    assert not (left("autoattack") & ~left("strong")).any()
    assert parts["square"].sum() > left("autoattack").sum()


@pytest.mark.parametrize(
    ("name", "classes", "parts"),
    [
        ("strong", 4, ["apgd_ce", "apgd_t"]),
        ("strong", 3, ["apgd_ce", "fab", "square"]),
        ("autoattack", 4, ["apgd_ce", "apgd_t", "fab", "square"]),
        ("autoattack", 2, ["apgd_ce", "fab", "square"]),
    ],
)
def test_few_way_rule_is_carried_out_and_named(name, classes, parts):
    from vismt.robustness.attacks.attacks import _parts

    spec = AttackSpec(name, 8 / 255)
    made = list(_parts(spec, classes))
    assert [part.name for part in made] == parts
    assert made[0].restarts == (5 if classes < 4 else 1) and made[0].steps == spec.steps
    named = " (APGD-CE x5+FAB-T+Square)" if classes < 4 else ""
    assert spec.describe(classes) == f"{KINDS[name].text}{named} linf 8/255"


def test_targets_are_the_nine_nearest_classes(case):
    from vismt.robustness.attacks.attacks import _rounds

    assert [round.rank for round in _rounds(AttackSpec("apgd_t"), 40)] == list(range(1, 10))
    assert [round.rank for round in _rounds(AttackSpec("fab"), 3)] == [1, 2]
    assert [(r.rank, r.restart) for r in _rounds(AttackSpec("apgd_t", restarts=2), 4)][:3] == [(1, 0), (1, 1), (2, 0)]


# ---- the model is as before


@pytest.mark.parametrize("name", NAMES)
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
    with pytest.raises(UserError, match=r"logits of shape \(6, 5\).*need finite \(b, 7\)"):
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
    labels = net.to(torch.bfloat16)(images.bfloat16()).argmax(1)
    attacked = attack(net, images, labels, AttackSpec(epsilon=0.001), num_classes=CLASSES)
    assert attacked.dtype == torch.float32 and (attacked - images).abs().max() > 0.0009


def test_random_start_depends_on_the_seed(case):
    net, images, labels = case
    spec = AttackSpec(epsilon=0.002, steps=1)
    a, b = (attack(net, images, labels, replace(spec, seed=s), num_classes=CLASSES) for s in (0, 1))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_no_budget_returns_the_images(case, name):
    net, images, labels = case
    assert torch.equal(attack(net, images, labels, AttackSpec(name, 0.0), num_classes=CLASSES), images)


# ---- what does not fit


def test_a_saturated_softmax_is_attacked_all_the_same(case):
    """A softmax of logits times 1e4 has a cross-entropy gradient of zero in float32, which must not look like robustness."""
    net, images, labels = case

    class Saturated(nn.Module):
        def forward(self, images):
            return 1e4 * net(images)

    plain = robust_accuracy(net, images, labels, [AttackSpec(epsilon=0.02)], num_classes=CLASSES)
    scaled = robust_accuracy(Saturated(), images, labels, [AttackSpec(epsilon=0.02)], num_classes=CLASSES)
    assert plain.sum() < 6 and scaled.sum() <= plain.sum()


class Changed(nn.Module):
    """A net whose images or logits pass through a function."""

    def __init__(self, before=lambda images: images, after=lambda logits: logits):
        super().__init__()
        self.net, self.before, self.after = Net(), before, after

    def forward(self, images):
        return self.after(self.net(self.before(images)))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Changed(lambda images: images.detach()), "has no gradient to its images"),
        (Changed(lambda images: (images * 7).round() / 7), "has gradients of zero on every image"),
        (Changed(after=lambda logits: logits.softmax(1)), "returns probabilities .* leave the softmax out"),
        (Changed(after=lambda logits: logits * float("nan")), "finite: False"),
        (Changed(after=lambda logits: logits.log()), "finite: False"),
    ],
)
def test_a_model_that_cannot_be_judged_is_an_error_not_a_robust_model(case, net, message):
    images = case[1]
    net.eval()
    for name in ("pgd", "strong", "fab"):
        with pytest.raises(UserError, match=message):
            attack(net, images, net(images).argmax(1), quick(name, 0.1), num_classes=CLASSES)


class Broken(torch.autograd.Function):
    """The identity with a gradient of NaN."""

    @staticmethod
    def forward(context, images):
        return images.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * float("nan")


def test_gradients_that_are_not_finite_are_an_error(case):
    _, images, _ = case
    net = Changed(Broken.apply).eval()
    with pytest.raises(UserError, match="has gradients that are not finite; no accuracy is reported"):
        attack(net, images, net(images).argmax(1), AttackSpec(epsilon=0.1), num_classes=CLASSES)


def test_square_needs_no_gradient(case):
    _, images, _ = case
    net = Changed(lambda images: (images * 7).round() / 7).eval()
    labels = net(images).argmax(1)
    attacked = attack(net, images, labels, AttackSpec("square", 0.2, steps=200), num_classes=CLASSES)
    assert accuracy(net, attacked, labels) < 1


def test_a_broken_budget_is_not_passed_on(case):
    _, images, _ = case
    with pytest.raises(RuntimeError, match="left its budget"):
        within_budget(images, images + 0.02, 0.01, "linf", "x")
    with pytest.raises(RuntimeError, match="left its budget"):
        within_budget(images, images * float("nan"), 0.01, "linf", "x")


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
    ],
)
def test_input_errors(case, change, message):
    net, images, labels = case
    arguments = {"images": images, "labels": labels, "num_classes": CLASSES, "spec": AttackSpec()} | change
    with pytest.raises(UserError, match=message):
        attack(net, arguments["images"], arguments["labels"], arguments["spec"], num_classes=arguments["num_classes"])


@pytest.mark.parametrize(("name", "classes"), [("apgd_t", 3), ("apgd_dlr", 2)])
def test_too_few_classes_for_the_loss(name, classes):
    images, labels = torch.rand(2, 3, 10, 10), torch.tensor([0, 1])
    with pytest.raises(UserError, match=rf"needs {classes + 1} classes, here are {classes}: take apgd_ce, or strong"):
        attack(Net(classes), images, labels, AttackSpec(name), num_classes=classes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "pdg"}, "attack 'pdg' is not known. Near: 'pgd'"),
        ({"name": "pgd_l2"}, "attack 'pgd_l2' is not known. Near: "),
        ({"norm": "linfty"}, "attack.norm: 'linfty' is not known. Near: 'linf'"),
        ({"name": "square", "norm": "l1"}, "square: no l1 form, it has linf and l2"),
        ({"name": "autoattack", "norm": "l1"}, "autoattack: no l1 form.*strong"),
        ({"epsilon": -1}, "attack.epsilon is -1; it must be at least 0"),
        ({"epsilon": 8}, "do you mean '8/255'"),
        ({"step_size": 2}, "step_size 2 is more than all of .*'2/255'"),
        ({"epsilon": float("nan")}, "attack.epsilon is nan"),
        ({"steps": 0}, "attack.steps is 0"),
        ({"steps": 2.5}, r"attack.steps: expected int, got 2.5 \(float\)"),
        ({"norm": 2}, r"attack.norm: expected str, got 2 \(int\)"),
        ({"restarts": 0}, "attack.restarts is 0"),
        ({"step_size": 0.0}, "step_size 0.0; it must be above 0"),
    ],
)
def test_spec_errors(fields, message):
    with pytest.raises(UserError, match=message):
        AttackSpec(**fields)


def test_defaults():
    pgd, paper = AttackSpec(), AttackSpec("pgd_paper")
    assert (pgd.steps, pgd.restarts, pgd.step) == (10, 2, pytest.approx(2.5 * pgd.epsilon / 10))
    assert (paper.steps, paper.restarts, paper.step) == (10, 1, pytest.approx(paper.epsilon / 10))
    assert AttackSpec(steps=40).step == pytest.approx(2.5 * 4.5 / 255 / 40)
    assert [AttackSpec(name).steps for name in ("apgd_ce", "fab", "square", "strong")] == [100, 100, 5000, 20]


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        (AttackSpec(), "PGD-10 linf 4.5/255"),
        (AttackSpec("pgd_paper"), "PGD-10 paper protocol linf 4.5/255"),
        (AttackSpec("pgd", 0.5, norm="l2"), "PGD-10 l2 0.5"),
        (AttackSpec("pgd", 8 / 255, 2 / 255, 20, restarts=1), "PGD-20 linf 8/255 step 2/255 1 restart"),
        (AttackSpec("pgd", 8 / 255, 1 / 255, 20), "PGD-20 linf 8/255"),  # the default step by another name
        (AttackSpec("fgsm", 0.01 / 255, steps=20), "FGSM linf 0.01/255"),  # a single step is run
        (AttackSpec("autoattack", 4 / 255), "AutoAttack linf 4/255"),
        (AttackSpec("apgd_ce", 4 / 255, steps=20, restarts=5), "APGD-CE-20 linf 4/255 5 restarts"),
        (AttackSpec("square", 4 / 255, steps=100, seed=2), "Square-100 linf 4/255 seed 2"),
        (AttackSpec("strong", 12, norm="l1"), "strong l1 12"),
        (AttackSpec(random_start=False), "PGD-10 linf 4.5/255 no random start"),
        (AttackSpec("torchattacks:CW", 0.1), "CW (torchattacks) linf 25.5/255"),
    ],
)
def test_texts(spec, text):
    assert str(spec) == text


def test_no_two_attacks_have_one_text():
    assert len({str(AttackSpec(name)) for name in NAMES}) == len(NAMES)


# ---- torchattacks


@pytest.mark.parametrize("name", ["MIFGSM", "CW", "DeepFool"])
def test_classes_of_torchattacks_run_by_name(case, name):
    pytest.importorskip("torchattacks")
    net, images, labels = case
    spec = AttackSpec(
        f"torchattacks:{name}", 2.0 if name != "MIFGSM" else 0.1, norm="linf" if name == "MIFGSM" else "l2"
    )
    attacked = attack(net, images, labels, spec, num_classes=CLASSES)
    assert size(attacked - images, spec.norm).max() <= spec.epsilon + 1e-5 and accuracy(net, attacked, labels) < 1


def test_a_class_of_torchattacks_that_fails_is_one_clear_message(case):
    pytest.importorskip("torchattacks")
    net, images, labels = case
    with pytest.raises(UserError, match=r"attack torchattacks:MultiAttack: it cannot run here \("):
        attack(net, images, labels, AttackSpec("torchattacks:MultiAttack", 0.1), num_classes=CLASSES)


def test_a_class_that_torchattacks_lacks_is_named(case):
    pytest.importorskip("torchattacks")
    net, images, labels = case
    with pytest.raises(UserError, match=r"torchattacks has no 'CV'\. Near: 'CW'"):
        attack(net, images, labels, AttackSpec("torchattacks:CV", 0.1), num_classes=CLASSES)


def test_torchattacks_that_is_missing_is_named_with_an_install_that_downgrades_nothing(case, monkeypatch):
    net, images, labels = case
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(UserError, match=r"need torchattacks: pip install --no-deps torchattacks "):
        attack(net, images, labels, AttackSpec("torchattacks:CW", 0.1), num_classes=CLASSES)
    for name in NAMES:  # the other attacks need nothing
        attack(net, images, labels, quick(name, 0.02), num_classes=CLASSES)


# ---- the few-shot protocol under attack: invariant I12

LABELS = torch.arange(6).repeat_interleave(24)


class Colour(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 12, 4, stride=4)
        generator = torch.Generator().manual_seed(2)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        self.batches = []

    def forward(self, images):
        self.batches.append(len(images))
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


def test_packed_episodes_give_the_accuracies_of_single_ones():
    spec = AttackSpec("strong", 3 / 255, steps=5)
    sampler = EpisodeSampler(LABELS, ways=5, shots=5, queries=5, seed=0)

    class Single:
        """The attack without packing."""

        seed, packs = spec.seed, False
        describe, settings, perturb = spec.describe, spec.settings, spec.perturb

    packed, single = ProtoNet(Colour()), ProtoNet(Colour())
    together = run_protocol(packed, Pixels(), sampler, episodes=10, attacks=[spec])
    alone = run_protocol(single, Pixels(), sampler, episodes=10, attacks=[Single()])
    assert torch.equal(together[str(spec)], alone[str(spec)]) and 0 < alone[str(spec)].mean() < alone["clean"].mean()
    assert len(packed.backbone.batches) < 0.6 * len(single.backbone.batches)


def test_a_worst_case_counts_queries_that_withstand_every_attack():
    specs = [AttackSpec("fgsm", 4 / 255), AttackSpec(epsilon=4 / 255)]
    sampler = EpisodeSampler(LABELS, ways=5, shots=5, queries=10, seed=0)
    worst = {"worst": [str(spec) for spec in specs]}
    result = run_protocol(ProtoNet(Colour()), Pixels(), sampler, episodes=4, attacks=specs, worst=worst)
    single = torch.minimum(result[str(specs[0])], result[str(specs[1])])
    assert bool((result["worst"] <= single).all()) and result["worst"].mean() < result["clean"].mean()


def test_a_spec_reads_fractions_as_a_configuration_does():
    spec = AttackSpec("pgd", "8/255", step_size="2/255")
    assert spec == AttackSpec("pgd", 8 / 255, step_size=2 / 255) == AttackConfig("pgd", "8/255", "2/255").spec()
    with pytest.raises(UserError, match=r"8/x. is neither a number nor a fraction"):
        AttackSpec("pgd", "8/x")
