"""The discriminative VBLL head against explicit covariances, drawn weights, torch.distributions and the authors' package."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.tiny import images, tiny_vit
from helpers.vbll_parts import COVARIANCES, LABELS, covariances, features, moved_head, wave
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

import vismt
from vismt.base.errors import UserError
from vismt.config.sections import TrainConfig
from vismt.engine.optimizer import make_optimizer, with_own_prior
from vismt.llm import VBLLClassifier
from vismt.uncertainty.last_layers import log_predictive

# Loss, KL without its constant, bound of each example of `moved_head`, from vbll 0.4.9 (DiscClassification) in fp64.
PACKAGE = {
    "diagonal": (
        5.124080208647107,
        24.278163494730748,
        [-3.65049027260637, -3.0794713000910225, -4.199838064361538, -5.363614077009233, -6.65270655903988],
    ),
    "dense": (
        7.262421874546483,
        26.28773491464025,
        [-4.025663323624774, -7.618608375021067, -4.6825380592695405, -5.821180358988519, -11.238642058212331],
    ),
    "lowrank": (
        6.474506066749639,
        19.23152141081289,
        [-5.147285058748874, -4.7149807428878034, -5.311086118048498, -6.880977115831156, -8.274750788594101],
    ),
}


def drawn_logits(head: VBLLClassifier, x: Tensor, count: int) -> Tensor:
    """Return logits (count, b, k) from drawn weights and noise, not from the distribution of the logits."""
    torch.manual_seed(3)
    weights = MultivariateNormal(head.mean.detach(), covariances(head)).sample((count,))
    noise = torch.randn(count, len(x), len(head.mean), dtype=x.dtype) * head.log_noise.detach().exp()
    return torch.einsum("skd,bd->sbk", weights, x) + noise


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_logits_and_bound_in_closed_form(covariance: str) -> None:
    head, x = moved_head(covariance), features()
    mean, variance = head.logit_distribution(x)
    for b in range(5):
        for c in range(3):
            expected_variance = x[b] @ covariances(head)[c] @ x[b] + head.log_noise[c].exp() ** 2
            assert mean[b, c].item() == pytest.approx((head.mean[c] @ x[b]).item(), abs=1e-12)
            assert variance[b, c].item() == pytest.approx(expected_variance.item(), rel=1e-12)
    expected = [
        mean[b, y] - torch.log(sum(torch.exp(mean[b, c] + variance[b, c] / 2) for c in range(3)))
        for b, y in enumerate(LABELS)
    ]
    assert torch.allclose(head.bound(x, LABELS), torch.stack(expected), atol=1e-12)
    assert torch.equal(head(x), mean)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_the_numbers_of_the_package(covariance: str) -> None:
    loss, kl, bounds = PACKAGE[covariance]
    head, constant = moved_head(covariance), 3 * 6 / 2  # k d / 2, which the package leaves out of the KL
    assert head.kl().item() + constant == pytest.approx(kl, rel=1e-12)
    assert head.bound(features(), LABELS).tolist() == pytest.approx(bounds, rel=1e-12)
    assert head.loss(features(), LABELS).item() + constant / 40 == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_bound_below_expected_log_below_log_expected(covariance: str) -> None:
    head, x = moved_head(covariance), features() / 3
    logs = drawn_logits(head, x, 20_000).log_softmax(-1)[:, torch.arange(5), LABELS]
    error = logs.std(0) / math.sqrt(len(logs))
    bound = head.bound(x, LABELS)
    assert (bound <= logs.mean(0) + 3 * error).all()
    assert (logs.mean(0) - bound < 1.0).all()  # and the bound is not loose
    assert (logs.mean(0) <= logs.exp().mean(0).log()).all()


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_without_variance_the_bound_is_log_softmax(covariance: str) -> None:
    head, x = moved_head(covariance), features()
    with torch.no_grad():
        head.spread.log_std.fill_(-40)
        head.log_noise.fill_(-40)
        for name, value in head.spread.named_parameters():
            if name != "log_std":
                value.zero_()
    expected = torch.log_softmax(x @ head.mean.mT, 1)[torch.arange(5), LABELS]
    assert torch.allclose(head.bound(x, LABELS), expected, atol=1e-12)
    assert torch.allclose(head.predict(x, 3), torch.softmax(x @ head.mean.mT, 1), atol=1e-12)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_kl_is_that_of_torch(covariance: str) -> None:
    head = moved_head(covariance, rows=wave(3, 6, speed=0.4))
    posterior = MultivariateNormal(head.mean, covariances(head))
    prior = MultivariateNormal(wave(3, 6, speed=0.4).float().double(), 0.5 * torch.eye(6, dtype=torch.float64))
    assert head.kl().item() == pytest.approx(kl_divergence(posterior, prior).sum().item(), rel=1e-10)


def test_kl_vanishes_at_the_prior_alone() -> None:
    head = VBLLClassifier(8, 3, 10, rows=torch.randn(3, 8), start_std=0.5)  # the prior's std: sqrt(2 / 8)
    assert head.kl().item() == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        head.mean[1, 2] += 0.1  # 0.1^2 / (2 * 0.25)
    assert head.kl().item() == pytest.approx(0.02, abs=1e-5)


def test_logdet_of_low_rank_neither_underflows_nor_cancels() -> None:
    wide = VBLLClassifier(400, 2, 10, "lowrank", start_std=1e-3)
    assert float(torch.linalg.det(covariances(wide)[0])) == 0.0  # the determinant underflows
    assert wide.spread.logdet()[0].item() == pytest.approx(torch.logdet(covariances(wide)[0].double()).item(), rel=1e-5)
    head = moved_head("lowrank")
    with torch.no_grad():
        head.spread.factor.mul_(1e4)
        head.spread.factor[:, :, 1] = head.spread.factor[:, :, 0]  # a U of rank 1, large relative to D
    assert head.spread.logdet().tolist() == pytest.approx(torch.linalg.slogdet(covariances(head))[1].tolist(), rel=1e-6)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_gradients(covariance: str) -> None:
    head, x = moved_head(covariance), features().requires_grad_()
    names = [name for name, _ in head.named_parameters()]

    def loss(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(Loss(head), {f"head.{n}": v for n, v in zip(names, values)}, (x,))

    assert torch.autograd.gradcheck(
        loss, (x, *(value.detach().clone().requires_grad_() for value in head.parameters()))
    )


class Loss(nn.Module):
    def __init__(self, head: VBLLClassifier) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head.loss(x, LABELS)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_every_parameter_learns_from_the_first_step(covariance: str) -> None:
    head = VBLLClassifier(6, 3, 40, covariance)
    head.bound(features().float(), LABELS).mean().backward()
    for name, value in head.named_parameters():
        assert value.grad.abs().sum() > 0, name


def test_noise_prior_has_its_mode_where_it_says() -> None:
    head = VBLLClassifier(6, 3, 40, noise_dof=2.0, noise_scale=0.9).double()
    optimizer = torch.optim.LBFGS([head.log_noise], max_iter=100, tolerance_grad=1e-12)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = -head.noise_log_prior()
        value.backward()
        return value

    optimizer.step(closure)
    assert torch.exp(2 * head.log_noise).tolist() == pytest.approx(3 * [0.9 / (2 + 3 + 1)], rel=1e-5)


def test_the_prior_weighs_one_over_the_number_of_examples() -> None:
    few, many = moved_head("diagonal"), moved_head("diagonal")
    many.num_train = 80
    prior = few.kl() - few.noise_log_prior()
    difference = few.loss(features(), LABELS) - many.loss(features(), LABELS)
    assert difference.item() == pytest.approx((prior * (1 / 40 - 1 / 80)).item(), rel=1e-12)
    twice = few.loss(features().repeat(2, 1), LABELS.repeat(2))  # not over the batch
    assert twice.item() == pytest.approx(few.loss(features(), LABELS).item(), rel=1e-12)


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_predictive_is_the_mean_over_drawn_weights(covariance: str) -> None:
    head, x = moved_head(covariance), features() / 2
    drawn = drawn_logits(head, x, 20_000)
    expected = drawn.softmax(-1).mean(0)
    actual = head.predict(x, 20_000, torch.Generator().manual_seed(0))
    assert torch.allclose(actual.sum(1), torch.ones(5, dtype=x.dtype))
    assert torch.allclose(actual, expected, atol=0.01)
    # Neither the softmax of mean logits nor the bound's normaliser would pass.
    mean, variance = head.logit_distribution(x)
    assert (mean.softmax(1) - expected).abs().max() > 0.05
    assert ((mean + variance / 2).softmax(1) - expected).abs().max() > 0.05
    assert (head.predict(x) - expected).abs().max() < 0.05


@pytest.mark.parametrize("std", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("classes,nats,share", [(2, 0.001, 5e-4), (3, 0.01, 3e-3)])
def test_jobs_score_close_to_the_exact_predictive(std: float, classes: int, nats: float, share: float) -> None:
    """Logits N(m, std^2): NLL and accuracy against 20,000 draws for each of 100 examples, over labels drawn from the latter."""
    generator = torch.Generator().manual_seed(0)
    mean = 3 * torch.randn(100, classes, generator=generator)
    exact = torch.zeros(100, classes)
    for _ in range(20):
        exact += (mean + std * torch.randn(1000, 100, classes, generator=generator)).softmax(-1).sum(0) / 20_000
    head = VBLLClassifier(classes, classes, 10, rows=torch.eye(classes), start_std=1e-6, start_noise=std)
    log_p = log_predictive(head, mean)
    assert -(exact * (log_p - exact.log())).sum(1).mean() < nats  # 20 draws: 0.004 nats or more for two classes
    lost = exact.amax(1) - exact.gather(1, log_p.argmax(1, keepdim=True)).squeeze(1)
    assert lost.mean() < share


def test_the_method_of_a_prediction_can_be_named() -> None:
    head, x = moved_head("diagonal"), features()
    assert torch.equal(head.predict(x, 5, method="probit"), head.predict(x))
    drawn = [head.predict(x, number, torch.Generator().manual_seed(3), method="sample") for number in (None, 20)]
    assert torch.equal(*drawn) and not torch.equal(drawn[0], head.predict(x))
    with pytest.raises(UserError, match=r"no method 'probits'.*probit"):
        head.predict(x, method="probits")


def test_error_falls_with_the_root_of_the_samples() -> None:
    head, x = moved_head("diagonal"), features()[:1].expand(200, 6)
    exact = head.predict(x[:1], 100_000, torch.Generator().manual_seed(1))
    errors = [
        (head.predict(x, samples, torch.Generator().manual_seed(2)) - exact).square().mean().sqrt()
        for samples in (10, 1000)
    ]
    assert 8 < errors[0] / errors[1] < 12.5  # sqrt(100)


@pytest.mark.parametrize("samples", [50, None])
def test_a_vector_added_to_all_means_changes_no_prediction(samples: int | None) -> None:
    head, x = moved_head("dense"), features()
    before = head.predict(x, samples, torch.Generator().manual_seed(0))
    with torch.no_grad():
        head.mean += wave(6, speed=0.3)
    assert torch.allclose(head.predict(x, samples, torch.Generator().manual_seed(0)), before, atol=1e-12)


def test_features_of_k_times_the_size_have_k_squared_the_variance() -> None:
    head, x = moved_head("lowrank"), features()
    with torch.no_grad():
        head.log_noise.fill_(-40)
    ones, threes = head.logit_distribution(x)[1], head.logit_distribution(3 * x)[1]
    assert torch.allclose(threes, 9 * ones, rtol=1e-12)
    assert torch.allclose(head.uncertainty(x, 2)["weight_variance"], ones.mean(1))
    # At a fixed mean the entropy rises with the variance; that of a linear head falls to 0 along a ray, this one does not.
    with torch.no_grad():
        low = head.uncertainty(x, 4000, torch.Generator().manual_seed(0))
        head.spread.log_std += 1
        high = head.uncertainty(x, 4000, torch.Generator().manual_seed(0))
        assert (high["entropy"].mean(), high["mutual_information"].mean()) > (low["entropy"].mean(), 0)
        assert (high["mutual_information"] > low["mutual_information"]).all()
        linear = torch.softmax(1e4 * x @ head.mean.mT, 1)
        assert linear.max(1).values.min() > 0.999
        assert head.predict(1e4 * x, 4000, torch.Generator().manual_seed(0)).max(1).values.max() < 0.95


def test_predict_draws_logits_and_nothing_draws_before() -> None:
    head, x = VBLLClassifier(64, 3, 10), torch.randn(5, 64)
    state = torch.get_rng_state()
    head.loss(x, LABELS).backward()
    head(x)
    head.predict(x)
    VBLLClassifier(64, 3, 10, "lowrank", seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    generator, same = (torch.Generator().manual_seed(5) for _ in range(2))
    actual = head.predict(x, 7, generator)
    noise = torch.randn(7, 5, 3, generator=same)  # samples x examples x classes, where weights would be 7 x 3 x 64
    mean, variance = head.logit_distribution(x)
    assert torch.allclose(actual, torch.softmax(mean + noise * variance.sqrt(), -1).mean(0), atol=1e-6)
    assert torch.equal(torch.rand(1, generator=generator), torch.rand(1, generator=same))


def test_one_pass_of_the_backbone_whatever_the_samples() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head, self.passes = nn.Linear(4, 8), VBLLClassifier(8, 3, 10), 0
            self.backbone.register_forward_hook(lambda *_: setattr(self, "passes", self.passes + 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.head.predict(self.backbone(x), 500)

    model = Model()
    assert model(torch.randn(2, 4)).shape == (2, 3) and model.passes == 1


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_fp32_whatever_is_around(covariance: str) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    head = VBLLClassifier(64, 3, 40, covariance)
    expected = head.loss(x.float(), LABELS)
    holder = nn.ModuleDict({"head": head, "layer": nn.Linear(2, 2)})
    for convert in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.to("cpu", torch.bfloat16)):
        assert convert(holder).layer.weight.dtype != torch.float32
        assert all(value.dtype == torch.float32 for value in head.state_dict().values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head.loss(x, LABELS)
        assert head.predict(x).dtype == head(x).dtype == head.uncertainty(x)["entropy"].dtype == torch.float32
        assert torch.equal(head.kl(), head.kl())
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    loss.backward()
    assert all(value.grad.dtype == torch.float32 for value in head.parameters())


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_no_tensor_of_another_device(covariance: str) -> None:
    # Operations on mixed devices also raise on meta tensors.
    head = VBLLClassifier(6, 3, 40, covariance, device="meta")
    x, y = torch.empty(5, 6, device="meta"), torch.empty(5, dtype=torch.long, device="meta")
    assert head.loss(x, y).is_meta and head.predict(x).is_meta
    assert head.predict(x, 3, torch.Generator().manual_seed(0)).is_meta  # a CPU generator draws there


def test_starts_at_the_rows_with_the_prior_there() -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 3
    head = VBLLClassifier(50, 3, 10, rows=rows.to(torch.bfloat16), start_std=0.03, start_noise=0.2)
    x = torch.randn(4, 50)
    assert torch.equal(head(x), x @ rows.to(torch.bfloat16).float().mT)
    assert torch.allclose(head.spread.log_std.exp(), torch.tensor(0.03)) and head.log_noise.exp()[
        0
    ].item() == pytest.approx(0.2)
    # Each of 150 weights: (0.03^2 / 0.04 - log(0.03^2 / 0.04) - 1) / 2 = 1.40846; centred at 0, 9 / 0.04 / 2 more.
    assert head.kl().item() == pytest.approx(150 * 1.40846, rel=1e-4)
    head.centre.zero_()
    assert head.kl().item() > 50 * 150
    loaded = VBLLClassifier(50, 3, 10)
    loaded.load_state_dict(VBLLClassifier(50, 3, 10, rows=rows).state_dict())
    assert torch.equal(loaded.centre, rows)


def test_start_values_are_a_function_of_the_seed() -> None:
    first, same, other = (VBLLClassifier(200, 5, 10, "lowrank", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.mean, same.mean) and torch.equal(first.spread.factor, same.spread.factor)
    assert not torch.equal(first.mean, other.mean)
    assert first.mean.std().item() == pytest.approx(0.1, rel=0.1)  # sqrt(2 / 200)
    assert not first.centre.any()


def test_rates_of_their_own_and_no_decay() -> None:
    objective = nn.ModuleDict({"backbone": nn.Linear(6, 6), "head": VBLLClassifier(6, 3, 40, "lowrank")})
    config = TrainConfig(lr=0.01, weight_decay=0.1, rates={"head.spread": 30.0, "head": 3.0})
    undecayed = with_own_prior(objective)
    optimizer = make_optimizer(dict(objective.named_parameters()), config, undecayed)
    names = {id(value): name for name, value in objective.named_parameters()}
    rates = {
        names[id(p)]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert rates == {
        "backbone.weight": (0.01, 0.1),
        "backbone.bias": (0.01, 0.0),
        "head.mean": (0.03, 0.0),
        "head.log_noise": (0.03, 0.0),
        "head.spread.log_std": (0.3, 0.0),
        "head.spread.factor": (0.3, 0.0),
    }
    groups = objective.head.parameter_groups(0.01, 0.2)
    assert sum(len(group["params"]) for group in groups) == len(list(objective.head.parameters()))
    assert {(names[id(p)], group["lr"], group["weight_decay"]) for group in groups for p in group["params"]} == {
        ("head.mean", 0.01, 0.0),
        ("head.log_noise", 0.01, 0.0),
        ("head.spread.log_std", 0.2, 0.0),
        ("head.spread.factor", 0.2, 0.0),
    }


def test_trains_on_a_vit_with_low_rank_updates(tmp_path) -> None:
    x, y = images(8), torch.arange(8) % 2
    model = tiny_vit()
    model.head = VBLLClassifier(32, 2, 8)
    vismt.adapt(model, "lora", rank=2, also_train=["head"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(30):
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        losses.append(model.head.loss(pooled, y))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 1
    assert (model(x).argmax(1) == y).all()
    vismt.save_adapter(model, tmp_path / "adapter")
    stock = tiny_vit()
    stock.head = VBLLClassifier(32, 2, 8, seed=9)
    vismt.load_adapter(stock, tmp_path / "adapter")
    assert torch.equal(stock(x), model(x)) and torch.equal(stock.head.log_noise, model.head.log_noise)


def test_far_off_features_score_higher_in_every_score() -> None:
    torch.manual_seed(0)
    y = torch.arange(200) % 2
    x = torch.randn(200, 4) + torch.tensor([2.0, 0, 0, 0]) * (2 * y[:, None] - 1)
    head = VBLLClassifier(4, 2, 200, start_std=0.5)
    optimizer = torch.optim.Adam(head.parameter_groups(0.05, 0.05))
    for _ in range(200):
        optimizer.zero_grad()
        head.loss(x, y).backward()
        optimizer.step()
    clear = torch.tensor([[6.0, 0, 0, 0], [-6.0, 0, 0, 0]])
    far = torch.tensor([[0, 9.0, 9, 9], [0, -9.0, 9, -9]])  # directions without training data
    with torch.no_grad():
        inside, outside = (head.uncertainty(z, 2000, torch.Generator().manual_seed(0)) for z in (clear, far))
    assert set(inside) == {"least_confidence", "entropy", "mutual_information", "weight_variance"}
    for name in inside:
        assert inside[name].max() < outside[name].min(), name
    assert (inside["mutual_information"] <= inside["entropy"]).all() and (inside["mutual_information"] >= 0).all()
    # Without draws the scores are those of the probit, and close to those of many draws.
    with torch.no_grad():
        probit, p = head.uncertainty(far), head.predict(far)
    assert torch.allclose(probit["entropy"], -(p * p.log()).sum(1)) and "mutual_information" not in probit
    for name, scores in probit.items():
        assert torch.allclose(scores, outside[name], atol=0.02), name


def make(**changes: object) -> VBLLClassifier:
    return VBLLClassifier(**{"in_features": 6, "num_classes": 3, "num_train": 40, **changes})


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"num_train": 0}, "num_train 0; it must be a whole number, at least 1"),
        ({"num_train": 0.5}, "num_train 0.5"),
        ({"num_classes": 1}, "1 classes on 6 features"),
        ({"covariance": "diagnal"}, "no covariance 'diagnal'. Near: 'diagonal'"),
        ({"covariance_rank": 2}, "only 'lowrank' has a rank"),
        ({"covariance": "lowrank", "covariance_rank": 7}, "covariance_rank 7; it must lie in \\[1, 6\\]"),
        ({"prior_scale": 0.0}, "prior_scale leads to 0.0; it must be positive"),
        ({"start_std": -1.0}, "start_std"),
        ({"start_noise": 0.0}, "start_noise"),
        ({"noise_scale": math.inf}, "noise_scale"),
        ({"rows": torch.zeros(3, 5)}, "rows are \\(3, 5\\), needed \\(3, 6\\)"),
    ],
)
def test_what_a_head_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    "x,y,message",
    [
        (torch.zeros(2, 4, 6), torch.zeros(2).long(), "pool tokens"),
        (torch.zeros(2, 5), torch.zeros(2).long(), "needed floats \\(b, 6\\)"),
        (torch.zeros(2, 6).long(), torch.zeros(2).long(), "torch.int64"),
        (torch.zeros(2, 6), torch.zeros(2), "labels are torch.float32"),
        (torch.zeros(2, 6), torch.zeros(3).long(), "needed whole numbers \\(2,\\)"),
        (torch.zeros(2, 6), torch.tensor([0, 3]), "labels range over \\[0, 3\\], needed \\[0, 2\\]"),
        (torch.zeros(2, 6), torch.tensor([0, -100]), "labels range over \\[-100, 0\\]"),
    ],
)
def test_inputs_that_do_not_fit(x: Tensor, y: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make().loss(x, y)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"samples": 0}, "samples 0"),
        ({"samples": 2.5}, "samples 2.5"),
    ],
)
def test_predictions_that_are_none(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make().predict(torch.zeros(2, 6), **options)
