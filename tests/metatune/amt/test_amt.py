"""The adversarial objective against slow copies of the model, its switches, its loss by hand, and what training does."""

from __future__ import annotations

import copy
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.amt_parts import adapted, backbone, episode, same, train
from helpers.ranks import run_two
from helpers.tiny import shake, snapshot
from torch import Tensor, nn

import vismt
from vismt.base.errors import Diverged, UserError
from vismt.lowrank.layers.base import adapter_layers
from vismt.metatune.amt import method as amt
from vismt.metatune.amt.method import AdversarialObjective, Adversary, trades
from vismt.metatune.amt.weight_attack import weight_perturbation
from vismt.metatune.protonet import EpisodeObjective, ProtoNet, cosine_logits, prototypes

FORMS = [(weight, support) for weight in ("joint", "paper", "none") for support in ("perturbed", "clean")]
# Plain gradients are some hundred times smaller than the factors, so eta_1 must be larger to have an effect.
GAMMA = {"joint": 0.05, "paper": 0.2, "none": 0.05}


def close(value: Tensor, other: Tensor, part: float = 1e-4) -> bool:
    """Return whether two tensors are equal within a share of the other's norm."""
    return bool((value - other).norm() <= part * other.norm() + 1e-9)


@pytest.fixture
def attacks(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The calls of the input attack by the objective, with their results; in the weights' dtype on every CPU."""
    calls: list[dict] = []
    monkeypatch.setattr(amt, "_attack_dtype", lambda images: None)
    attack = amt.pyramid_attack

    def watched(logits_fn, images: Tensor, **settings: object) -> Tensor:
        adversarial = attack(logits_fn, images, **settings)
        calls.append({"logits_fn": logits_fn, "images": images, "adversarial": adversarial, **settings})
        return adversarial

    monkeypatch.setattr(amt, "pyramid_attack", watched)
    return calls


# ---- the loss (I5)


def test_kl_by_hand() -> None:
    # p = (.9, .1), q = (.5, .5): KL(p || q) = .9 ln 1.8 + .1 ln .2 = .52901 - .16094 = .36806
    # KL(q || p) = .5 ln (5/9) + .5 ln 5 = -.29389 + .80472 = .51083.  CE of p at class 1: -ln .1 = 2.30259
    p, q = (torch.tensor([row]).log().requires_grad_() for row in ([0.9, 0.1], [0.5, 0.5]))
    loss, kl = trades(p, q, torch.tensor([1]), 6.0)
    assert float(kl.detach()) == pytest.approx(0.36806, abs=1e-5)
    assert float(loss.detach()) == pytest.approx(2.30259 + 6 * 0.36806, abs=1e-4)
    # Both branches learn. d KL / dz_clean = p (ln p/q - KL) = .9 (.58779 - .36806) = .19776; d KL / dz_adv = q - p = -.4.
    clean, adversarial = torch.autograd.grad(kl, (p, q))
    assert clean[0].tolist() == pytest.approx([0.19776, -0.19776], abs=1e-5)
    assert adversarial[0].tolist() == pytest.approx([-0.4, 0.4], abs=1e-6)
    assert float(trades(p, q, torch.tensor([1]), 6.0, "adv_clean")[1].detach()) == pytest.approx(0.51083, abs=1e-5)
    # The mean over queries, not over entries (.09202) nor the sum (.36806): a second query without a change adds nothing.
    two, other = torch.cat([p, q]), torch.cat([q, q])
    assert float(trades(two, other, torch.tensor([1, 0]), 6.0)[1].detach()) == pytest.approx(0.36806 / 2, abs=1e-5)
    # CE is of the clean branch: (2.30259 + ln 2) / 2.
    assert float(trades(two, other, torch.tensor([1, 0]), 0.0)[0].detach()) == pytest.approx(
        (2.30259 + 0.69315) / 2, abs=1e-5
    )
    assert trades(two, two, torch.tensor([1, 0]), 6.0)[1] == 0


# ---- the objective against an explicit one


@dataclass
class SlowObjective:
    """The objective of an episode from copies of the model with weights moved in place."""

    batch: dict
    attacked: Tensor
    adversary: Adversary

    def __call__(self, proto: ProtoNet) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return loss, KL and gradients."""
        theta = copy.deepcopy(proto)
        if self.adversary.weight_attack == "none" or self.adversary.gamma == 0:
            return self.gradient(("lora_A", "lora_B", "scale"), theta, theta)
        if self.adversary.weight_attack == "joint":
            return self.gradient(("lora_A", "lora_B", "scale"), self.moved(theta, ("lora_A", "lora_B")), theta)
        loss, kl, first = self.gradient(("lora_A", "scale"), self.moved(theta, ("lora_A",)), theta)
        return loss, kl, {**first, **self.gradient(("lora_B",), self.moved(theta, ("lora_B",)), theta)[2]}

    def value(self, centres: Tensor, at: ProtoNet) -> tuple[Tensor, Tensor, Tensor]:
        """Return loss, KL and the cross-entropy of the attacked queries."""
        logits = [
            at.scale * F.normalize(at.backbone(images)) @ F.normalize(centres).T
            for images in (self.batch["query"], self.attacked)
        ]
        clean, adversarial = (part.softmax(1) for part in logits)
        first, second = (clean, adversarial) if self.adversary.kl == "clean_adv" else (adversarial, clean)
        kl = (first * (first.log() - second.log())).sum(1).mean()
        ce = F.cross_entropy(logits[0], self.batch["query_labels"])
        return ce + self.adversary.weight * kl, kl, F.cross_entropy(logits[1], self.batch["query_labels"])

    def centres(self, at: ProtoNet) -> Tensor:
        features = at.backbone(self.batch["support"])
        return torch.stack([features[self.batch["support_labels"] == k].mean(0) for k in range(3)])

    def gradient(
        self, kinds: tuple[str, ...], at: ProtoNet, still: ProtoNet
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        perturbed = self.adversary.support == "perturbed"
        loss, kl, _ = self.value(self.centres(at if perturbed else still), at)
        models = [at] if at is still or perturbed else [at, still]
        gradients = {}
        for name in [*factor_names(at), "scale"]:
            if name.endswith(kinds):
                parameters = [model.get_parameter(name) for model in models]
                parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                gradients[name] = sum(part for part in parts if part is not None)
        return loss.detach(), kl.detach(), gradients

    def moved(self, theta: ProtoNet, kinds: tuple[str, ...]) -> ProtoNet:
        joint, centres, factors = self.adversary.weight_attack == "joint", self.centres(theta), factor_names(theta)
        centres = centres if self.adversary.support == "perturbed" else centres.detach()
        ascended = self.value(centres, theta)[0 if joint else 2]
        slopes = dict(zip(factors, torch.autograd.grad(ascended, [theta.get_parameter(name) for name in factors])))
        other = copy.deepcopy(theta)
        with torch.no_grad():
            for name in factors:
                if name.endswith(kinds):
                    p, g = other.get_parameter(name), slopes[name]
                    p.add_(self.adversary.gamma * (p.norm() / g.norm() if joint else 1.0) * g)
        return other


def factor_names(proto: ProtoNet) -> list[str]:
    return [name for name, p in proto.named_parameters() if ".lora_" in name]


@pytest.mark.parametrize("kl", ["clean_adv", "adv_clean"])
@pytest.mark.parametrize(("weight", "support"), FORMS)
def test_every_form_equals_copies_of_the_model(attacks: list[dict], weight: str, support: str, kl: str) -> None:
    proto, batch = train(adapted(), Adversary(epsilons=(0.0,), gamma=0.0), 3), episode(7)
    adversary = Adversary(epsilons=(0.5 / 255,), weight_attack=weight, support=support, kl=kl, gamma=GAMMA[weight])
    before, lr = snapshot(proto), 0.1
    metrics = AdversarialObjective(proto, adversary)(batch)
    proto.zero_grad()
    metrics["loss"].backward()
    loss, distance, gradients = SlowObjective(batch, attacks[-1]["adversarial"], adversary)(proto)
    assert float(metrics["loss"].detach()) == pytest.approx(float(loss), rel=1e-5)
    assert float(metrics["kl"]) == pytest.approx(float(distance), rel=1e-4) and float(distance) > 0.01
    with torch.no_grad():
        for name, value in gradients.items():
            # The update of plain SGD is -lr times the gradient at theta + nu, from theta.
            assert close(proto.get_parameter(name).grad, value), name
            proto.get_parameter(name).sub_(lr * proto.get_parameter(name).grad)
    assert len(gradients) == 17
    changed = {name for name, value in proto.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(gradients)


@pytest.mark.parametrize("weight", ["none", "joint"])
def test_on_class_labels_it_is_trades_with_a_vector_for_each_class(attacks: list[dict], weight: str) -> None:
    proto, batch = adapted(), episode(7)
    batch |= {"query": torch.cat([batch["support"], batch["query"]]), "support": batch["support"][:0]}
    batch |= {"query_labels": torch.arange(18) % 10, "support_labels": batch["support_labels"][:0]}
    proto.vectors = nn.Parameter(torch.randn(10, 32, generator=torch.Generator().manual_seed(3)))
    adversary = Adversary(epsilons=(0.5 / 255,), weight_attack=weight, gamma=1e-6)
    AdversarialObjective(proto, adversary)(batch)["loss"].backward()
    vectors = proto.vectors.detach().clone().requires_grad_()
    clean, attacked = (
        proto.scale.detach() * F.normalize(proto.backbone(images).detach()) @ F.normalize(vectors).T
        for images in (batch["query"], attacks[-1]["adversarial"])
    )
    trades(clean, attacked, batch["query_labels"], adversary.weight)[0].backward()
    assert close(proto.vectors.grad, vectors.grad, 1e-3) and len(attacks[-1]["images"]) == 18


def test_the_forms_are_different_functions(attacks: list[dict]) -> None:
    """The gradients of the forms differ by far more than the tolerance of the test above."""
    gradients = {}
    for weight, support in FORMS:
        proto = train(adapted(), Adversary(epsilons=(0.0,), gamma=0.0), 3)
        adversary = Adversary(epsilons=(0.5 / 255,), weight_attack=weight, support=support, gamma=GAMMA[weight])
        AdversarialObjective(proto, adversary)(episode(7))["loss"].backward()
        gradients[weight, support] = {
            kind: torch.cat([p.grad.flatten() for name, p in proto.named_parameters() if name.endswith(kind)])
            for kind in ("lora_A", "lora_B")
        }
    for form, left in gradients.items():
        for other, right in gradients.items():
            equal = form == other or (form[0] == other[0] == "none")
            for kind in ("lora_A", "lora_B"):
                assert close(left[kind], right[kind], 1e-4) == equal, (form, other, kind)
                assert close(left[kind], right[kind], 5e-3) == equal, (form, other, kind)


@pytest.mark.parametrize("weight", ["joint", "paper", "none"])
def test_what_is_trained_besides_learns_once(attacks: list[dict], weight: str) -> None:
    proto = adapted(also_train=["norm"])
    adversary = Adversary(epsilons=(0.5 / 255,), weight_attack=weight, gamma=1e-6)
    AdversarialObjective(proto, adversary)(episode(1))["loss"].backward()
    plain = adapted(also_train=["norm"])
    AdversarialObjective(plain, Adversary(epsilons=(0.5 / 255,), weight_attack="none"))(episode(1))["loss"].backward()
    for name in ("backbone.vit.norm.weight", "scale", "backbone.vit.blocks.0.mlp.fc1.lora_A"):
        assert close(proto.get_parameter(name).grad, plain.get_parameter(name).grad, 1e-3), name


@pytest.mark.parametrize("support", ["perturbed", "clean"])
@pytest.mark.parametrize("weight", ["joint", "paper"])
def test_gamma_zero_is_plain_adversarial_training_bit_for_bit(weight: str, support: str) -> None:
    states = []
    for adversary in (
        Adversary(weight_attack=weight, support=support, gamma=0.0),
        Adversary(weight_attack="none", gamma=0.3, support=support),
    ):
        states.append(snapshot(train(adapted(), adversary, 3)))
    assert same(*states)


def test_without_either_attack_it_is_the_clean_loss_bit_for_bit() -> None:
    proto, other = adapted(), adapted()
    for number in range(3):
        batch = episode(number)
        metrics = AdversarialObjective(proto, Adversary(epsilons=(0.0,), gamma=0.0))(batch)
        expected = EpisodeObjective(other)(batch)
        assert torch.equal(metrics["loss"], expected["loss"]) and torch.equal(metrics["accuracy"], expected["accuracy"])
        assert metrics["kl"] == 0 and torch.equal(metrics["robust"], metrics["accuracy"])
        metrics["loss"].backward(), expected["loss"].backward()
    for parameter, expected in zip(proto.parameters(), other.parameters()):
        assert (parameter.grad is None and expected.grad is None) or close(parameter.grad, expected.grad, 1e-5)


# ---- the input attack inside of the objective


def test_queries_are_attacked_and_nothing_else(attacks: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    proto, batch, forwards = adapted(), episode(0), []
    before = {name: value.clone() for name, value in batch.items()}
    forward = type(proto.backbone).forward

    def counted(self: nn.Module, images: Tensor) -> Tensor:
        forwards.append(images.detach().clone())
        return forward(self, images)

    monkeypatch.setattr(type(proto.backbone), "forward", counted)
    AdversarialObjective(proto, Adversary(epsilons=(2 / 255,), steps=2, step_ratio=0.1, gamma=0.01))(batch)
    # support and queries, two steps of the attack, the attacked queries, all three once more at theta + nu
    assert [len(part) for part in forwards] == [18, 12, 12, 12, 30]
    clean = torch.cat([batch["support"], batch["query"]])
    assert torch.equal(forwards[0], clean) and torch.equal(forwards[4][:18], clean)
    assert torch.equal(forwards[4][18:], attacks[0]["adversarial"])
    assert torch.equal(forwards[3], attacks[0]["adversarial"]) and all(
        torch.equal(before[name], batch[name]) for name in batch
    )
    call = attacks[0]
    assert call["epsilon"] == 2 / 255 and call["step_size"] == pytest.approx(0.2 / 255) and call["steps"] == 2
    assert call["levels"] == ((4, 20.0), (8, 10.0), (None, 1.0))
    # Predictions against the prototypes of the clean support, without a way back into any parameter.
    with torch.no_grad():
        clean = proto(batch["support"], batch["support_labels"], batch["query"])
    logits = call["logits_fn"](batch["query"])
    assert torch.allclose(logits, clean, atol=1e-5) and not logits.requires_grad
    assert torch.allclose(call["clean_logits"], clean, atol=1e-5)


def attacked(objective: AdversarialObjective, batch: dict[str, Tensor]) -> Tensor:
    """Return the queries as the objective attacks them."""
    net = objective.proto
    with torch.no_grad():
        centres = prototypes(net.backbone(batch["support"]), batch["support_labels"])
        clean = cosine_logits(net.backbone(batch["query"]), centres, net.scale)
    found = objective._attack_input(batch["query"], clean, centres, 0, 1.0)
    assert found is not None
    return found


def test_the_attack_on_merged_weights_finds_the_images_of_the_adapted_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    net, batch = (
        shake(adapted().double(), 0.1),
        {k: v.double() if v.is_floating_point() else v for k, v in episode(0).items()},
    )
    adversary = Adversary(epsilons=(8 / 255,), steps=5, step_ratio=0.3)
    objective = AdversarialObjective(net, adversary)
    optimiser = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.5)
    found = []
    for _ in range(2):  # the weights of the second attack are those after a step, not those that were merged before
        merged = attacked(objective, batch)
        with monkeypatch.context() as patch:
            patch.setattr(amt, "merged_copy", lambda model, dtype: model)
            assert torch.allclose(merged, attacked(AdversarialObjective(net, adversary), batch), atol=1e-9)
        found.append(merged)
        AdversarialObjective(net, Adversary(gamma=0.01))(batch)["loss"].backward()
        optimiser.step()
    assert (found[0] - found[1]).abs().max() > 1e-3


class Statistics(nn.BatchNorm1d):
    """Features (b, n, d) normalised over the batch, with running statistics in training mode."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.mT).mT


def test_the_attack_leaves_modes_statistics_and_gradients_as_they_are() -> None:
    net, batch = adapted(), episode(0)
    net.backbone.vit.norm = nn.Sequential(nn.Dropout(0.5), net.backbone.vit.norm, Statistics(32))
    net.train()
    net.backbone.vit.norm[2].train()  # a backbone holds its statistics in training
    state, number = snapshot(net), torch.get_rng_state()
    AdversarialObjective(net, Adversary())._attack_input(batch["query"], torch.zeros(12, 3), torch.ones(3, 32), 0, 1.0)
    assert all(torch.equal(value, state[name]) for name, value in snapshot(net).items())
    assert torch.equal(torch.get_rng_state(), number)
    assert all(module.training for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_an_l2_expert_is_attacked_pixel_by_pixel_in_its_ball(attacks: list[dict]) -> None:
    batch = episode(0)
    objective = AdversarialObjective(adapted(), Adversary(epsilons=(0.5,), norm="l2", warmup=2, gamma=0.01))
    assert objective(batch)["kl"] > 0
    assert attacks[0]["levels"] == ((None, 1.0),) and attacks[0]["norm"] == "l2" and attacks[0]["epsilon"] == 0.25
    assert (attacks[0]["adversarial"] - batch["query"]).flatten(1).norm(dim=1).max() <= 0.25 + 1e-5


def test_a_corruption_takes_the_place_of_the_attack(attacks: list[dict]) -> None:
    calls = []

    def darker(images: Tensor, severity: int, seed: int) -> Tensor:
        calls.append((images.clone(), severity, seed))
        return images * 0.5

    adversary = Adversary(epsilons=(2.0, 4.0), norm="corruption", gamma=0.01, warmup=5, seed=3)
    proto = adapted()
    objective = AdversarialObjective(proto, adversary, darker)
    for number in range(8):
        batch = episode(number)
        values = objective(batch)
        with torch.no_grad():
            centres = prototypes(proto.backbone(batch["support"]), batch["support_labels"])
            hits = proto.backbone(batch["query"] * 0.5) @ F.normalize(centres).T
        assert float(values["robust"]) == pytest.approx(float((hits.argmax(1) == batch["query_labels"]).float().mean()))
        assert torch.equal(calls[-1][0], batch["query"])
    assert not attacks and {severity for _, severity, _ in calls} == {2, 4} and len({call[2] for call in calls}) == 8
    again = [call[1:] for call in calls]
    calls.clear()
    AdversarialObjective(proto, adversary, darker)(episode(5))
    assert calls[0][1:] == again[5]
    with pytest.raises(UserError, match="norm corruption without a function"):
        AdversarialObjective(proto, adversary)
    with pytest.raises(UserError, match=r"pool.norm: 'l3' is not known. Near: 'l2'"):
        Adversary(norm="l3")


def test_gaussian_noise_takes_the_place_of_the_attack(attacks: list[dict]) -> None:
    proto, seen = adapted(), []
    proto.backbone.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].detach().clone()))
    noises = []
    for number in (0, 0, 1):
        batch = episode(number)
        seen.clear()
        AdversarialObjective(proto, Adversary(epsilons=(0.25,), norm="gaussian", weight_attack="none"))(batch)
        clean, noisy = seen
        support, query = clean.split([len(batch["support"]), len(batch["query"])])
        assert torch.equal(support, batch["support"]) and torch.equal(query, batch["query"])
        noises.append(noisy - query)
        assert float(noises[-1].std()) == pytest.approx(0.25, rel=0.05)
        assert float(noisy.max()) > 1 and float(noisy.min()) < 0  # not clipped
    assert not attacks and torch.equal(noises[0], noises[1]) and noises[1].shape == noises[2].shape
    assert not torch.allclose(noises[1], noises[2])


