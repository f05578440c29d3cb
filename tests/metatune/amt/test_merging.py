"""Scores and mixtures by hand and against loops (I8, I9), trimming (I10), tasks of a pool (I11, I12), E3, E5, E6."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.amt_parts import adapted, backbone, episode, same, saved, train
from helpers.tiny import shake, snapshot
from torch import Tensor

from vismt.base.errors import UserError
from vismt.lowrank.files.save_load import save_adapter
from vismt.metatune.amt.merging import PoolNet, trim
from vismt.metatune.amt.method import Adversary
from vismt.metatune.amt.pool import Expert, ExpertPool
from vismt.metatune.amt.selection_rules import MergeSettings, expert_scores, mixture_weights
from vismt.metatune.finetuning.finetune import FineTuned, FineTuneSettings
from vismt.metatune.functional import WithWeights
from vismt.metatune.protonet import cosine_logits, prototypes

CLEAN = Adversary(epsilons=(0.0,), weight_attack="none")


def rand(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> ExpertPool:
    return ExpertPool(backbone(), saved(tmp_path_factory.mktemp("experts"), (3, 4, 5)))


def task(pool: ExpertPool, number: int = 0, domain: str = "texture", shots: int = 2, **settings: object) -> tuple:
    """The classifier of an episode, and the episode."""
    batch = episode(number, 5, domain, shots=shots)
    return PoolNet(pool, MergeSettings(**settings)).classifier(batch["support"], batch["support_labels"]), batch


# ---- scores


def test_scores_by_hand() -> None:
    # One expert, three classes, class 0 with two images. Own cosines .9 and .7 | .5 | .4.
    cosines = torch.tensor([[[0.9, 0.1, 0.2], [0.7, 0.3, 0.4], [0.2, 0.5, 0.0], [-0.3, 0.1, 0.4]]])
    scores, compact, divergent = expert_scores(cosines, torch.tensor([0, 0, 1, 2]), 0.6)
    # C = (.8 + .5 + .4) / 3 = .566667; over images it would be .625.
    assert float(compact) == pytest.approx(1.7 / 3)
    # V = ((.15 + .35) / 2 + .1 + -.1) / 3 = .083333: each term the mean over the N - 1 = 2 other classes.
    assert float(divergent) == pytest.approx(0.25 / 3)
    assert float(scores) == pytest.approx(0.6 * 1.7 / 3 - 0.4 * 0.25 / 3)


def looped(cosines: Tensor, labels: Tensor, balance: float) -> Tensor:
    scores = []
    ways = cosines.shape[2]
    for by_expert in cosines.tolist():
        compact = divergent = 0.0
        for k in range(ways):
            rows = [row for row, label in zip(by_expert, labels.tolist()) if label == k]
            compact += sum(row[k] for row in rows) / len(rows) / ways
            divergent += sum(sum(row[j] for j in range(ways) if j != k) / (ways - 1) for row in rows) / len(rows) / ways
        scores.append(balance * compact - (1 - balance) * divergent)
    return torch.tensor(scores, dtype=torch.float64)


@pytest.mark.parametrize("ways", [2, 5])
@pytest.mark.parametrize("balance", [0.0, 0.3, 1.0])
def test_scores_equal_a_double_loop(ways: int, balance: float) -> None:
    labels = torch.cat([torch.arange(ways), torch.randint(ways, (9,), generator=torch.Generator().manual_seed(1))])
    cosines = rand(4, len(labels), ways)
    scores, compact, divergent = expert_scores(cosines, labels, balance)
    assert torch.allclose(scores, looped(cosines, labels, balance), atol=1e-12)
    assert compact.abs().max() <= 1 and divergent.abs().max() <= 1
    # The order of the support and the names of the classes do not matter.
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2))
    names = torch.randperm(ways, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(expert_scores(cosines[:, order], labels[order], balance)[0], scores, atol=1e-12)
    renamed = torch.empty_like(cosines)
    renamed[..., names] = cosines
    assert torch.allclose(expert_scores(renamed, names[labels], balance)[0], scores, atol=1e-12)


def test_the_balance() -> None:
    """1 asks for compactness alone, 0 for the smallest divergence; half precision is widened."""
    cosines, labels = rand(5, 6, 3), torch.arange(3).repeat(2)
    _, compact, divergent = expert_scores(cosines, labels)
    assert int(expert_scores(cosines, labels, 1.0)[0].argmax()) == int(compact.argmax())
    assert int(expert_scores(cosines, labels, 0.0)[0].argmax()) == int(divergent.argmin())
    assert expert_scores(cosines.half(), labels)[0].dtype == torch.float32
    same_class = F.one_hot(labels, 3).bool().expand_as(cosines)
    assert torch.allclose(expert_scores(torch.where(same_class, cosines, 0.7), labels, 1.0)[0], compact, atol=1e-12)


@pytest.mark.parametrize(
    ("cosines", "labels", "message"),
    [
        (torch.ones(3, 4), torch.arange(3), r"\(3, 4\)"),
        (torch.ones(2, 3, 1), torch.zeros(3), "N > 1"),
        (torch.ones(2, 3, 2), torch.tensor([0, 1]), r"labels \(2,\)"),
        (torch.ones(2, 2, 2), torch.tensor([0, 2]), "run to 2 for 2"),
        (torch.ones(2, 2, 2), torch.tensor([-1, 1]), "labels run"),
        (torch.ones(2, 2, 2), torch.tensor([1, 1]), "of class 0 of 2"),
    ],
)
def test_scores_that_cannot_be(cosines: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        expert_scores(cosines, labels)


# ---- the mixture


def test_mixture_by_hand() -> None:
    # Top two of (.2, .5, .1, .4) at beta 10: softmax(5, 4) = (.731059, .268941); over all four it would be (.033, .665, ...).
    zeta = mixture_weights(torch.tensor([0.2, 0.5, 0.1, 0.4]), 10.0, 2)
    assert zeta.tolist() == pytest.approx([0, 0.731059, 0, 0.268941], abs=1e-6)
    # The paper's form: w = exp(-beta (1 - score)) over the kept, divided by their sum.
    w = [torch.tensor(-10 * (1 - score)).exp() for score in (0.5, 0.4)]
    assert zeta[1] == pytest.approx(float(w[0] / (w[0] + w[1])))
    # Scores lie close together: at beta 1 a difference of .01 has little effect, the choice of the k has.
    assert mixture_weights(torch.tensor([0.51, 0.5, 0.1]), 1.0, 2).tolist() == pytest.approx(
        [0.5025, 0.4975, 0], abs=1e-4
    )


@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
@pytest.mark.parametrize("beta", [0.0, 1.0, 12.0, 1e6])
def test_a_mixture_sums_to_one_over_k(beta: float, top_k: int) -> None:
    scores = rand(5).float()
    zeta = mixture_weights(scores, beta, top_k)
    kept = scores.argsort(descending=True)[:top_k]
    assert float(zeta.sum()) == pytest.approx(1, abs=1e-6) and bool((zeta >= 0).all()) and bool(zeta.isfinite().all())
    assert set(zeta.nonzero()[:, 0].tolist()) <= set(kept.tolist())
    assert torch.allclose(zeta[kept], torch.softmax(beta * scores[kept], 0))
    if beta == 0:
        assert torch.allclose(zeta[kept], torch.tensor(1 / min(top_k, 5)))
    if beta == 1:
        assert len(zeta.nonzero()) == min(top_k, 5)


def test_equal_scores_keep_the_first() -> None:
    assert mixture_weights(torch.zeros(4), 1.0, 2).tolist() == [0.5, 0.5, 0, 0]
    assert mixture_weights(torch.ones(1), 3.0, 2).tolist() == [1.0]
    for scores, top_k in ((torch.zeros(2, 2), 1), (torch.zeros(0), 1), (torch.zeros(3), 0)):
        with pytest.raises(UserError, match="top_k"):
            mixture_weights(scores, 1.0, top_k)


# ---- a task of the pool


def test_the_router_written_out(pool: ExpertPool) -> None:
    """Cosines without the scale, each expert's prototypes, zeta of the support alone, W(zeta) for the queries."""
    classifier, batch = task(pool, beta=7.0, balance=0.4, top_k=2)
    labels, cosines = batch["support_labels"], []
    with torch.no_grad():
        for index in range(3):
            features = WithWeights(pool.backbone, pool.expert_weights(index))(batch["support"])
            centres = torch.stack([features[labels == k].mean(0) for k in range(3)])
            cosines.append(F.normalize(features) @ F.normalize(centres).T)
        scores = looped(torch.stack(cosines), labels, 0.4)
        kept = scores.topk(2).indices
        zeta = torch.zeros(3)
        zeta[kept] = torch.softmax(7 * scores[kept], 0).float()
        assert torch.allclose(classifier.mixture, zeta, atol=1e-5)
        net = WithWeights(pool.backbone, pool.weights(zeta / zeta.sum()))
        logits = cosine_logits(net(batch["query"]), prototypes(net(batch["support"]), labels), pool.scale)
        assert torch.allclose(classifier(batch["query"]), logits, atol=1e-4) and pool.scale == 11.0
    assert not any(p.grad is not None for p in pool.parameters())


