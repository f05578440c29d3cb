"""MAML, first-order MAML and MetaSGD: by hand, against learn2learn, and with unchanged learners."""

import builtins
import math
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from helpers.tiny import shake, snapshot, tiny_vit
from torch import nn

from vismt import adapt
from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError
from vismt.lowrank.files.save_load import load_adapter, save_adapter
from vismt.metatune.maml import LinearLearner, MamlNet, MamlObjective, MamlSettings

ALGORITHMS = ("maml", "fomaml", "metasgd")
NO_LIBRARY = "learn2learn is not installed (requirements.txt builds it)"


def settings(algorithm="maml", lr=0.1, steps=3, engine="func"):
    return MamlSettings(algorithm, lr, steps, engine)


def episode(ways=3, shots=2, size=16, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(ways).repeat_interleave(shots)
    parts = [torch.rand(len(labels), 3, size, size, generator=generator, dtype=dtype) for _ in range(2)]
    return {"support": parts[0], "support_labels": labels, "query": parts[1], "query_labels": labels.clone()}


def colours(number, ways=3, shots=3, queries=4):
    """Draw an episode with one bright channel for each class, in a drawn order, under noise."""
    generator = torch.Generator().manual_seed(number)
    order = torch.randperm(3, generator=generator)[:ways]
    labels = torch.arange(ways).repeat(shots + queries)
    images = torch.rand(len(labels), 3, 8, 8, generator=generator) * 0.5
    images[torch.arange(len(labels)), order[labels]] += 0.5
    split = ways * shots
    return {
        "support": images[:split],
        "support_labels": labels[:split],
        "query": images[split:],
        "query_labels": labels[split:],
    }


class Small(nn.Module):
    """A smooth convolutional backbone, with batch norm on request."""

    width = 6

    def __init__(self, norm=False, dtype=torch.float32):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1, dtype=dtype)
        self.norm = nn.BatchNorm2d(6, dtype=dtype) if norm else nn.Identity()
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for value in self.conv.parameters():
                value.copy_(torch.randn(value.shape, generator=generator) * 0.3)

    def forward(self, images):
        return self.norm(self.conv(images)).tanh().mean((2, 3))