def test_budget_and_start_are_functions_of_seed_and_number(attacks: list[dict]) -> None:
    proto, budgets = adapted(), (0.1 / 255, 8 / 255)

    def drawn(seed: int, numbers: range) -> list[tuple[float, Tensor]]:
        attacks.clear()
        for number in numbers:
            batch = {**episode(0), "number": torch.tensor(number)}
            AdversarialObjective(proto, Adversary(epsilons=budgets, gamma=0.0, seed=seed))(batch)
        return [(call["epsilon"], call["adversarial"]) for call in attacks]

    state = torch.get_rng_state()
    first, second, late = drawn(0, range(12)), drawn(1, range(12)), drawn(0, range(5, 7))
    assert {epsilon for epsilon, _ in first} == set(budgets)
    assert [e for e, _ in first] != [e for e, _ in second]
    assert all(early[0] == again[0] and torch.equal(early[1], again[1]) for early, again in zip(first[5:7], late))
    alike = [adversarial for epsilon, adversarial in first if epsilon == budgets[1]]
    assert not torch.equal(alike[0], alike[1])
    assert torch.equal(torch.get_rng_state(), state)


def test_warmup_raises_both_attacks(attacks: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    gammas = []

    def watched(loss: Tensor, factors: dict, gamma: float, **options: object) -> dict:
        gammas.append(gamma)
        return weight_perturbation(loss, factors, gamma, **options)

    monkeypatch.setattr(amt, "weight_perturbation", watched)
    for number in range(6):
        adversary = Adversary(epsilons=(0.1,), gamma=0.2, warmup=4)
        AdversarialObjective(adapted(), adversary)({**episode(0), "number": torch.tensor(number)})
    assert [call["epsilon"] for call in attacks] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert [call["step_size"] for call in attacks] == pytest.approx([0.0125, 0.025, 0.0375, 0.05, 0.05, 0.05])
    assert gammas == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])


