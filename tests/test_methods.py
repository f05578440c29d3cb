"""Names of methods and options: words of other libraries are answered with those of vismt."""

from __future__ import annotations

import pytest
from helpers.tiny import tiny_vit

import vismt
from vismt.base.errors import UserError
from vismt.config.sections import AdaptConfig, RunConfig
from vismt.config.typed import build
from vismt.methods import METHODS, known_method


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("lora", {"target_modules": ["qkv"], "r": 8}, "'target_modules'. It is targets here."),
        ("lora", {"r": 8}, "'lora' has no option 'r'. It is rank here."),
        ("pissa", {"lora_alpha": 16}, "It is alpha here."),
        ("polar", {"modules_to_save": ["head"]}, "It is also_train here"),
        ("lora", {"use_rslora": True}, "It is rslora here"),
        ("lora", {"use_dora": True}, "Take the method 'peft:dora'."),
        ("dora", {}, "adapt: no method 'dora'. It is 'peft:dora'."),
        ("lorra", {}, "adapt: no method 'lorra'. Near: 'lora'"),
        ("lora", {"targts": ["qkv"]}, "has no option 'targts'."),
    ],
)
def test_words_of_peft(method: str, options: dict, words: str) -> None:
    if method == "dora":
        pytest.importorskip("peft")
    with pytest.raises(UserError) as error:
        vismt.adapt(tiny_vit(), method, **options)
    assert words in str(error.value)


def test_words_of_peft_in_a_configuration() -> None:
    for section, words in (
        ({"r": 8}, "unknown key 'adapt.r'. It is rank here."),
        ({"modules_to_save": ["head"]}, "It is also_train here (in a configuration adapt.options.also_train)"),
        ({"method": "lorra"}, "adapt.method: 'lorra' is not known. Near: 'lora'"),
    ):
        with pytest.raises(UserError) as error:
            build(RunConfig, {"adapt": section}, "mine.yaml")
        assert words in str(error.value)
    pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"'dora' is not known. It is 'peft:dora'"):
        build(RunConfig, {"adapt": {"method": "dora"}}, "mine.yaml")


def test_the_words_that_are_answered_are_those_of_no_method_and_name_what_exists() -> None:
    for name, method in METHODS.items():
        assert not set(AdaptConfig.ELSEWHERE) & set(method.options), name
    options = {word for method in METHODS.values() for word in method.options}
    for word, text in AdaptConfig.ELSEWHERE.items():
        if text.startswith("It is ") and " here" in text:
            assert text.split()[2] in options | {"rank", "targets", "alpha"}, word


def test_peft_tuners_keep_the_words_of_their_own_options() -> None:
    pytest.importorskip("peft")
    assert known_method("peft:dora", ["lora_dropout"]).name == "peft:dora"
