"""Attacks, sources and corruptions of a configuration as conditions of the protocol."""

import pytest

from vismt.config import typed
from vismt.errors import UserError
from vismt.jobs.fewshot.config import FewShotConfig, check
from vismt.robustness.conditions import (
    AttackConfig,
    CorruptionConfig,
    check_conditions,
    conditions,
    corruption,
    summary,
)
from vismt.robustness.corruptions import CORRUPTIONS, CorruptionSpec
from vismt.robustness.transfer import Source, Transfer

PGD = "PGD-10 linf 4.5/255"


def test_all_is_fifteen_by_five():
    specs = CorruptionConfig().specs()
    assert len(specs) == len(set(specs)) == 75 and {spec.name for spec in specs} == set(CORRUPTIONS)
    assert CorruptionConfig("fog", [5, 1]).specs() == [CorruptionSpec("fog", 5), CorruptionSpec("fog", 1)]


def test_attacks_come_first_and_share_their_sources():
    made = []

    def source(name):
        made.append(name)
        return Source(name, None, f"of {name}")

    attacks = [
        AttackConfig(),
        AttackConfig(source="frozen"),
        AttackConfig("fgsm", source="frozen"),
        AttackConfig(source="clean"),
    ]
    found = conditions(attacks, [CorruptionConfig("snow", [2])], source)
    assert [one.describe(5) for one in found] == [
        PGD,
        f"{PGD} from frozen",
        "FGSM linf 4.5/255 from frozen",
        f"{PGD} from clean",
        "snow 2",
    ]
    assert made == ["frozen", "clean"] and isinstance(found[1], Transfer) and found[1].source is found[2].source


@pytest.mark.parametrize(
    ("attacks", "corruptions", "words"),
    [
        ([AttackConfig(source="frozen"), AttackConfig(source="frozen")], [], f"'{PGD} from frozen' is asked for twice"),
        ([], [CorruptionConfig("all", [3]), CorruptionConfig("fog", [3])], "'fog 3' is asked for twice"),
        ([], [CorruptionConfig("fgo")], "evaluate.corruptions: 'fgo'. Near: 'fog'"),
        ([], [CorruptionConfig("fog", [6])], "severity 6"),
        ([], [CorruptionConfig("fog", [])], "fog has no severities"),
        ([AttackConfig(epsilon=5)], [], "'5/255'"),
        ([AttackConfig("apgd_t")], [], "needs 4 classes, here are 3"),
    ],
)
def test_refused(attacks, corruptions, words):
    with pytest.raises(UserError) as caught:
        check_conditions(attacks, corruptions, 3)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def config(evaluate, **sections):
    raw = {"source": {"data": ["photo_crops:train"]}, "evaluate": {"data": ["digits"], **evaluate}, **sections}
    return typed(raw, FewShotConfig, "test.yaml")


@pytest.mark.parametrize(
    ("evaluate", "sections", "words"),
    [
        ({"attacks": [{"source": "frosen"}]}, {}, "evaluate.attacks: source: 'frosen'"),
        ({"attacks": [{"source": "logits+finetune"}]}, {"pool": {}}, "no weights to tune"),
        ({"attacks": [{"source": "clean"}]}, {"pool": {}}, "needs pool.clean"),
        ({"attacks": [{"source": "adapted"}], "models": ["frozen"]}, {"train": None}, "'adapted' needs a training"),
        ({"masking_episodes": 1}, {}, "evaluate.masking_episodes: 1"),
        ({}, {"pool": {}, "select": {"class_share": 0.5, "attack": {"source": "frozen"}}}, "select.attack"),
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


def test_which_conditions_are_corruptions():
    assert corruption("glass_blur 4") == ("glass_blur", 4)
    assert [corruption(text) for text in ("clean", PGD, "fog 6", "fog 3 from frozen", "a fog 3")] == [None] * 5


def test_the_console_tells_many_corruptions_by_their_mean():
    few = [("clean", 0.5, 0.1), ("fog 1", 0.4, 0.1)]
    assert summary(few) == "clean 50.0 ± 10.0   fog 1 40.0 ± 10.0"
    many = [("clean", 0.5, 0.1), *((f"snow {severity}", 0.1 * severity, 0.1) for severity in (1, 2, 3, 4, 5))]
    assert summary(many) == "clean 50.0 ± 10.0   mean of 5 corruptions 30.0"