def test_queries_are_never_seen_and_never_mix(pool: ExpertPool) -> None:
    """The classifier depends on the support alone; a query's logits do not depend on other queries."""
    classifier, batch = task(pool)
    whole = classifier(batch["query"])
    assert torch.allclose(whole, torch.cat([classifier(part) for part in batch["query"].split(5)]), atol=1e-5)
    changed = batch["query"].clone()
    changed[1:] = 0.5
    before = classifier.mixture.clone()
    assert torch.allclose(classifier(changed)[0], whole[0], atol=1e-5) and torch.equal(classifier.mixture, before)


@pytest.mark.parametrize("strategy", ["paper", "average", "tsv", "logits", "min_ce", "expert"])
def test_a_task_leaves_no_trace(pool: ExpertPool, strategy: str) -> None:
    options = {"strategy": strategy, "expert": "1" if strategy == "expert" else None, "trim": {"mlp.fc1": 0.5}}
    before, kept = snapshot(pool), [dict(pool.expert_weights(k)) for k in range(3)]
    copies = [{name: weight.clone() for name, weight in weights.items()} for weights in kept]
    state, flags = torch.get_rng_state(), [p.requires_grad for p in pool.parameters()]
    first, batch = task(pool, 1, **options)
    logits = first(batch["query"])
    other, _ = task(pool, 2, "shape", **options)
    again, _ = task(pool, 1, **options)
    assert torch.equal(again(batch["query"]), logits) and torch.equal(first(batch["query"]), logits)
    assert not torch.equal(other(batch["query"]), logits)
    assert same(snapshot(pool), before) and all(same(*pair) for pair in zip(kept, copies))
    assert all(same(pool.expert_weights(k), copies[k]) for k in range(3))
    assert torch.equal(torch.get_rng_state(), state) and flags == [p.requires_grad for p in pool.parameters()]