class Scalar(nn.Module):
    """Logits (w x, 0) for x, the mean pixel."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w, dtype=torch.float64))

    def forward(self, images):
        x = images.mean((1, 2, 3))
        return torch.stack([self.w * x, torch.zeros_like(x)], 1)


def vit_learner(method="lora", ways=3, dtype=torch.float32):
    """Return a ViT with low-rank factors in qkv, moved from their start, and a head."""
    vit = tiny_vit(num_classes=0)
    adapt(vit, method, ["attn.qkv"], rank=2)
    shake(vit, 0.1)
    return LinearLearner(Backbone(vit), ways).to(dtype)


def meta_gradients(objective, batch):
    objective.zero_grad()
    metrics = objective(batch)
    metrics["loss"].backward()
    return metrics["loss"].detach(), {
        name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None
    }


# ---- numbers by hand


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slopes(w, a, b):
    """First and second derivative at w of (softplus(-w a) + softplus(w b)) / 2: x = a is of class 0, x = b of class 1."""
    first = (-a * sigmoid(-w * a) + b * sigmoid(w * b)) / 2
    return first, (a * a * sigmoid(w * a) * sigmoid(-w * a) + b * b * sigmoid(w * b) * sigmoid(-w * b)) / 2


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_steps_on_a_scalar_equal_the_derivative_by_hand(algorithm):
    w, rate, pixels = 0.7, 0.8, {"support": (0.9, 0.6), "query": (0.4, 1.0)}
    batch = {
        name: torch.tensor(x, dtype=torch.float64).view(2, 1, 1, 1).expand(2, 3, 4, 4) for name, x in pixels.items()
    }
    batch |= {"support_labels": torch.tensor([0, 1]), "query_labels": torch.tensor([0, 1])}
    g0, h0 = slopes(w, *pixels["support"])
    g1, h1 = slopes(w - rate * g0, *pixels["support"])
    outer, _ = slopes(w - rate * g0 - rate * g1, *pixels["query"])
    _, gradients = meta_gradients(MamlObjective(Scalar(w), settings(algorithm, rate, 2)), batch)
    # dw2/dw = (1 - a h0)(1 - a h1), taken as 1 in first order; dw2/da = -g0 (1 - a h1) - g1.
    expected = outer if algorithm == "fomaml" else outer * (1 - rate * h0) * (1 - rate * h1)
    assert float(gradients["proto.learner.w"]) == pytest.approx(expected, rel=1e-6)
    if algorithm == "metasgd":
        assert float(gradients["proto.rates.0"]) == pytest.approx(outer * (-g0 * (1 - rate * h1) - g1), rel=1e-6)


def test_classifier_is_plain_gradient_descent_on_the_support_set():
    learner, batch = LinearLearner(Small(), 3), episode()
    task = MamlNet(learner, settings(lr=0.2, steps=4)).classifier(batch["support"], batch["support_labels"])
    twin = LinearLearner(Small(), 3)
    descent = torch.optim.SGD(twin.parameters(), lr=0.2)
    for _ in range(4):
        descent.zero_grad()
        F.cross_entropy(twin(batch["support"]), batch["support_labels"]).backward()
        descent.step()
    assert torch.allclose(task(batch["query"]), twin(batch["query"]), atol=1e-6)


# ---- the twin and learn2learn


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_both_engines_equal_learn2learn_used_directly(algorithm):
    algorithms = pytest.importorskip("learn2learn", reason=NO_LIBRARY).algorithms
    learner, batch = LinearLearner(Small(dtype=torch.float64), 3), episode(dtype=torch.float64)
    if algorithm == "metasgd":
        whole = algorithms.MetaSGD(learner, lr=0.1)
    else:
        whole = algorithms.MAML(learner, lr=0.1, first_order=algorithm == "fomaml")
    inner = whole.clone()
    for _ in range(3):
        inner.adapt(F.cross_entropy(inner(batch["support"]), batch["support_labels"]))
    loss = F.cross_entropy(inner(batch["query"]).float(), batch["query_labels"])
    expected = torch.autograd.grad(loss, list(whole.parameters()))
    for engine in ("func", "learn2learn"):
        engine_loss, gradients = meta_gradients(MamlObjective(learner, settings(algorithm, engine=engine)), batch)
        assert abs(engine_loss - loss) < 1e-12 and len(gradients) == len(expected) == (
            8 if algorithm == "metasgd" else 4
        )
        # learn2learn lists the rates after the module, as MamlNet does.
        ordered = [gradients[f"proto.learner.{name}"] for name, _ in learner.named_parameters()]
        ordered += [gradients[f"proto.rates.{i}"] for i in range(len(gradients) - 4)]
        parameters = dict(whole.named_parameters())
        by_size = dict(zip(parameters, expected))
        direct = [by_size[f"module.{name}"] for name, _ in learner.named_parameters()]
        direct += [by_size[name] for name in parameters if name.startswith("lrs")]
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(ordered, direct, strict=True))


@pytest.mark.parametrize("method", ["lora", "pissa"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_engines_agree_on_an_adapted_vit(algorithm, method):
    pytest.importorskip("learn2learn", reason=NO_LIBRARY)
    batch, learner = episode(dtype=torch.float64), vit_learner(method, dtype=torch.float64)
    results = {}
    for engine in ("func", "learn2learn"):
        objective = MamlObjective(learner, settings(algorithm, engine=engine))
        task = objective.proto.classifier(batch["support"], batch["support_labels"])
        results[engine] = (*meta_gradients(objective, batch), task(batch["query"]))
    (loss, gradients, logits), (other, others, other_logits) = results.values()
    assert abs(loss - other) < 1e-9 and torch.allclose(logits, other_logits, rtol=0, atol=1e-9)
    assert gradients.keys() == others.keys() and len(gradients) >= 6
    assert all(torch.allclose(value, others[name], rtol=0, atol=1e-9) for name, value in gradients.items())


def test_the_engines_agree_on_shared_weights_unused_weights_and_batch_norm():
    pytest.importorskip("learn2learn", reason=NO_LIBRARY)
    batch, results = episode(dtype=torch.float64), []
    for engine in ("func", "learn2learn"):
        learner = LinearLearner(Small(norm=True, dtype=torch.float64), 3)
        learner.backbone.norm.weight = learner.backbone.norm.bias  # one tensor under two names
        with torch.no_grad():
            learner.backbone.norm.bias.fill_(0.5)
        learner.unused = nn.Parameter(torch.ones(2))
        results.append(
            (*meta_gradients(MamlObjective(learner, settings("metasgd", engine=engine)), batch), snapshot(learner))
        )
    (loss, gradients, state), (other, others, other_state) = results
    assert abs(loss - other) < 1e-12 and len(gradients) == len(others) == 10
    assert all(torch.allclose(value, others[name], atol=1e-12) for name, value in gradients.items())
    assert all(torch.allclose(value, other_state[name]) for name, value in state.items())
    assert state["backbone.norm.num_batches_tracked"] == 4  # 3 inner steps and the queries


# ---- properties of every algorithm


@pytest.fixture(params=["func", "learn2learn"])
def engine(request):
    if request.param == "learn2learn":
        pytest.importorskip("learn2learn", reason=NO_LIBRARY)
    return request.param


def test_second_order_goes_through_attention_and_the_low_rank_function_and_differs_from_first_order(engine):
    batch, learner = episode(), vit_learner()
    loss, second = meta_gradients(MamlObjective(learner, settings("maml", 0.2, engine=engine)), batch)
    same, first = meta_gradients(MamlObjective(learner, settings("fomaml", 0.2, engine=engine)), batch)
    assert abs(loss - same) < 1e-5 and second.keys() == first.keys()
    factors = [name for name in second if "lora_" in name]
    assert len(factors) == 4 and all((second[n] - first[n]).norm() > 0.01 * first[n].norm() for n in factors)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_classifier_lowers_the_support_loss_and_changes_nothing(mode, engine):
    learner, batch = LinearLearner(Small(norm=True), 3), colours(0)
    net = getattr(MamlNet(learner, settings("metasgd", 0.5, 5, engine)), mode)()
    before, flags = snapshot(net), [p.requires_grad for p in net.parameters()]
    with torch.no_grad():
        task = net.classifier(batch["support"], batch["support_labels"])
        adapted = F.cross_entropy(task(batch["support"]), batch["support_labels"])
        copy = LinearLearner(Small(norm=True), 3).train(mode == "train")
        assert adapted < F.cross_entropy(copy(batch["support"]), batch["support_labels"]) - 0.1
    after = snapshot(net)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert [p.requires_grad for p in net.parameters()] == flags and all(p.grad is None for p in net.parameters())
    assert task.training == net.training == (mode == "train")


def test_only_what_is_trainable_adapts(engine):
    batch, learner = episode(), vit_learner("pissa")
    net = MamlNet(learner, settings(steps=2, engine=engine))
    trainable = {name for name, value in learner.named_parameters() if value.requires_grad}
    assert {name.rsplit(".", 1)[1] for name in trainable} == {"lora_A", "lora_B", "weight", "bias"}
    assert {name for name in trainable if not name.endswith(("lora_A", "lora_B"))} == {"head.weight", "head.bias"}
    net.requires_grad_(False)  # as an evaluation does with its models
    task = net.eval().classifier(batch["support"], batch["support_labels"])
    parameters = dict(learner.named_parameters())
    assert not any(value.requires_grad for value in parameters.values())
    moved = {
        name for name, value in task.weights.items() if name in parameters and not torch.equal(value, parameters[name])
    }
    assert moved == trainable == set(task.weights) & set(parameters)
    images = batch["query"].clone().requires_grad_()
    task(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_learned_rates_get_gradients_and_are_used_at_test(engine):
    batch = episode()
    objective = MamlObjective(LinearLearner(Small(), 3), settings("metasgd", 0.1, 1, engine))
    net = objective.proto
    assert len(net.rates) == 4 and all(bool((rate == 0.1).all()) for rate in net.rates)
    _, gradients = meta_gradients(objective, batch)
    assert all(gradients[f"proto.rates.{i}"].abs().sum() > 0 for i in range(4))
    with torch.no_grad():
        for rate in net.rates:
            rate.zero_()
    still = net.classifier(batch["support"], batch["support_labels"])
    assert torch.equal(still(batch["query"]), net.learner(batch["query"]))
    with torch.no_grad():
        net.rates[net.adapted.index("head.bias")].fill_(1)
    moved = net.classifier(batch["support"], batch["support_labels"]).weights
    assert [name for name, value in net.learner.named_parameters() if not torch.equal(value, moved[name])] == [
        "head.bias"
    ]


def test_a_classifier_equals_the_training_forward_pass():
    batch, net = episode(), MamlNet(LinearLearner(Small(), 3), settings("maml"))
    task = net.classifier(batch["support"], batch["support_labels"])
    trained = net(batch["support"], batch["support_labels"], batch["query"])
    assert torch.allclose(trained, task(batch["query"]), atol=1e-6) and trained.requires_grad
    with torch.no_grad():
        silent = net(batch["support"], batch["support_labels"], batch["query"])
    assert torch.allclose(trained, silent, atol=1e-6) and not silent.requires_grad


def test_bfloat16_autocast_is_finite(engine):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, gradients = meta_gradients(MamlObjective(vit_learner(), settings(engine=engine)), episode())
    assert loss.dtype == torch.float32 and all(bool(g.isfinite().all()) and g.norm() > 0 for g in gradients.values())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_meta_training_lowers_the_query_loss_of_new_episodes(algorithm):
    objective = MamlObjective(LinearLearner(Small(), 3), settings(algorithm, 0.5, 2))

    def held_out():
        with torch.no_grad():
            return float(sum(objective(colours(1000 + k))["loss"] for k in range(8))) / 8

    before = held_out()
    descent = torch.optim.Adam(objective.parameters(), lr=0.03)
    for step in range(40):
        descent.zero_grad()
        objective(colours(step))["loss"].backward()
        descent.step()
    # The labels' order changes from episode to episode: without adapting, no start is better than log 3.
    assert held_out() < 0.5 * before and held_out() < 0.5 * math.log(3)


# ---- what a run keeps


def test_a_saved_run_gives_the_same_classifier(tmp_path):
    batch, net = episode(), MamlNet(vit_learner(), settings("metasgd"))
    shake(net, 0.02)
    save_adapter(net.learner.backbone.vit, tmp_path / "adapter")
    payload = safetensors.torch.save({name: value.detach() for name, value in net.own_tensors().items()})
    tensors = safetensors.torch.load(payload)
    factors = [f"backbone.vit.blocks.{i}.attn.qkv.lora_{x}" for i in range(2) for x in "AB"]
    assert set(tensors) == {"head.weight", "head.bias", "rates.head.weight", "rates.head.bias"} | {
        f"rates.{f}" for f in factors
    }
    vit = load_adapter(tiny_vit(num_classes=0), tmp_path / "adapter")
    other = MamlNet(LinearLearner(Backbone(vit), 3, seed=9), net.settings)
    other.load_own_tensors(tensors, "run 'x'")
    logits = [
        maml.eval().classifier(batch["support"], batch["support_labels"])(batch["query"]) for maml in (net, other)
    ]
    assert torch.equal(*logits)
    with pytest.raises(UserError, match=r"run 'x': unexpected 'rates\."):
        MamlNet(other.learner, settings("maml")).load_own_tensors(tensors, "run 'x'")
    assert set(MamlNet(LinearLearner(Small(), 3), settings()).own_tensors()) == {
        "backbone.conv.weight",
        "backbone.conv.bias",
        "head.weight",
        "head.bias",
    }


def test_the_head_is_a_function_of_its_seed_alone():
    backbone, state = Small(), torch.get_rng_state()
    first, same, other = (LinearLearner(backbone, 4, seed=seed).head.weight for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, same) and not torch.equal(first, other) and 0 < first.abs().max() <= 6**-0.5
    half = LinearLearner(Small().to(torch.bfloat16), 4)
    assert half(torch.rand(2, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.float32


# ---- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"algorithm": "fo-maml"}, r"meta.algorithm: 'fo-maml' is not known. Near: 'fomaml'"),
        ({"engine": "learn2lern"}, r"meta.engine: 'learn2lern' is not known. Near: 'learn2learn'"),
        ({"inner_lr": 0.0}, r"meta.inner_lr is 0.0; it must be above 0"),
        ({"inner_lr": math.nan}, r"meta.inner_lr is nan; a number must be finite"),
        ({"inner_steps": 0}, r"meta.inner_steps is 0"),
    ],
)
def test_settings_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        MamlNet(LinearLearner(Small(), 3), replace(settings(), **change))


@pytest.mark.parametrize("ways", [2, 4])
def test_an_episode_of_other_ways_is_refused(ways, engine):
    batch, objective = episode(ways), MamlObjective(LinearLearner(Small(), 3), settings(engine=engine))
    with pytest.raises(UserError, match=f"the episode has {ways} ways, the learner 3 outputs"):
        objective(batch)
    with pytest.raises(UserError, match=f"the episode has {ways} ways, the learner 3 outputs"):
        objective.proto.classifier(batch["support"], batch["support_labels"])


def test_support_learner_and_width_are_checked():
    net = MamlNet(LinearLearner(Small(), 3), settings())
    with pytest.raises(UserError, match=r"support of images \(4, 3, 8, 8\), labels \(3,\)"):
        net.classifier(torch.rand(4, 3, 8, 8), torch.arange(3))
    with pytest.raises(UserError, match="Conv2d has no attribute width"):
        LinearLearner(nn.Conv2d(3, 4, 1), 3)
    with pytest.raises(UserError, match="a learner of 1 ways"):
        LinearLearner(Small(), 1)
    with pytest.raises(UserError, match="nothing is trainable in LinearLearner"):
        MamlNet(LinearLearner(Small(), 3).requires_grad_(False), settings())
    with pytest.raises(UserError, match=r"3 ways, the learner \(6, 4, 8, 8\) outputs"):
        MamlObjective(nn.Conv2d(3, 4, 1), settings())(episode(size=8))


@pytest.mark.parametrize("how", ["wrapped", "in place"])
def test_compiled_modules_are_refused(how):
    learner = LinearLearner(Small(), 3)
    if how == "wrapped":
        learner.backbone = torch.compile(learner.backbone)
    else:
        learner.backbone.compile()
    with pytest.raises(UserError, match=r"'backbone' is compiled: torch\.compile has no second derivative"):
        MamlNet(learner, settings())


def test_a_missing_learn2learn_is_refused_at_once(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "learn2learn":
            raise ImportError("No module named 'learn2learn'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r'pip install "vismt\[meta\]".*engine \'func\'') as caught:
        MamlNet(LinearLearner(Small(), 3), settings(engine="learn2learn"))
    assert "\n" not in str(caught.value)
