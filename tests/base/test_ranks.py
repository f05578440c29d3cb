"""An error of one process ends all of them, with one message; a rate is chosen by all; batches weigh by their examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.error_ranks import rows_of, weighed
from helpers.ranks import of_two

from vismt.base import ranks
from vismt.base.errors import UserError
from vismt.engine.study import ALONE, read_choice
from vismt.storage.locks import locked


@pytest.mark.slow
def test_an_error_of_one_process_ends_both_and_batches_weigh_by_their_examples(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        trained = of_two("error_ranks.py", tmp_path)[0]["weight"]
    # Four batches of different sizes: two by each process, or one batch of all their rows.
    alone = weighed(tmp_path / "alone", [torch.cat(rows_of(2, 40, 3, 9))])
    assert torch.allclose(trained, alone, rtol=1e-5) and alone.abs().min() > 0.01
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["share"] == ["2"] and second["share"] == ["2", "error: item 3 of rank 1"]
    assert first["first"] == ["2", "error: item 3 of rank 0"] and second["first"] == ["2"]
    assert first["after"] == second["after"] == [0, 1, 2]
    code, message = first["locked"]
    assert code == "2" and "is in use by process" in message and second["locked"] == ["2"]
    # Two rates, four numbers each, half of them by each process; the larger rate has the larger score.
    assert first["ran"] == second["ran"] == 4
    choice = read_choice(tmp_path / "study", ALONE)
    assert choice.lr == 0.2 and choice.validation == pytest.approx({"0.1": 0.6, "0.2": 1.2})


def test_alone_a_result_is_returned_and_an_error_raised_as_it_is() -> None:
    def refuse(number: int) -> None:
        raise UserError(f"item {number}")

    assert ranks.on_first(lambda: 3) == 3
    with pytest.raises(UserError, match=r"^item 0$") as raised:
        list(ranks.share(range(2), refuse))
    assert not raised.value.elsewhere
    with pytest.raises(UserError, match=r"^item 7$"):
        ranks.on_first(lambda: refuse(7))