def test_gradients_reach_the_images_while_the_choice_stands(pool: ExpertPool) -> None:
    """I12: attacks need gradients. The mixture is a constant of the task and does not depend on the attacked query."""
    classifier, batch = task(pool)
    before, images = classifier.mixture.clone(), batch["query"].clone().requires_grad_()
    F.cross_entropy(classifier(images), batch["query_labels"]).backward()
    assert (
        images.grad.abs().sum() > 0 and torch.equal(classifier.mixture, before) and not classifier.mixture.requires_grad
    )
    raised = images.detach() + 4.5 / 255 * images.grad.sign()
    with torch.no_grad():
        clean, attacked = (F.cross_entropy(classifier(part), batch["query_labels"]) for part in (images, raised))
    assert attacked > clean + 0.1


def test_strategies(pool: ExpertPool) -> None:
    logits = {}
    for strategy in ("paper", "average", "tsv", "knots_ties", "logits", "min_ce", "expert"):
        classifier, batch = task(pool, 3, strategy=strategy, expert="2" if strategy == "expert" else None)
        logits[strategy] = classifier(batch["query"])
        zeta = getattr(classifier, "mixture", None)
        if strategy == "average":
            assert torch.allclose(zeta, torch.tensor(1 / 3))
        if strategy == "expert":
            assert zeta.tolist() == [0, 0, 1]
        if strategy == "min_ce":
            losses = []
            for index in range(3):
                single, _ = task(pool, 3, strategy="expert", expert=str(index))
                losses.append(F.cross_entropy(single(batch["support"]), batch["support_labels"]).detach())
            assert zeta.tolist() == F.one_hot(torch.tensor(losses).argmin(), 3).tolist()
    singles = [task(pool, 3, strategy="expert", expert=str(k))[0](batch["query"]) for k in range(3)]
    assert torch.allclose(logits["logits"], torch.stack(singles).mean(0), atol=1e-5)
    # E5: merging, averaging the weights, averaging the logits and one expert are different models.
    names = ["paper", "average", "tsv", "knots_ties", "logits", "expert"]
    for name in names:
        for other in names:
            assert name == other or (logits[name] - logits[other]).abs().max() > 0.05, (name, other)