def test_metrics(attacks: list[dict]) -> None:
    proto, batch = train(adapted(), Adversary(epsilons=(0.0,), gamma=0.0), 20), episode(3)
    metrics = AdversarialObjective(proto, Adversary(epsilons=(2 / 255,), gamma=0.01))(batch)
    assert set(metrics) == {"loss", "accuracy", "robust", "kl"} and metrics["loss"].requires_grad
    assert not any(metrics[name].requires_grad for name in ("accuracy", "robust", "kl"))
    with torch.no_grad():
        for name, query in (("accuracy", batch["query"]), ("robust", attacks[0]["adversarial"])):
            hits = proto(batch["support"], batch["support_labels"], query).argmax(1) == batch["query_labels"]
            assert float(metrics[name]) == pytest.approx(float(hits.float().mean()))
    assert metrics["robust"] < metrics["accuracy"]


@pytest.mark.parametrize("weight", ["joint", "paper"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, weight: str) -> None:
    full, half = (train(adapted(), Adversary(epsilons=(0.0,), gamma=0.0), 3) for _ in range(2))
    adversary = Adversary(epsilons=(0.1 / 255,), weight_attack=weight, gamma=0.01)
    AdversarialObjective(full, adversary)(episode(2))["loss"].backward()
    with torch.autocast("cpu", dtype=dtype):
        loss = AdversarialObjective(half, adversary)(episode(2))["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    for (name, parameter), other in zip(full.backbone.named_parameters(), half.backbone.parameters()):
        if parameter.grad is not None:
            assert other.grad.dtype == torch.float32 and bool(other.grad.isfinite().all())
            assert F.cosine_similarity(parameter.grad.flatten(), other.grad.flatten(), 0) > 0.8, name


def test_a_collapse_is_said_after_ten_flat_episodes_in_a_row() -> None:
    proto = adapted()
    objective = AdversarialObjective(proto, Adversary(epsilons=(0.0,), gamma=0.0))

    def run(count: int, scale: float) -> None:
        with torch.no_grad():
            proto.scale.fill_(scale)
            for number in range(count):
                objective({**episode(0), "number": torch.tensor(number)})

    run(9, 0.0)
    objective.collapsed(9)
    run(1, 10.0)
    run(9, 0.0)
    objective.collapsed(19)
    run(1, 0.0)
    with pytest.raises(
        Diverged, match=r"collapsed to one answer for every image \(seen at step 20, 10 episodes in a row\)"
    ):
        objective.collapsed(20)
    assert "flat" not in objective.state_dict()


def test_one_sure_answer_for_every_image_is_a_collapse_and_unsure_answers_that_differ_are_not() -> None:
    """A dead network under a classifier of classes answers with the classifier's bias, which is not uniform."""
    objective = AdversarialObjective(adapted(), Adversary(epsilons=(0.0,), gamma=0.0))
    unsure = 0.02 * torch.randn(15, 100, generator=torch.Generator().manual_seed(0))
    sure = torch.linspace(-2, 2, 100).expand(15, 100)
    for _ in range(10):
        objective._watch(unsure)
    objective.collapsed(10)
    for _ in range(10):
        objective._watch(sure)
    with pytest.raises(Diverged, match="one answer for every image"):
        objective.collapsed(20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl": "clean_avd"}, "pool.kl: 'clean_avd' is not known. Near: 'clean_adv'"),
        ({"weight_attack": "papr"}, "Near: 'paper'"),
        ({"support": "perturb"}, "pool.support: 'perturb'"),
        ({"epsilons": ()}, "an expert has no budget"),
        ({"weight": -1.0}, "pool.weight is -1.0; it must be at least 0"),
        ({"gamma": -1e-4}, "gamma is -0.0001"),
        ({"warmup": -1}, "warmup is -1"),
        ({"step_ratio": 0.0}, "step_ratio is 0.0; it must be above 0"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Adversary(**change)


# ---- the adapter (I1, I2, I3)


def test_the_factors_start_at_the_leading_singular_triplets_of_each_block() -> None:
    stock, hosts = backbone(), adapter_layers(adapted(2).backbone.vit)
    assert set(hosts) == {
        f"blocks.{k}.{site}" for k in (0, 1) for site in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    }
    for path, host in hosts.items():
        weight = stock.vit.get_submodule(path).weight.detach()
        blocks = 3 if path.endswith("qkv") else 1
        assert host.lora_A.shape == (2 * blocks, weight.shape[1]) and host.lora_B.shape == (weight.shape[0], 2)
        for rows, A, B in zip(
            weight.chunk(blocks), host.lora_A.detach().chunk(blocks), host.lora_B.detach().chunk(blocks)
        ):
            values = torch.linalg.svdvals(rows)
            assert torch.allclose(A @ A.T, values[:2].diag(), atol=1e-4) and torch.allclose(
                B.T @ B, values[:2].diag(), atol=1e-4
            )
            left = torch.linalg.svdvals(rows - B @ A)
            assert torch.allclose(left[:-2], values[2:], atol=1e-4) and left[-2:].abs().max() < 1e-4


@pytest.mark.parametrize("alpha", [None, 6.0])
def test_the_start_is_the_model_whatever_alpha_is(alpha: float | None) -> None:
    batch = episode(0)["query"]
    with torch.no_grad():
        assert torch.allclose(adapted(2, alpha=alpha).backbone(batch), backbone()(batch), atol=1e-5)


def test_the_other_start_is_lora() -> None:
    proto = adapted(init="lora")
    hosts = adapter_layers(proto.backbone.vit).values()
    assert all(host.lora_B.abs().max() == 0 and host.lora_A.abs().max() > 0 and host.lora_A0 is None for host in hosts)
    for options, message in (
        ({"init": "sdv"}, "adapt.init: 'sdv' for 'amt'. Near: 'svd'"),
        ({"dropout": 0.1}, "adapt.dropout: 0.1 with 'amt'"),
    ):
        with pytest.raises(UserError, match=message):
            adapted(**options)


@pytest.mark.parametrize("weight", ["joint", "paper"])
def test_training_moves_factors_and_scale_alone(weight: str) -> None:
    proto = adapted()
    before = snapshot(proto)
    train(proto, Adversary(epsilons=(1 / 255,), weight_attack=weight, gamma=0.01), 3)
    changed = {name for name, value in proto.state_dict().items() if not torch.equal(value, before[name])}
    assert (
        changed == {name for name in before if name.endswith(("lora_A", "lora_B"))} | {"scale"} and len(changed) == 17
    )
    assert torch.equal(
        vismt.unadapt(proto.backbone.vit).blocks[0].attn.qkv.weight, backbone().vit.blocks[0].attn.qkv.weight
    )


# ---- experiments


def delta(proto: ProtoNet) -> Tensor:
    return torch.cat([host.low_rank().delta().flatten() for host in adapter_layers(proto.backbone.vit).values()])


def measured(proto: ProtoNet, epsilon: float, count: int = 8) -> tuple[float, float]:
    """Return accuracy under PGD-10 on the cross-entropy, and KL under the pyramid of 1/255, on other episodes."""
    hits, moved = [], []
    objective = AdversarialObjective(proto, Adversary(epsilons=(1 / 255,), gamma=0.0))
    for number in range(count):
        batch = episode(1000 + number, 5, queries=10)
        task, x, change = proto.classifier(batch["support"], batch["support_labels"]), batch["query"], 0.0
        for _ in range(10):
            attacked = (x + change).clamp(0, 1).requires_grad_()
            slope = torch.autograd.grad(F.cross_entropy(task(attacked), batch["query_labels"]), attacked)[0]
            change = (attacked.detach() - x + epsilon / 4 * slope.sign()).clamp(-epsilon, epsilon)
        with torch.no_grad():
            hits.append((task((x + change).clamp(0, 1)).argmax(1) == batch["query_labels"]).float().mean())
        moved.append(objective(batch)["kl"])
    return float(torch.stack(hits).mean()), float(torch.stack(moved).mean())


@pytest.mark.slow
def test_experts_of_different_budgets_differ() -> None:
    """E2: with a larger budget the update is further from the clean expert's, and the expert is more robust."""
    clean, weak, strong = (
        train(adapted(), Adversary(epsilons=(value / 255,), gamma=0.0), 40, lr=0.05) for value in (0.0, 0.01, 0.3)
    )
    near, far = (float((delta(proto) - delta(clean)).norm() / delta(clean).norm()) for proto in (weak, strong))
    assert far > 5 * near > 0
    (weak_hits, weak_kl), (strong_hits, strong_kl) = measured(weak, 4 / 255), measured(strong, 4 / 255)
    assert strong_hits > weak_hits + 0.05 and strong_kl < 0.5 * weak_kl


def rise(proto: ProtoNet, length: float) -> float:
    """Return the mean rise of the clean loss after an ascent step of that relative length on every factor."""
    rises = []
    for number in range(10):
        batch = episode(2000 + number, 7, queries=10)
        other = copy.deepcopy(proto)
        factors = {name: p for name, p in other.named_parameters() if ".lora_" in name}
        loss = EpisodeObjective(other)(batch)["loss"]
        nu = weight_perturbation(loss, factors, length)
        with torch.no_grad():
            for name, p in factors.items():
                p.add_(nu[name])
            rises.append(EpisodeObjective(other)(batch)["loss"] - loss)
    return float(torch.stack(rises).mean())


@pytest.mark.slow
def test_the_weight_attack_flattens_the_loss() -> None:
    """E4."""
    with_it, without = (train(adapted(), Adversary(epsilons=(0.0,), gamma=gamma), 60) for gamma in (0.02, 0.0))
    assert 0 < rise(with_it, 0.02) < 0.75 * rise(without, 0.02)


def test_switches_change_what_is_learned() -> None:
    """E8: no two settings of the attacks give the same weights after one step."""
    settings = {
        "both": {},
        "no input attack": {"epsilons": (0.0,)},
        "no weight attack": {"weight_attack": "none"},
        "neither": {"epsilons": (0.0,), "weight_attack": "none"},
        "paper's form": {"weight_attack": "paper", "gamma": 0.2},
        "clean support": {"support": "clean"},
        "other kl": {"kl": "adv_clean"},
        "weight": {"weight": 1.0},
        "one level": {"pyramid": ((None, 1.0),)},
        "steps": {"steps": 1},
        "ratio": {"step_ratio": 0.1},
        "seed": {"seed": 1},
    }
    marks = {}
    for name, change in settings.items():
        proto = train(adapted(), Adversary(**{"epsilons": (1 / 255,), "gamma": 0.02, **change}), 1)
        marks[hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in proto.parameters())).hexdigest()] = name
    assert len(marks) == len(settings)


# ---- several processes

WORKER = """
import sys, torch
from helpers.amt_parts import adapted, episode
from vismt.config.sections import TrainConfig
from vismt.engine import loop, runtime
from vismt.metatune.amt.method import AdversarialObjective, Adversary
accelerator = runtime.accelerator()
weight, support, folder, accumulate = sys.argv[1:]
proto = adapted()
objective = AdversarialObjective(proto, Adversary(epsilons=(1 / 255,), weight_attack=weight, support=support, gamma=0.02))
settings = TrainConfig(steps=3, optimizer="sgd", lr=0.05, clip=None, accumulate=int(accumulate))
loop.train(objective, episode, settings, __import__("pathlib").Path(folder), "hash", accelerator, seed=0)
torch.save([p.detach() for p in proto.parameters()], f"{folder}-{accelerator.process_index}.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("weight", "support"), [("joint", "perturbed"), ("paper", "clean")])
def test_two_processes_train_what_one_does_with_two_episodes_a_step(
    tmp_path: Path, weight: str, support: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["-c", weight, support, str(tmp_path / "one"), "2"])
    exec(WORKER, {})
    run_two("-c", WORKER, weight, support, tmp_path / "two", 1)
    single, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one-0", "two-0", "two-1")
    )
    start = list(adapted().parameters())
    assert any(not torch.equal(a, b) for a, b in zip(start, single))
    for expected, rank_0, rank_1 in zip(single, first, second):
        assert torch.equal(rank_0, rank_1) and torch.allclose(rank_0, expected, atol=2e-5)


def test_the_objective_scores_as_the_net_does() -> None:
    """The loss uses the evaluated classifier: same prototypes, same cosine, same scale."""
    proto, batch = adapted(), episode(0)
    with torch.no_grad():
        proto.scale.fill_(4.0)
        features = proto.backbone(batch["query"])
        centres = prototypes(proto.backbone(batch["support"]), batch["support_labels"])
        loss = AdversarialObjective(proto, Adversary(epsilons=(0.0,), gamma=0.0))(batch)["loss"]
        assert torch.allclose(loss, F.cross_entropy(cosine_logits(features, centres, 4.0), batch["query_labels"]))
