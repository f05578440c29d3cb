"""One report over separate runs: who is compared with whom, on which examples, and which settings differ."""

import shutil

import pytest
from helpers.results import PGD, add, measure
from helpers.run_folder import FROZEN, make_folder
from helpers.tiny_runs import refused

from vismt.base.errors import UserError
from vismt.cli import main
from vismt.report.compare.report import compare_inputs, join
from vismt.report.comparison import compare_results
from vismt.report.results import read_results
from vismt.storage.files import sealed
from vismt.uncertainty.intervals import CLEAN, Score


def run(parent, name, arms, examples="drawn", config="seed: 0\n"):
    """A run folder with one set; arms: values of four episodes by arm."""
    folder = parent / name
    for arm, values in arms.items():
        for condition in (CLEAN, PGD):
            score = Score("few-shot", "digits", "5-way 1-shot", measure(values), condition, "episodes", examples)
            add(folder, score, arm)
    (folder / "run.json").write_text(sealed({"config_hash": f"hash-{name}", "title": f"Title {name}"}))
    (folder / "config.resolved.yaml").write_text(config)
    return folder


def clean(folders, arms=()):
    joined = join(folders, arms)
    return next(c for c in compare_results(joined.results, joined) if c.condition == "clean")


def test_arms_of_two_runs_are_paired_on_the_same_examples(tmp_path):
    a = run(tmp_path, "a", {"frozen": FROZEN, "lora": [v + 0.1 for v in FROZEN]})
    b = run(tmp_path, "b", {"frozen": FROZEN, "polar": [v + 0.2 + 0.01 * (v < 0.5) for v in FROZEN]})
    c = clean([a, b])
    assert list(c.cells) == ["a: frozen", "lora", "b: frozen", "polar"] and c.paired
    # every episode differs by about 0.1, so overlapping intervals are no tie
    assert [cell.mark for cell in c.cells.values()] == ["", "", "", "best"]
    assert clean([a, b], ["lora", "polar"]).differences["polar"].mean == pytest.approx(0.105)


def test_episodes_of_another_seed_have_the_same_numbers_and_are_not_paired(tmp_path):
    a = run(tmp_path, "a", {"lora": FROZEN}, "seed 1")
    b = run(tmp_path, "b", {"polar": [v + 0.1 for v in FROZEN]}, "seed 2")
    c = clean([a, b])
    assert not c.differences and not c.paired and c.cells["lora"].mark == "tie"
    same = run(tmp_path, "c", {"pissa": [v + 0.1 for v in FROZEN]}, "seed 1")
    assert clean([a, same]).differences["pissa"].bounds == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize("examples", [None, ""])
def test_rows_of_unknown_examples_are_paired_within_their_run_only(tmp_path, examples):
    arms = {"lora": FROZEN, "pissa": [v + 0.1 for v in FROZEN]}
    a, b = run(tmp_path, "a", arms, examples), run(tmp_path, "b", {"polar": FROZEN}, examples)
    assert read_results(a / "results.jsonl")[0].examples == examples
    assert not clean([a, b]).paired and clean([a, b], ["lora", "pissa"]).paired


def test_the_report_has_both_runs_and_the_settings_that_differ(tmp_path):
    a = run(tmp_path, "a", {"lora": FROZEN}, config="title: A\nadapt: {method: lora, rank: 4}\nseed: 0\n")
    b = run(tmp_path, "b", {"polar": FROZEN}, config="title: B\nadapt: {method: polar, rank: 4}\nseed: 0\n")
    paths = compare_inputs([a, b], tmp_path / "both", formats=["html", "md", "csv", "latex", "svg"])[0]
    assert [path.name for path in paths] == ["report.md", "report.csv", "report.tex", "report.html"]
    text = (tmp_path / "both" / "report.md").read_text()
    assert "# Comparison of a, b" in text and "Title a; Config hash: hash-a" in text and "hash-b" in text
    assert "| adapt.method | 'lora' | 'polar' |" in text and "adapt.rank" not in text and "| title |" not in text
    assert "a: vismt config hash-a; b: vismt config hash-b" in text
    assert list((tmp_path / "both" / "figures").glob("*.svg"))
    assert {path.name for path in a.iterdir()} == {"records", "results.jsonl", "run.json", "config.resolved.yaml"}


def test_folders_of_one_name_and_seeds(tmp_path):
    first, second = tmp_path / "x" / "run", tmp_path / "y" / "run"
    for folder in (first, second):
        folder.parent.mkdir()
        run(folder.parent, "run", {"lora": FROZEN})
        for seed in (0, 1):
            score = Score("few-shot", "digits", "5-way 1-shot", measure(FROZEN), CLEAN, "episodes")
            add(folder, score, "lora", seed=seed)
    compare_inputs([first, second], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"{first}: lora".replace("_", r"\_") in text and "By seed, 2 seeds" in text


@pytest.mark.parametrize(
    ("change", "arms", "message"),
    [
        (lambda a, b: [a], [], "name two or more run folders"),
        (lambda a, b: [a, a], [], "each once"),
        (lambda a, b: [a, b.parent / "none"], [], "run '.*none': no such folder"),
        (lambda a, b: [a, b.parent / "empty"], [], r"no results in '.*empty'; make them with `vismt evaluate"),
        (lambda a, b: [a, b], ["lorra"], "no run has an arm 'lorra'. Near: 'lora'"),
    ],
)
def test_what_cannot_be_compared(tmp_path, change, arms, message):
    a, b = run(tmp_path, "a", {"lora": FROZEN}), run(tmp_path, "b", {"polar": FROZEN})
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message) as caught:
        join(change(a, b), arms)
    assert "\n" not in str(caught.value)


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a = make_folder(tmp_path)
    b = shutil.copytree(a, tmp_path / "other")
    assert main(["compare", str(a), str(b), "--arm", "adapted", "--format", "csv,html"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("runs/compare-run-4f2a-other/report.html")
    assert main(["compare", str(a), str(b), "--format", "pdf", "--out", str(tmp_path / "vectors")]) == 0
    assert list((tmp_path / "vectors" / "figures").glob("*.pdf")) and (tmp_path / "vectors" / "report.html").exists()
    assert main(["compare", str(a), str(b), "--out", str(tmp_path / "vectors"), "--quiet"]) == 0  # its own report
    (a / "report.md").write_text("mine")
    error = refused(capsys, "compare", a, b, "--out", a)
    assert "exists and would be overwritten; give another --out" in error and (a / "report.md").read_text() == "mine"
    assert "--format has no 'htlm'. Near: 'html'" in refused(capsys, "compare", a, b, "--format", "htlm")
    assert main(["compare", str(a)]) == 2