def test_logits_equal_weights_for_equal_experts_only(tmp_path: Path) -> None:
    """Identical experts: every strategy is that expert, whatever beta, balance and k."""
    alike = ExpertPool(backbone(), saved(tmp_path, (3, 3, 3)))
    expected, batch = task(alike, strategy="expert", expert="0")
    for settings in (
        {"beta": 0.0, "top_k": 3},
        {"beta": 12.0, "balance": 0.0},
        {"balance": 1.0, "top_k": 1},
        {"strategy": "average"},
        {"strategy": "logits"},
        {"strategy": "min_ce"},
        {"strategy": "tsv"},
    ):
        assert torch.allclose(task(alike, **settings)[0](batch["query"]), expected(batch["query"]), atol=1e-3), settings


def test_all_experts_at_beta_zero_are_the_uniform_average(pool: ExpertPool) -> None:
    merged, batch = task(pool, beta=0.0, top_k=3)
    other, _ = task(pool, strategy="average")
    assert torch.allclose(merged.mixture, other.mixture) and torch.allclose(
        merged(batch["query"]), other(batch["query"]), atol=1e-5
    )


def test_a_pool_of_one(tmp_path: Path) -> None:
    single = ExpertPool(backbone(), saved(tmp_path, (3,)))
    for strategy in ("paper", "min_ce", "average"):
        classifier, _ = task(single, strategy=strategy)
        assert classifier.mixture.tolist() == [1.0]


def test_one_shot_is_perfectly_compact(pool: ExpertPool) -> None:
    """The scored image is its class's prototype, so C is 1 for every expert and V alone decides."""
    batch = episode(4, shots=1)
    support, labels = batch["support"], batch["support_labels"]
    plain = PoolNet(pool, MergeSettings()).cosines(support, labels)
    _, compact, divergent = expert_scores(plain, labels)
    assert torch.allclose(compact, torch.ones(3), atol=1e-5) and divergent.max() < 0.99
    assert int(PoolNet(pool, MergeSettings(top_k=1)).classifier(support, labels).mixture.argmax()) == int(
        divergent.argmin()
    )


