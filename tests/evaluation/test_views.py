"""What a job says that it provides is what its view of a trained net has."""

from __future__ import annotations

import inspect

import pytest

from vismt.jobs.fewshot.config import EvaluateConfig
from vismt.jobs.fewshot.evaluation import EpisodeView
from vismt.jobs.lm.config import LmEvaluateConfig
from vismt.jobs.lm.evaluation import SetView
from vismt.jobs.multitask import evaluation, maps_evaluation
from vismt.jobs.multitask.config import MultitaskEvaluateConfig
from vismt.jobs.robustness.config import RobustnessEvaluateConfig
from vismt.jobs.robustness.evaluation import CardView
from vismt.uncertainty.features import COUNTS, HEAD, REASONS, VALIDATION, View

# The methods of a view of what not every job provides.
METHODS = {
    VALIDATION: ("fitted", "validation"),
    HEAD: ("head_shape", "with_head"),
    COUNTS: ("class_counts",),
}
VIEWS = {
    "fewshot": (EpisodeView, EvaluateConfig.PROVIDES),
    "lm": (SetView, LmEvaluateConfig.PROVIDES),
    "squares": (evaluation.TaskView, MultitaskEvaluateConfig.PROVIDES),
    "maps": (maps_evaluation.TaskView, MultitaskEvaluateConfig.PROVIDES - {HEAD}),
    "robustness": (CardView, RobustnessEvaluateConfig.PROVIDES),
}


@pytest.mark.parametrize("job", VIEWS)
def test_a_view_has_the_methods_of_what_its_job_provides_and_no_others(job: str) -> None:
    view, provides = VIEWS[job]
    for need, methods in METHODS.items():
        for name in methods:
            assert (getattr(view, name) is not getattr(View, name)) == (need in provides), name
    assert provides <= REASONS.keys()


def test_every_method_that_a_job_may_leave_out_is_of_something_that_it_provides() -> None:
    code = {
        name: inspect.getsource(getattr(of, "fget", of))
        for name, of in vars(View).items()
        if callable(getattr(of, "fget", of))
    }
    lacking = {name for name, text in code.items() if "raise NotImplementedError" in text}
    assert lacking == {name for methods in METHODS.values() for name in methods}
