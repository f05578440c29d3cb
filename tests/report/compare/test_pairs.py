"""Tables of predictions compared example by example: columns, groups, seeds, sets, p, what can be detected, and bad input."""

import csv
import json
import math
import shlex

import numpy as np
import pytest
from helpers import pages
from helpers.pages import ROOT
from scipy import stats

import vismt
from vismt.base.errors import UserError
from vismt.cli import main
from vismt.report.compare.pairs import direction
from vismt.uncertainty.intervals import Estimate, estimate, holm, sign_flip_p
from vismt.uncertainty.probability_metrics import scores

import torch  # isort: skip


def rows(values, name="correct", **more):
    """Rows of a table: the value of each example, and further columns."""
    return [{"id": i, name: value, **{key: of[i] for key, of in more.items()}} for i, value in enumerate(values)]


def write(path, table):
    """Write rows as the format that the ending says."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    else:
        path.write_text("\n".join(json.dumps(row) for row in table))
    return path


def draw(n, share, seed=0):
    return (np.random.default_rng(seed).random(n) < share).astype(int).tolist()


def test_a_difference_is_that_of_a_paired_t_test_and_of_mcnemar():
    a, b = draw(300, 0.6), draw(300, 0.7, 1)
    (pair,) = vismt.compare({"a": rows(a), "b": rows(b)})
    expected = stats.ttest_rel(b, a).confidence_interval()
    assert (pair.a, pair.b, pair.set, pair.metric, pair.n, pair.groups, pair.seeds) == (
        "a",
        "b",
        "all",
        "correct",
        300,
        None,
        1,
    )
    assert [pair.difference, pair.low, pair.high] == pytest.approx([np.mean(b) - np.mean(a), *expected])
    up, down = (sum(x > y for x, y in zip(*two, strict=True)) for two in ((b, a), (a, b)))
    mid = stats.binomtest(up, up + down).pvalue - stats.binom.pmf(up, up + down, 0.5)
    assert pair.p == pytest.approx(mid, abs=0.02)


def test_exact_sign_flips_are_the_binomial_test_with_half_the_weight_of_the_sums_seen():
    for up, down in ((5, 1), (7, 3), (4, 0)):
        units = torch.tensor([1.0] * up + [-1.0] * down + [0.0] * 20, dtype=torch.float64)
        mid = stats.binomtest(up, up + down).pvalue - stats.binom.pmf(up, up + down, 0.5)
        assert sign_flip_p(units) == pytest.approx(mid)
    assert sign_flip_p(torch.tensor([1.0, -1.0])) == 1
    many = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert sign_flip_p(many) == pytest.approx(stats.ttest_1samp(many.numpy(), 0).pvalue, abs=1e-3)


def test_examples_of_a_group_count_as_one():
    """The interval is that of the group means where groups are equally large, and copies of an example add nothing."""
    a, b = np.random.default_rng(0).normal(size=(2, 40))
    groups = [f"p{i // 4}" for i in range(40)]
    (pair,) = vismt.compare(
        {"a": rows(a.tolist(), "loss", patient=groups), "b": rows(b.tolist(), "loss", patient=groups)}
    )
    means = (b - a).reshape(10, 4).mean(1)
    low, high = stats.ttest_1samp(means, 0).confidence_interval()
    assert (pair.groups, pair.n) == (10, 40) and [pair.low, pair.high] == pytest.approx([low, high])
    once = vismt.compare({"a": rows([*a[::4]], "loss"), "b": rows([*b[::4]], "loss")})[0]
    copies = [float(value) for value in np.repeat(a[::4], 4)], [float(value) for value in np.repeat(b[::4], 4)]
    again = vismt.compare({name: rows(of, "loss", group=groups) for name, of in zip("ab", copies, strict=True)})[0]
    assert [again.low, again.high, again.p] == pytest.approx([once.low, once.high, once.p])


def test_groups_of_other_sizes_are_the_clusters_of_a_robust_regression():
    """statsmodels: the intercept of b - a with errors that are robust to clusters."""
    models = pytest.importorskip("statsmodels.api")
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 30, 400)
    a, b = rng.normal(size=(2, 400)) + rng.normal(size=30)[groups] * [[1], [1.5]]
    names = [str(group) for group in groups]
    (pair,) = vismt.compare({"a": rows(a.tolist(), "loss", group=names), "b": rows(b.tolist(), "loss", group=names)})
    fitted = models.OLS(b - a, np.ones(400)).fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
    assert pair.difference == pytest.approx(fitted.params[0]) and pair.groups == 30
    assert estimate((b - a).tolist(), groups=names).variance == pytest.approx(fitted.bse[0] ** 2)


def test_seeds_widen_the_interval_and_are_paired():
    rng = np.random.default_rng(0)
    examples = rng.normal(size=50)

    def model(offsets):
        return [
            {"id": i, "loss": examples[i] + offset, "seed": seed}
            for seed, offset in enumerate(offsets)
            for i in range(50)
        ]

    (pair,) = vismt.compare({"a": model([0.0, 5.0, -3.0]), "b": model([1.0, 6.2, -2.1])})
    spread = stats.ttest_1samp([1.0, 1.2, 0.9], 0).confidence_interval()
    assert pair.seeds == 3 and [pair.low, pair.high] == pytest.approx([*spread], rel=1e-6)
    assert "a is better than b by 1.03 ± 0.38 (n = 50, 3 seeds)" in str(pair)  # a loss: lower is better


def test_accuracy_nll_brier_and_ece_follow_from_labels_and_probabilities(tmp_path):
    rng = np.random.default_rng(0)
    p = rng.dirichlet([1, 1, 1], size=60)
    labels = rng.integers(3, size=60)
    classes = ["cat", "dog", "eel"]
    table = [
        {
            "image": i,
            "label": classes[labels[i]],
            "answer": classes[p[i].argmax()],
            **{f"p_{c}": p[i][k] for k, c in enumerate(classes)},
        }
        for i in range(60)
    ]
    other = [row | {"answer": row["label"]} for row in table]
    given = vismt.compare({"a": table, "b": other}, probability="p_*")
    assert [pair.metric for pair in given] == ["accuracy", "NLL in nats", "Brier"]
    expected = scores(torch.tensor(p), torch.tensor(labels))
    main(["compare", *(str(write(tmp_path / f"{n}.csv", t)) for n, t in (("a", table), ("b", other))), "--probability", "p_*",
          "--out", str(tmp_path / "out"), "--format", "csv"])  # fmt: skip
    with (tmp_path / "out" / "report.csv").open() as file:
        found = {row["metric"]: float(row["value"]) for row in csv.DictReader(file) if row["arm"] == "a"}
    wanted = {
        "accuracy": expected.accuracy,
        "NLL in nats": expected.nll,
        "Brier": expected.brier,
        "ECE-15": expected.ece,
    }
    assert found == pytest.approx(wanted, rel=1e-5)


def test_a_single_probability_scores_right_and_wrong():
    table = [{"id": i, "label": "x", "answer": "xy"[i % 2], "confidence": 0.8} for i in range(4)]
    pairs = {pair.metric: pair for pair in vismt.compare({"a": table, "b": [row | {"answer": "x"} for row in table]})}
    assert pairs["accuracy"].difference == 0.5
    assert pairs["NLL of right or wrong in nats"].difference == pytest.approx((math.log(0.2) - math.log(0.8)) / 2)


DIRECTIONS = {
    "higher": ["accuracy", "acc_norm", "F1", "mIoU", "AUROC", "exact_match", "Dice of it", "mAP50", "NDCG@10", "top-5 acc"],
    "lower": [
        "abs_rel", "AbsRel", "lpips", "fid", "fpr95", "aurc", "EER", "mErr", "angular distance", "edit_distance", "toxicity",
        "hallucination_rate", "latency_ms", "NLL in nats", "ECE-15", "top-1 error", "word_perplexity", "RMSE in m", "HD95",
    ],
    "unstated": ["lossless", "score", "length", "accuracy loss", "R", "errorless", "mapping"],
}  # fmt: skip


@pytest.mark.parametrize(("better", "name"), [(better, name) for better, names in DIRECTIONS.items() for name in names])
def test_words_of_a_name_say_which_values_are_better(better, name):
    assert direction(name) == better


def test_nothing_is_called_better_if_nobody_says_which_values_are(tmp_path, capsys):
    low = [0.1 + 0.001 * (i % 7) for i in range(60)]
    high = [0.3 + 0.001 * (i % 5) for i in range(60)]
    (pair,) = vismt.compare({"a": rows(low, "gap"), "b": rows(high, "gap")}, score="gap")
    assert str(pair).startswith("b has a higher gap than a by 0.199") and "better" not in str(pair)
    for better, best in (("lower", "a"), ("higher", "b")):
        (pair,) = vismt.compare({"a": rows(low, "gap"), "b": rows(high, "gap")}, score="gap", better={"gap": better})
        assert str(pair).startswith(f"{best} is better than")
    with pytest.raises(UserError, match=r"compare: no input has a metric 'gab'. Near: 'gap'"):
        vismt.compare({"a": rows(low, "gap"), "b": rows(high, "gap")}, score="gap", better={"gab": "lower"})

    given = [str(write(tmp_path / f"{name}.csv", rows(of, "gap"))) for name, of in (("a", low), ("b", high))]
    command = ["compare", *given, "--score", "gap", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    printed, page = capsys.readouterr().out, (tmp_path / "out" / "report.md").read_text()
    for text in (printed, page):
        assert "b has a higher gap than a" in text and "Take" not in text and "better than" not in text
        assert "Name the better values of gap by --higher or --lower." in text
    assert "*" not in page.split("Pairs")[0].replace("**", "") and "gap ↑" not in page
    assert main([*command, "--lower", "gap"]) == 0
    printed = capsys.readouterr().out
    assert "a is better than b by" in printed and "Take a." in printed


def test_files_of_several_formats_and_a_folder_of_seeds(tmp_path, capsys):
    a, b = draw(40, 0.4), draw(40, 0.8, 1)
    write(tmp_path / "a.csv", rows(a, seed=["1"] * 40))
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "1.jsonl", rows([float(value) for value in b]))
    assert main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "b"), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "b is better than a by" in printed and "a.csv: id is 'id', score is 'correct', seed is 'seed'" in printed
    assert (
        main(["compare", str(tmp_path / "a.csv"), str(tmp_path / "b"), "--out", str(tmp_path / "out"), "--json"]) == 0
    )
    (pair,) = json.loads(capsys.readouterr().out)
    assert " ".join(pair) == "a b set metric difference low high n groups seeds detectable p p_holm"
    assert pair["difference"] == pytest.approx(np.mean(b) - np.mean(a))
    page = (tmp_path / "out" / "report.md").read_text()
    assert "b is better than a by" in page


def test_samples_of_the_harness_are_read_by_task_metric_and_filter(tmp_path):
    def samples(model, values, task="arc", time="2026-01-01T00-00-00.1", hashes="x"):
        (tmp_path / model / "org__name").mkdir(parents=True, exist_ok=True)
        lines = [
            {"doc_id": i, "doc": {"q": 1}, "target": "0", "filter": chosen, "metrics": ["acc", "words"], "acc": value,
             "words": [1, 2],             "doc_hash": f"{hashes}{i}"}
            for i, value in enumerate(values) for chosen in ("none", "strict")
        ]  # fmt: skip
        write(tmp_path / model / "org__name" / f"samples_{task}_{time}.jsonl", lines)

    a, b = draw(30, 0.4), draw(30, 0.8, 1)
    samples("a", a), samples("b", draw(30, 0.1, 2)), samples("b", b, time="2026-01-02T00-00-00.1")
    samples("a", a, "boolq"), samples("b", a, "boolq")
    pairs = vismt.compare(tmp_path / "a", tmp_path / "b")
    assert [(pair.set, pair.metric) for pair in pairs] == [
        (data, metric) for metric in ("acc", "acc,strict") for data in ("arc", "boolq", "average")
    ]
    gain = np.mean(b) - np.mean(a)
    assert [pair.difference for pair in pairs[:3]] == pytest.approx([gain, 0, gain / 2])
    assert pairs[1].high > 0  # no difference in 30 examples is not certain
    samples("c", b, hashes="y"), samples("c", a, "boolq")
    with pytest.raises(UserError, match=r"30 examples .* another label or document"):
        vismt.compare(tmp_path / "a", tmp_path / "c")


def test_examples_that_do_not_match_are_named_and_compared_only_if_common_is_given():
    a, b = rows(draw(30, 0.5), label=["x"] * 30), rows(draw(30, 0.7, 1), label=["x"] * 30)
    b[0]["id"], b[1]["label"] = 99, "y"
    b.append(dict(b[5]))
    with pytest.raises(UserError) as error:
        vismt.compare({"a": a, "b": b}, score="correct")
    for text in ("1 examples (first '5') come twice", "2 examples (first '0') are not in every input",
        "1 examples (first '1') have another label",
                 "27 examples are the same"):  # fmt: skip
        assert text in str(error.value)
    (pair,) = vismt.compare({"a": a, "b": b}, score="correct", common=True)
    kept = [row for row in range(30) if row not in (0, 1, 5)]
    assert pair.n == 27 and pair.difference == pytest.approx(np.mean([b[i]["correct"] - a[i]["correct"] for i in kept]))


def test_holm_corrects_over_the_pairs_of_a_set():
    given = {
        name: rows(draw(200, share, seed)) for seed, (name, share) in enumerate((("a", 0.5), ("b", 0.6), ("c", 0.7)))
    }
    pairs = vismt.compare(given)
    assert [(pair.a, pair.b) for pair in pairs] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [pair.p_holm for pair in pairs] == holm([pair.p for pair in pairs])
    assert [(pair.a, pair.b) for pair in vismt.compare(given, baseline="b")] == [("b", "a"), ("b", "c")]
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06]) and holm([]) == []


@pytest.mark.parametrize("freedom", [1.0, 2.0, 5.0, 30.0, 400.0, 600.0, math.inf])
def test_the_detectable_difference_has_a_power_of_80_percent(freedom):
    least = Estimate(0.0, ((1.0, freedom),)).detectable()
    reach = stats.t.ppf(0.975, freedom)
    power = stats.nct.sf(reach, freedom, least) if freedom < 500 else stats.norm.sf(reach - least)
    assert power == pytest.approx(0.8, abs=2e-3)
    both = Estimate(2.0, ((1.0, freedom),))
    assert both.p_value == pytest.approx(2 * stats.t.sf(2.0, freedom), rel=1e-6)


def bad(tmp_path, text, *more, name="b.csv"):
    """The error of comparing a sound table with a file that holds `text`."""
    write(tmp_path / "a.csv", rows([1, 0, 1]))
    (tmp_path / name).write_bytes(text)
    return ["compare", str(tmp_path / name), str(tmp_path / "a.csv"), "--out", str(tmp_path / "out"), *more]


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        (b"id,right\n0,1\n1,0\n2,1\n", (), "name one by --label (or a score for each example by --score)"),
        (b"id,right\n0,1\n", ("--score", "rigth"), "Near: 'right'"),
        (b"id,correct\n0,1\n1,nan\n2,1\n", (), "row 2: 'correct' is 'nan', not a finite number"),
        (b"id,correct\n0,1\n1,yes\n2,1\n", (), "row 2: 'correct' is 'yes'"),
        (b"id,correct\n0,1\n1\n2,1\n", (), "row 2 has 1 values for 2 columns"),
        (b"id,correct\n0,1\n0,1\n2,1\n", (), "come twice"),
        (b"id,correct\n", (), "has no rows"),
        (b"", (), "has no rows"),
        (b"id,correct\n0,1\n,0\n2,1\n", (), "row 2: column 'id' is empty"),
        (b"id,correct,correct\n0,1,1\n", (), "a column has the name of another"),
        (b"\xff\xfe\x00", (), "it is not UTF-8"),
        (b"id,image,correct\n0,a,1\n", (), "'id', 'image' for the id; name one by --id"),
        (b"id,correct,seed\n0,1,4\n1,1,4\n2,1,4\n", (), "'b' has the seeds 4; 'a' has the seeds none; no seed is in all"),
        (b"id,correct\n7,1\n8,1\n9,1\n", ("--common",), "0 examples are the same"),
        (b"id,correct,group\n0,1,x\n1,0,x\n2,1,x\n", (), "has one group"),
        (b"id,label,answer,confidence\n0,x,x,1.5\n", (), "'confidence' is 1.5, not a probability"),
        (b"id,correct,prediction,label\n0,1,x,x\n", (), "name --score, or --label and --answer"),
        (b"id,label,answer,p_x\n0,y,x,1\n", ("--probability", "p_*"), "no column 'p_*' for the class 'y'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_message(tmp_path, capsys, text, more, message):
    assert main(bad(tmp_path, text, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 600
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("b.jsonl", b'{"id": 1, "correct": 1}\n{"id": 2', "line 2 is not JSON"),
        ("b.jsonl", b"3\n", "row 1 is 3, not an object"),
        ("b.json", b'{"id": 1}', "it holds one object"),
        ("b.jsonl", b'{"id": "' + b"x" * 100 + b'"}', "line 1 has more than 50 characters"),
        ("samples_x.jsonl", b'{"id": 1}', "no doc_id"),
        ("samples_x.jsonl", b'{"doc_id": 1, "acc": "x", "filter": "none"}', "no metric with a number"),
        ("samples_x.jsonl", b'{"doc_id": 1, "acc": 1}\n{"doc_id": 1, "acc": 1}', "doc_id 1 comes twice"),
    ],
)
def test_damaged_json_is_one_message(tmp_path, capsys, monkeypatch, name, text, message):
    if "more than" in message:
        monkeypatch.setattr("vismt.report.compare.score_tables.MOST_CHARACTERS", 50)
    assert main(bad(tmp_path, text, name=name)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 600


def test_a_run_is_compared_with_a_table_of_its_examples(tmp_path):
    from helpers.results import add, measure

    from vismt.uncertainty.intervals import CLEAN, Score

    values = [0.2, 0.4, 0.6, 0.8]
    add(
        tmp_path / "run",
        Score("few-shot", "digits", "5-way 1-shot", measure(values), CLEAN, "episodes", "drawn"),
        "lora",
    )
    (tmp_path / "run" / "config.resolved.yaml").write_text("task: fewshot\n")
    names = list(measure(values).values)
    table = [{"example": name, "accuracy": value + 0.1} for name, value in zip(names, values, strict=True)]
    (pair,) = vismt.compare(tmp_path / "run", {"mine": table})
    assert (pair.a, pair.b, pair.set) == ("lora", "mine", "digits")
    assert [pair.difference, pair.low, pair.high] == pytest.approx([0.1] * 3)


def test_the_commands_of_the_guide_run(tmp_path, monkeypatch):
    """On tables with the columns that the page names."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("resnet", "vit", "a", "b", "c")):
        values = [float(value) for value in draw(60, 0.5 + seed / 20, seed)]
        table = [
            {"image": f"{i}.png", ("dice" if len(name) == 1 else "correct"): value, "patient": i // 4}
            for i, value in enumerate(values)
        ]
        write(tmp_path / f"{name}.csv", table)
    for seed, name in enumerate(("a_method", "another_method")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        for training in range(2):
            answers = [{"image": i, "species": i % 3, "guess": v} for i, v in enumerate(draw(60 + seed, 0.5, training))]
            write(tmp_path / "runs" / name / f"{training}.csv", answers)
        lines = [{"doc_id": i, "acc": value, "filter": "none"} for i, value in enumerate(draw(30, 0.5, seed))]
        (tmp_path / "out" / f"model_{'ab'[seed]}").mkdir(parents=True)
        write(tmp_path / "out" / f"model_{'ab'[seed]}" / "samples_arc_2026-01-01T00-00-00.1.jsonl", lines)
    commands = [
        line for block in pages.blocks(ROOT / "docs/guides/compare.md", "bash") for line in block.code.splitlines()
    ]
    assert len(commands) == 4
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0


def test_predictions_of_class_folders_have_their_answer_in_the_column_label(tmp_path):
    """`true_label` beside `label`, as `vismt predict` writes them, unless the user names `label` as the truth."""
    truth, a, b = ("".join(letters) for letters in ("xyxy" * 10, "xyyy" * 10, "xyxx" * 9 + "xxxx"))
    for name, answers in (("a", a), ("b", b)):
        table = [
            {"image": i, "label": answer, "true_label": t}
            for i, (answer, t) in enumerate(zip(answers, truth, strict=True))
        ]
        write(tmp_path / f"{name}.csv", table)
    (pair,) = vismt.compare(tmp_path / "a.csv", tmp_path / "b.csv")
    assert (pair.metric, pair.n) == ("accuracy", 40) and pair.difference == pytest.approx((29 - 30) / 40)
    with pytest.raises(UserError, match="name one by --answer"):
        vismt.compare(tmp_path / "a.csv", tmp_path / "b.csv", label="label")
