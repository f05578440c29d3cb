"""Messages have a bounded length, whatever values and names they show."""

from __future__ import annotations

import importlib
import pickle

import pytest
from helpers.tiny import tiny_vit

import vismt
from vismt.base.errors import GONE, SHOWN, UserError, shown_value
from vismt.multitask import RouterFade


def test_a_message_shows_the_start_of_a_model_on_one_line() -> None:
    with pytest.raises(UserError) as caught:
        RouterFade(tiny_vit())
    message = str(caught.value)
    assert message.startswith("fade: total_steps VisionTransformer(") and message.endswith("of the training.")
    assert len(message) < SHOWN + 100 and "\n" not in message


def test_values_and_quoted_names_are_cut() -> None:
    assert shown_value("a" * (SHOWN + 1)) == "'" + "a" * SHOWN + "…'"
    assert shown_value([1, 2]) == "[1, 2]"
    long = "x" * 5000
    for targets in (long, [long]):
        with pytest.raises(UserError) as caught:
            vismt.adapt(tiny_vit(), "lora", targets)
        assert len(str(caught.value)) < 2 * SHOWN + 100
    error = UserError(f"the run's model '{long}' is not an arm's; name 'a' or '{long}'.")
    cut = long[:SHOWN] + "…"
    assert str(error) == f"the run's model '{cut}' is not an arm's; name 'a' or '{cut}'."
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


@pytest.mark.parametrize("name", [name for name in GONE if name.startswith("vismt.")])
def test_a_name_that_is_gone_says_what_to_do(name: str) -> None:
    package, _, attribute = name.rpartition(".")
    with pytest.raises(UserError, match="is gone") as caught:
        getattr(importlib.import_module(package), attribute)
    assert str(caught.value) == f"{name} is gone. {GONE[name]}"
