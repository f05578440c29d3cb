"""What a job says that it provides is what its view of a trained net has."""

from __future__ import annotations

import pytest

from vismt.jobs.lm.config import LmEvaluateConfig
from vismt.jobs.lm.evaluation import SetView
from vismt.jobs.multitask import evaluation, maps_evaluation
from vismt.jobs.multitask.config import MultitaskEvaluateConfig
from vismt.jobs.robustness.config import RobustnessEvaluateConfig
from vismt.jobs.robustness.evaluation import CardView
from vismt.uncertainty.features import EMBEDDING, HEAD, REASONS, VALIDATION, View

# The methods of a view of what not every job provides.
METHODS = {VALIDATION: ("fitted", "validation"), EMBEDDING: ("embedded",), HEAD: ("head_shape", "with_head")}
VIEWS = {
    "lm": (SetView, LmEvaluateConfig.PROVIDES),
    "squares": (evaluation.TaskView, MultitaskEvaluateConfig.PROVIDES),
    "maps": (maps_evaluation.TaskView, MultitaskEvaluateConfig.PROVIDES - {EMBEDDING, HEAD}),
    "robustness": (CardView, RobustnessEvaluateConfig.PROVIDES),
}


@pytest.mark.parametrize("job", VIEWS)
def test_a_view_has_the_methods_of_what_its_job_provides_and_no_others(job: str) -> None:
    view, provides = VIEWS[job]
    for need, methods in METHODS.items():
        for name in methods:
            assert (getattr(view, name) is not getattr(View, name)) == (need in provides), name
    assert provides <= REASONS.keys()
