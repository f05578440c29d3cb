"""Refused settings of evaluate.certify."""

from pathlib import Path

import pytest
from helpers.tiny_runs import written

from vismt.base.errors import UserError
from vismt.jobs import load_config
from vismt.jobs.robustness.config import check

CERTIFY = {"sigma": 0.5, "samples": 20, "alpha": 0.05}
ROBUSTNESS = {
    "task": "robustness",
    "classifier": {"name": "test_vit", "pretrained": False, "img_size": 32},
    "data": ["digits"],
    "evaluate": {"images": 4, "certify": CERTIFY},
}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"evaluate": {"certify": {"sigma": 0}}}, "evaluate.certify.sigma"),
        ({"evaluate": {"certify": {"sigma": 0.25, "samples": 3}}}, "samples 3 cannot certify anything"),
        (
            {"data": [], "evaluate": {"certify": CERTIFY}, "classifier": {"run": "runs/a"}},
            "what is for cards: evaluate.certify",
        ),
    ],
)
def test_one_line_errors(tmp_path: Path, changes: dict, text: str) -> None:
    with pytest.raises(UserError, match=text) as error:
        check(load_config(written(tmp_path / "robust.yaml", {**ROBUSTNESS, **changes})))
    assert "\n" not in str(error.value)