def test_modes_and_the_protocols_contract(pool: ExpertPool) -> None:
    batch, pools = episode(0), pool.training
    for mode in (True, False):
        net = PoolNet(pool, MergeSettings())
        net.training = mode
        classifier = net.classifier(batch["support"], batch["support_labels"])
        # A task has its net's mode and leaves the shared modules in theirs.
        assert classifier.training == mode and not pool.backbone.training and pool.training == pools
    tuned = FineTuned(PoolNet(pool, MergeSettings()), FineTuneSettings(lr=1e-3, steps=2))
    classifier = tuned.classifier(batch["support"], batch["support_labels"])
    plain = PoolNet(pool, MergeSettings()).classifier(batch["support"], batch["support_labels"])
    assert torch.equal(classifier.mixture, plain.mixture) and not torch.equal(
        classifier(batch["query"]), plain(batch["query"])
    )
    again = PoolNet(pool, MergeSettings()).classifier(batch["support"], batch["support_labels"])
    assert torch.equal(again(batch["query"]), plain(batch["query"]))


# ---- trimming


@pytest.mark.parametrize(
    ("shape", "share", "rank"),
    [
        ((12, 8), 0.5, 4),
        ((8, 12), 0.4, 3),
        ((12, 8), 0.05, 1),
        ((12, 8), 1.0, 8),
        ((6, 2, 2, 2), 0.5, 3),
        ((9, 7), 0.99, 6),
    ],
)
def test_trimming_is_the_best_approximation(shape: tuple[int, ...], share: float, rank: int) -> None:
    weight = rand(*shape, seed=3).float()
    cut = trim(weight, share)
    U, S, V = torch.linalg.svd(weight.double().flatten(1), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ V[:rank]
    assert (
        torch.allclose(cut.flatten(1).double(), best, atol=1e-5)
        and cut.shape == weight.shape
        and cut.dtype == weight.dtype
    )
    assert int(torch.linalg.matrix_rank(cut.flatten(1), atol=1e-4)) == rank
    assert torch.allclose(trim(cut, share), cut, atol=1e-5)  # once more changes nothing
    if share == 1:
        assert torch.allclose(cut, weight, atol=1e-5)


def test_the_merged_weight_is_trimmed_where_the_settings_say(pool: ExpertPool) -> None:
    zeta = torch.tensor([0.2, 0.5, 0.3])
    whole = pool.weights(zeta)
    cut = PoolNet(pool, MergeSettings(trim={"blocks.1.mlp.fc1": 0.25, r"blocks\.0\.attn\..*": 0.5})).weights(zeta)
    for name, weight in cut.items():
        share = {
            "vit.blocks.1.mlp.fc1.weight": 0.25,
            "vit.blocks.0.attn.qkv.weight": 0.5,
            "vit.blocks.0.attn.proj.weight": 0.5,
        }
        if name not in share:
            assert torch.equal(weight, whole[name])
            continue
        rank = int(32 * share[name])
        U, S, V = torch.linalg.svd(whole[name], full_matrices=False)
        # Not W plus a trimmed update, which has full rank.
        assert torch.allclose(weight, (U[:, :rank] * S[:rank]) @ V[:rank], atol=1e-4), name
        assert not torch.allclose(weight, whole[name], atol=1e-3)
    assert (
        PoolNet(pool, MergeSettings(trim={"mlp.fc1": 1.0}))
        .weights(zeta)["vit.blocks.0.mlp.fc1.weight"]
        .allclose(whole["vit.blocks.0.mlp.fc1.weight"], atol=1e-5)
    )


@pytest.mark.parametrize("strategy", ["paper", "average", "tsv", "logits", "min_ce", "expert"])
def test_trimming_reaches_every_strategy_and_not_the_router(pool: ExpertPool, strategy: str) -> None:
    options = {"strategy": strategy, "expert": "1" if strategy == "expert" else None}
    plain, batch = task(pool, 2, **options)
    cut, _ = task(pool, 2, trim={"mlp.fc2": 0.1}, **options)
    assert (cut(batch["query"]) - plain(batch["query"])).abs().max() > 0.05
    assert hasattr(plain, "mixture") == (strategy not in ("logits", "tsv"))
    if hasattr(plain, "mixture"):
        assert torch.equal(cut.mixture, plain.mixture)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "merged"}, "merging.strategy: 'merged' is not known. Near: 'average'"),
        ({"beta": -1.0}, "merging.beta is -1.0"),
        ({"beta": float("inf")}, "beta is inf; a number must be finite"),
        ({"balance": 1.1}, "balance is 1.1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"trim": {"mlp.fc1": 0.0}}, "merging.trim.mlp.fc1 is 0.0"),
        ({"trim": {"mlp.fc1": 30}}, "mlp.fc1 is 30; it must be above 0 and at most 1"),
        ({"trim": {"mlp.fc3": 0.5}}, "merging.trim: no module matches 'mlp.fc3'. Near: 'mlp.fc"),
        ({"strategy": "expert"}, "no expert 'None'"),
        ({"strategy": "expert", "expert": "7"}, "no expert '7'; the pool has 0, 1, 2"),
    ],
)
def test_errors(pool: ExpertPool, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PoolNet(pool, MergeSettings(**change))


# ---- experiments


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> ExpertPool:
    """An expert of shapes, an expert of textures, and two with random changes."""
    folder, experts = tmp_path_factory.mktemp("mixed"), []
    for label in ("drifted", "shape", "texture", "lost"):
        proto = adapted()
        if label in ("shape", "texture"):
            train(proto, CLEAN, 70, 0.05, label)
        else:
            shake(proto.backbone.vit, 0.2, len(label))
        experts.append(Expert(label, save_adapter(proto.backbone.vit, folder / label)))
    return ExpertPool(backbone(), experts)


@pytest.mark.parametrize("domain", ["shape", "texture"])
def test_the_router_finds_the_expert_of_the_domain(mixed: ExpertPool, domain: str) -> None:
    """E3: among the two kept in more than four of five tasks, but not with shuffled labels."""
    kept = first = 0
    spread, lost, right = [], [], mixed.index(domain)
    net = PoolNet(mixed, MergeSettings())
    for number in range(20):
        batch = episode(5000 + number, 11, domain, shots=5)
        support, labels = batch["support"], batch["support_labels"]
        zeta = net.classifier(support, labels).mixture
        assert len(zeta.nonzero()) == 2 and float(zeta.sum()) == pytest.approx(1)
        kept += bool(zeta[right] > 0)
        first += int(zeta.argmax()) == right
        shuffled = labels[torch.randperm(15, generator=torch.Generator().manual_seed(number))]
        spread.append(expert_scores(net.cosines(support, labels), labels)[0])
        lost.append(expert_scores(net.cosines(support, shuffled), shuffled)[0])
    assert kept > 16 and first > 12
    real, none = torch.stack(spread).mean(0), torch.stack(lost).mean(0)
    assert real[right] > none[right] + 0.15 and none.max() - none.min() < 0.5 * (real.max() - real.min())


def score(pool: ExpertPool, domain: str, **settings: object) -> float:
    hits = []
    for number in range(10):
        batch = episode(7000 + number, 13, domain, shots=5)
        classifier = PoolNet(pool, MergeSettings(**settings)).classifier(batch["support"], batch["support_labels"])
        hits.append((classifier(batch["query"]).argmax(1) == batch["query_labels"]).float().mean())
    return float(torch.stack(hits).mean())


def test_merging_helps_and_a_little_trimming_does_not_hurt(mixed: ExpertPool) -> None:
    """E5, E6: the choice beats the average of all; accuracy is flat in the share kept, then falls."""
    merged, average = (score(mixed, "texture", **options) for options in ({"beta": 12.0}, {"strategy": "average"}))
    drifted = score(mixed, "texture", strategy="expert", expert="lost")
    assert merged > drifted + 0.1 and merged != average
    shares = [
        score(mixed, "texture", beta=12.0, trim={"attn.proj": share, "mlp.fc1": share}) for share in (1.0, 0.8, 0.05)
    ]
    assert shares[0] == pytest.approx(merged, abs=0.02) and shares[1] > merged - 0.1 and shares[2] < shares[0] - 0.1
