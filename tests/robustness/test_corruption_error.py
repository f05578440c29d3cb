"""Error under corruptions: the published formula by hand, and one error for each baseline that does not fit."""

import pytest

from scripts.study_rows import ROWS
from vismt.base.errors import UserError
from vismt.jobs.robustness.evaluation import ACCURACY, corruption_errors
from vismt.jobs.robustness.report import CORRUPTION_NOTE
from vismt.robustness.corruptions import error_under_corruptions
from vismt.storage.lines import read_lines
from vismt.storage.paths import CHECKOUT
from vismt.uncertainty.intervals import Condition, Measure, Score

ERRORS = {"fog": {1: 0.1, 3: 0.3}, "snow": {1: 0.6}}
FOG = Score("robustness", "set", "", Measure(ACCURACY, {"image": 1.0}), Condition("fog 1", "corruption", "fog", 1))
BASELINE = {"fog": {1: 0.2, 2: 0.9, 3: 0.6}, "snow": {1: 0.8}, "frost": {1: 0.5}}


def test_without_a_baseline_it_is_the_mean_error_with_equal_weights_of_corruptions():
    # fog: (0.1 + 0.3) / 2 = 0.2; snow: 0.6; mean (0.2 + 0.6) / 2 = 0.4, where the mean over all three is 0.333.
    assert error_under_corruptions(ERRORS) == pytest.approx(0.4, abs=1e-12)


def test_the_row_of_a_run_weighs_corruptions_alike_whatever_their_severities():
    # One image: wrong under snow, right under five severities of fog, so 1/2 and not 1/6.
    def score(name, severity, right):
        measure = Measure(ACCURACY, {"image": right})
        return Score("robustness", "set", "", measure, Condition(f"{name} {severity}", "corruption", name, severity))

    scores = [score("fog", severity, 1.0) for severity in range(1, 6)] + [score("snow", 1, 0.0)]
    ((row,),) = corruption_errors({"arm": scores}).values()
    assert row.measure.values == {"image": 0.5}


def test_an_error_under_other_constants_does_not_have_the_name_of_imagenet_c():
    (score,) = corruption_errors({"arm": [FOG]})["arm"]
    assert score.measure.metric == "mean error under corruptions" and "not the mCE of ImageNet-C" in CORRUPTION_NOTE
    for path in sorted((CHECKOUT / ROWS).glob("*.jsonl")):
        assert all(row.get("metric") != "mean corruption error" for row in read_lines(path, whole=True)), path.name


def test_a_baseline_normalises_each_corruption():
    # CE fog: (0.1 + 0.3) / (0.2 + 0.6) = 0.5, severity 2 of the baseline is ignored; CE snow: 0.6 / 0.8 = 0.75;
    # mean: (0.5 + 0.75) / 2 = 0.625.
    assert error_under_corruptions(ERRORS, BASELINE) == pytest.approx(0.625, abs=1e-12)


def test_the_baseline_itself_has_one():
    assert error_under_corruptions(BASELINE, BASELINE) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize(
    ("errors", "baseline", "words"),
    [
        ({}, None, "no corruptions"),
        ({"fog": {}}, None, "'fog' has no severities"),
        (ERRORS, {"fogs": {1: 0.2}}, "the baseline has no 'fog'. Near: 'fogs'"),
        (ERRORS, {"fog": {1: 0.2}, "snow": {1: 0.2}}, "the baseline has no 'fog' at severity 3"),
        (ERRORS, {"fog": {1: 0.0, 3: 0.0}, "snow": {1: 0.2}}, "the baseline makes no error under 'fog'"),
    ],
)
def test_refused(errors, baseline, words):
    with pytest.raises(UserError) as caught:
        error_under_corruptions(errors, baseline)
    assert words in str(caught.value) and "\n" not in str(caught.value)
