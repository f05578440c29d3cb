"""Attacks, sources and corruptions of a configuration as conditions of the protocol."""

from functools import partial

import pytest

from vismt.base.errors import UserError
from vismt.config.typed import build
from vismt.evaluation.attacks import Attacks
from vismt.evaluation.corruptions import Corruptions
from vismt.evaluation.sections import perturbations
from vismt.jobs.fewshot.config import FewShotConfig
from vismt.jobs.fewshot.config_checks import check
from vismt.robustness.conditions import (
    AttackConfig,
    CorruptionConfig,
    Transfer,
    TransferSource,
    condition_of,
    worst_cases,
)
from vismt.robustness.corruptions import CORRUPTIONS, CorruptionSpec
from vismt.uncertainty.features import Inputs
from vismt.uncertainty.intervals import Condition

PGD = "PGD-10 linf 4.5/255"


def test_all_is_fifteen_by_five():
    specs = CorruptionConfig().specs()
    assert len(specs) == len(set(specs)) == 75 and {spec.name for spec in specs} == set(CORRUPTIONS)
    assert CorruptionConfig("fog", [5, 1]).specs() == [CorruptionSpec("fog", 5), CorruptionSpec("fog", 1)]


def test_attacks_come_first_and_share_their_sources():
    names = []

    def source(name):
        names.append(name)
        return TransferSource(name, None, f"of {name}")

    attacks = [
        AttackConfig(),
        AttackConfig(source="frozen"),
        AttackConfig("fgsm", source="frozen"),
        AttackConfig(source="clean"),
    ]
    features = [Attacks(attacks), Corruptions([CorruptionConfig("snow", [2])])]
    specs = perturbations(features, Inputs(source=source))
    assert [spec.describe(5) for spec in specs] == [
        PGD,
        f"{PGD} from frozen",
        "FGSM linf 4.5/255 from frozen",
        f"{PGD} from clean",
        "snow 2",
    ]
    assert names == ["frozen", "clean"] and isinstance(specs[1], Transfer) and specs[1].source is specs[2].source


@pytest.mark.parametrize(
    ("attacks", "corruptions", "words"),
    [
        ([AttackConfig(source="frozen"), AttackConfig(source="frozen")], [], f"'{PGD} from frozen' is asked for twice"),
        ([], [CorruptionConfig("all", [3]), CorruptionConfig("fog", [3])], "'fog 3' is asked for twice"),
        ([], [CorruptionConfig("fgo")], "corruption.name: 'fgo' is not known. Near: 'fog'"),
        ([], [CorruptionConfig("fog", [6])], "corruption.severity is 6"),
        ([], [CorruptionConfig("fog", [])], "fog has no severities"),
        ([AttackConfig(epsilon=5)], [], "'5/255'"),
        ([AttackConfig("apgd_t")], [], "needs 4 classes, here are 3"),
    ],
)
def test_refused(attacks, corruptions, words):
    with pytest.raises(UserError) as caught:
        source = partial(TransferSource, task=None, fingerprint="")
        perturbations([Attacks(attacks), Corruptions(corruptions)], Inputs(3, source=source))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def config(evaluate, **sections):
    raw = {"source": {"data": ["photo_crops:train"]}, "evaluate": {"data": ["digits"], **evaluate}, **sections}
    return build(FewShotConfig, raw, "test.yaml")


@pytest.mark.parametrize(
    ("evaluate", "sections", "words"),
    [
        ({"attacks": [{"source": "frosen"}]}, {}, "evaluate.attacks: source: 'frosen'"),
        ({"attacks": [{"source": "logits+finetune"}]}, {"pool": {}}, "no weights to tune"),
        ({"attacks": [{"source": "clean"}]}, {"pool": {}}, "needs pool.clean"),
        ({"attacks": [{"source": "adapted"}], "models": ["frozen"]}, {"train": None}, "'adapted' needs a training"),
        ({}, {"pool": {}, "select": {"data": ["dtd10"], "attack": {"source": "frozen"}}}, "select.attack"),
        (
            {"ways": 3},
            {"pool": {}, "select": {"data": ["dtd10"], "attack": {"name": "apgd_t"}}},
            "needs 4 classes, here are 3",
        ),
        (
            {"attacks": [{"source": "adapted"}]},
            {"arms": {"a": {}, "b": {}}},
            "stands for all arms of this run; name one of a, b",
        ),
    ],
)
def test_sources_are_models_that_the_run_will_have(evaluate, sections, words):
    if "pool" in sections:
        evaluate = {"models": ["frozen"], **evaluate}
    with pytest.raises(UserError) as caught:
        check(config(evaluate, **sections))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_source_needs_not_be_evaluated():
    check(config({"models": ["frozen"], "attacks": [{"source": "merged+finetune"}]}, pool={}))
    check(config({"models": ["frozen"], "attacks": [{"source": "frozen"}]}, train=None))
    check(config({"models": ["frozen", "a"], "attacks": [{"source": "b"}]}, arms={"a": {}, "b": {"adapt.rank": 2}}))


def test_conditions_know_their_label_and_kind():
    attack, fog = AttackConfig().spec(), CorruptionSpec("fog", 3)
    transfer = Transfer(attack, TransferSource("frozen", None, "a"))
    assert [condition.label for condition in (attack, transfer, fog)] == [PGD, f"{PGD} from frozen", "fog 3"]
    assert [condition.kind for condition in (attack, transfer, fog)] == ["attack", "attack", "corruption"]
    assert (fog.name, fog.severity) == ("fog", 3) and set(fog.settings()) == {"name", "severity", "seed"}


def test_a_score_is_filed_under_family_and_level():
    attack = AttackConfig(epsilon="8/255").spec()
    transfer = Transfer(attack, TransferSource("frozen", None, "a"))
    assert condition_of(attack) == Condition("PGD-10 linf 8/255", "attack", "PGD linf", 8 / 255)
    assert condition_of(transfer) == Condition(
        "PGD-10 linf 8/255 from frozen", "attack", "PGD linf from frozen", 8 / 255
    )
    assert condition_of(CorruptionSpec("fog", 3)) == Condition("fog 3", "corruption", "fog", 3.0)
    auto = AttackConfig("autoattack").spec()
    assert condition_of(auto, 3).label == "AutoAttack (APGD-CE x5+FAB-T+Square) linf 4.5/255"


def test_attacks_of_one_budget_have_a_worst_case():
    specs = [AttackConfig(name).spec() for name in ("pgd", "pgd_paper", "apgd_ce")]
    specs += [AttackConfig("pgd", epsilon=0.5, norm="l2").spec(), CorruptionSpec("fog", 3)]
    specs += [Transfer(AttackConfig("fgsm").spec(), TransferSource("frozen", None, "a"))]  # not white-box
    (worst,) = worst_cases(specs, 5)
    assert worst.condition == Condition("worst of 2 linf 4.5/255", "attack", "worst linf", 4.5 / 255)
    assert worst.attacks == (PGD, "APGD-CE linf 4.5/255")
    assert worst_cases(specs[1:], 5) == []
