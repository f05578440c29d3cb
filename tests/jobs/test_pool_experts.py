"""The experts that a pool section lists: labels, sources, threats, copies, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vismt.base.errors import UserError
from vismt.config.sections import AdaptConfig, TrainConfig, config_hash
from vismt.config.typed import build
from vismt.engine.study import TuneConfig
from vismt.jobs.fewshot.arms import (
    evaluated_models,
    merged_text,
    planned_experts,
    pool_members,
    resolve_experts,
    strategy_of,
    trained_on,
)
from vismt.jobs.fewshot.config import EvaluateConfig, FewShotConfig, PoolConfig, SelectConfig, SourceConfig
from vismt.jobs.fewshot.config_checks import check
from vismt.jobs.fewshot.data import draw_corruption
from vismt.jobs.fewshot.pool_experts import ExpertSpec

FIVE = [
    ExpertSpec(source="cifar100", level=8),
    ExpertSpec(source=["photo_crops:train", "cifar100"], level=[2, 8.5]),
    ExpertSpec(norm="l2", level=128),
    ExpertSpec(norm="corruption"),
    ExpertSpec(source="photo_crops", norm="corruption", level=3),
    ExpertSpec(norm="clean"),
    ExpertSpec(source="photo_crops", norm="clean"),
]


def configured(*specs: ExpertSpec, models: list[str] | None = None, **pool: object) -> FewShotConfig:
    return FewShotConfig(
        adapt=AdaptConfig(method="amt"),
        train=TrainConfig(),
        pool=PoolConfig(experts=list(specs), **pool),
        source=SourceConfig(data=["cifar100"], queries=3),
        evaluate=EvaluateConfig(data=["digits"], models=models or ["frozen"]),
    )


def test_labels_sources_and_threats() -> None:
    config = configured(*FIVE, pyramid=[(None, 1.0)], gamma=0.02)
    check(config)
    arms = resolve_experts(config)
    names = ["cifar100-linf8", "photo_crops-train+cifar100-linf2-8.5", "cifar100-l2-128", "cifar100-corruption"]
    assert list(arms) == [*names, "photo_crops-corruption3", "clean", "photo_crops-clean"]
    assert [arm.source.data for arm in arms.values()] == [
        ["cifar100"],
        ["photo_crops:train", "cifar100"],
        *[["cifar100"]] * 2,
        ["photo_crops"],
        ["cifar100"],
        ["photo_crops"],
    ]
    assert all(arm.source.queries == 3 and arm.training_seed == 0 for arm in arms.values())
    adversaries = [arm.adversary for arm in arms.values()]
    assert adversaries[5] is None and adversaries[6] is None
    assert [a.norm for a in adversaries[:5]] == ["linf", "linf", "l2", "corruption", "corruption"]
    assert [a.epsilons for a in adversaries[:5]] == [
        (8 / 255,),
        (2 / 255, 8.5 / 255),
        (128 / 255,),
        (1, 2, 3, 4, 5),
        (3,),
    ]
    assert all(a.pyramid == ((None, 1.0),) and a.gamma == 0.02 for a in adversaries[:5])
    # An expert "clean" is in the pool; the reference of that name is not.
    assert pool_members(config, arms) == list(arms)
    levels = FewShotConfig(pool=PoolConfig(levels=[8.0], clean=True), adapt=AdaptConfig(), train=TrainConfig())
    assert pool_members(levels, resolve_experts(levels)) == ["8"]
    # The expert is the reference as well: one training.
    assert list(resolve_experts(configured(*FIVE, clean=True))) == list(arms)
    check(configured(ExpertSpec(norm="clean"), ExpertSpec(level=8), models=["clean", "expert:clean"]))


def test_a_repeated_expert_has_another_seed_and_labels_are_yours() -> None:
    same = ExpertSpec(source="cifar100", level=8)
    arms = resolve_experts(configured(same, ExpertSpec(level=8.0), ExpertSpec(level=8, label="third"), same))
    assert list(arms) == ["cifar100-linf8", "cifar100-linf8-copy2", "third", "cifar100-linf8-copy4"]
    assert len({arm.training_seed for arm in arms.values()}) == 4


def test_levels_are_short_for_linf_experts_of_the_source() -> None:
    short = FewShotConfig(**{**vars(configured()), "pool": PoolConfig(levels=[2, [2, 8], 2])})
    long = configured(
        ExpertSpec(level=2, label="2"), ExpertSpec(level=[2, 8], label="2-8"), ExpertSpec(level=2, label="2")
    )
    plans = [planned_experts(config) for config in (short, long)]
    assert plans[0] == plans[1] and list(plans[0]) == ["2", "2-8", "2-copy2"]


def test_hashes_change_with_experts_and_rule_alone() -> None:
    plain = FewShotConfig(pool=PoolConfig())
    assert config_hash(plain) == config_hash(FewShotConfig(pool=PoolConfig(experts=[], select="paper")))
    others = [PoolConfig(select="average"), PoolConfig(experts=FIVE[:2]), PoolConfig(experts=FIVE[:3])]
    assert len({config_hash(FewShotConfig(pool=pool)) for pool in (PoolConfig(), *others)}) == 4


def test_the_strategy_of_a_model() -> None:
    config = configured(*FIVE, select="core_ties")
    names = [
        "merged",
        "merged:default",
        "merged:paper",
        "merged:tsv",
        "merged:average",
        "merged:min_ce",
        "average",
        "min_ce",
        "expert:clean",
    ]
    strategies = ["core_ties", "core_ties", "paper", "tsv", "average", "min_ce", "average", "min_ce", "expert"]
    assert [strategy_of(config, name) for name in names] == strategies


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([ExpertSpec(norm="l3", level=8)], r"pool.experts\[0\].norm: 'l3'. Near: 'l2'"),
        ([ExpertSpec(level=8), ExpertSpec(norm="clean", level=8)], r"pool.experts\[1\]: level 8 with norm clean"),
        ([ExpertSpec(norm="l2")], "norm l2 needs a budget in 1/255"),
        ([ExpertSpec(level=300)], r"\[300.0\]; a level is a budget in 1/255, from 0 to 255"),
        ([ExpertSpec(norm="l2", level=-1)], "not negative"),
        ([ExpertSpec(norm="gaussian", level=[0, 64])], r"\[0\]: \[0.0, 64.0\]; noise of level 0 is none"),
        ([ExpertSpec(norm="corruption", level=8)], "severity, 1 to 5"),
        ([ExpertSpec(level=8, label="a b")], "'a b' cannot be a name"),
        ([ExpertSpec(level=8, label="clean")], "'clean' is clean meta-tuning on source.data"),
        ([ExpertSpec(level=8, label="average")], "'average' is the mean of all experts"),
        ([ExpertSpec(source="x", norm="clean", label="clean")], "'clean' is clean meta-tuning on source.data"),
        ([ExpertSpec(level=8, label="a"), ExpertSpec(level=2, label="a")], r"\[1\]: two different experts .* 'a'"),
        ([ExpertSpec(level=[])], "no budget"),
    ],
)
def test_experts_that_cannot_be(specs: list[ExpertSpec], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(configured(*specs))


def test_a_pool_has_levels_or_experts_and_a_known_rule() -> None:
    with pytest.raises(UserError, match=r"pool: levels \[8\] and experts; give one of them"):
        PoolConfig(levels=[8], experts=FIVE)
    with pytest.raises(UserError, match=r"pool.select: 'core_tie' is not known. Near: 'core_ties'"):
        build(FewShotConfig, {"pool": {"select": "core_tie"}}, "a.yaml")
    for model, close in (
        ("merged:papre", "merged:paper"),
        ("merged:tvs", "merged:tsv"),
        ("merged:regmean", "merged:min_ce"),
    ):
        with pytest.raises(UserError, match=rf"evaluate.models: '{model}'. Near: '{close}'"):
            check(configured(*FIVE, models=[model]))


def test_the_seed_draws_one_of_the_corruptions() -> None:
    images = 0.2 + 0.6 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    changed = [draw_corruption(images, 3, seed) for seed in range(12)]
    assert all(part.shape == images.shape and part.min() >= 0 and part.max() <= 1 for part in changed)
    assert torch.equal(draw_corruption(images, 3, 5), changed[5])
    distances = {round(float((part - images).abs().mean()), 4) for part in changed}
    assert len(distances) >= 8  # several kinds, not one with several seeds


LEVEL_2 = {"levels": [2], "pyramid": [[None, 1.0]], "weight_attack": "none"}


def arms_of(**arms: dict) -> FewShotConfig:
    return FewShotConfig(
        adapt=AdaptConfig(method="lora"),
        train=TrainConfig(),
        arms=arms,
        tune=TuneConfig([1e-3, 3e-3]),
        select=SelectConfig(data=["mnist"]),
        source=SourceConfig(data=["cifar100"], queries=3),
        evaluate=EvaluateConfig(data=["digits"], models=["frozen", "adapted"]),
    )


def test_an_arm_with_a_pool_section_is_trained_as_its_expert_and_evaluated_like_the_others() -> None:
    config = arms_of(
        clean={},
        lora={"pool": LEVEL_2},
        joint={"adapt.method": "amt", "pool": {**LEVEL_2, "weight_attack": "joint", "gamma": 0.002}},
    )
    check(config)
    arms = resolve_experts(config)
    assert evaluated_models(config, list(arms)) == ["frozen", "clean", "lora", "joint"]
    assert not hasattr(arms["clean"], "adversary")
    assert (trained_on(arms["clean"]), trained_on(arms["lora"])) == ("cifar100", "cifar100 under linf 2/255")
    assert arms["lora"].adversary.epsilons == arms["joint"].adversary.epsilons == (2 / 255,)
    assert (arms["lora"].adversary.weight_attack, arms["joint"].adversary.weight_attack) == ("none", "joint")
    assert arms["joint"].adversary.gamma == 0.002 and arms["joint"].adapt.method == "amt"
    assert all(arm.tune is None and arm.arms == {} and arm.source.data == ["cifar100"] for arm in arms.values())


@pytest.mark.parametrize(
    "pool",
    [
        {**LEVEL_2, "levels": [1, 2]},
        {**LEVEL_2, "clean": True},
        {"folder": "pools/a"},
    ],
)
def test_an_arm_of_several_experts_is_refused(pool: dict) -> None:
    with pytest.raises(UserError, match=r"arms\.lora: pool: an arm is trained as one expert"):
        check(arms_of(lora={"pool": pool}))


def test_an_arm_with_the_name_of_a_rule_is_no_mixture() -> None:
    assert merged_text(configured(*FIVE), "average") == "the equal mean of the experts"
    assert merged_text(arms_of(average={}), "average") == ""


@pytest.mark.parametrize("model", ["frozen", "expert:2", "lora"])
def test_arms_stand_beside_the_pool_of_a_run(model: str) -> None:
    evaluated = EvaluateConfig(["digits"], [model])
    config = replace(arms_of(lora={"pool": None}), pool=PoolConfig(levels=[2.0]), tune=None, evaluate=evaluated)
    check(config)
    assert list(resolve_experts(config)) == ["2", "lora"]
    with pytest.raises(UserError, match=r"pool\.folder is evaluated as it is"):
        check(replace(config, pool=PoolConfig(folder="pools/ab")))
