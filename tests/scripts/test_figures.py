"""Pictures are drawn from committed rows, and one whose rows have changed is found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.run_folder import make_folder

from scripts import committed, figures, tables
from scripts.study_rows import ROWS, StudyRow, read_study, study_of, write_study
from vismt.engine.study import ARMS, write_choice
from vismt.engine.training_files import CHANGES
from vismt.report.weight_changes import CHANGE
from vismt.storage.lines import write_lines

BARS = {"study": "study", "kind": "bars", "where": {"condition": "clean", "arm": ["frozen", "adapted"]}}
SEEDS = {"study": "seeds", "kind": "seeds", "where": {"condition": "clean"}}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a checkout with the rows of a study of one training, and of one with two trainings."""
    monkeypatch.setattr(figures, "CHECKOUT", tmp_path)
    monkeypatch.setattr(tables, "CHECKOUT", tmp_path)
    monkeypatch.setattr(committed, "CHECKOUT", tmp_path)
    monkeypatch.setattr(committed, "studies", lambda: {path.stem: path for path in (tmp_path / ROWS).glob("*.jsonl")})
    (tmp_path / "docs").mkdir()
    study = study_of(make_folder(tmp_path, seeds=[0, 1]))
    write_study(tmp_path / ROWS / "study.jsonl", study)
    by_seed = [
        StudyRow(**{**vars(row), "seed": seed, "value": row.value + 0.01 * seed})
        for row in study.rows
        for seed in (0, 1)
        if row.data != "average" and not row.minus
    ]
    write_study(tmp_path / ROWS / "seeds.jsonl", type(study)(study.about, [*study.rows, *by_seed]))
    committed.study.cache_clear()
    yield tmp_path
    committed.study.cache_clear()


def run(checkout: Path, specs: dict, *options: str) -> int:
    (checkout / ROWS / "figures.yaml").write_text(yaml.safe_dump(specs, sort_keys=False))
    return figures.main([*options])


def test_a_picture_is_drawn_again_where_its_rows_or_what_it_shows_change(checkout: Path, capsys) -> None:
    specs = {"bars": BARS, "seeds": SEEDS}
    assert run(checkout, specs, "--check") == 1 and "stale   docs/bars.svg" in capsys.readouterr().out
    assert run(checkout, specs) == 0 and run(checkout, specs, "--check") == 0
    pictures = {path: path.read_bytes() for path in (checkout / "docs").glob("*.svg")}
    assert [path.name for path in sorted(pictures)] == ["bars.svg", "seeds.svg"]
    for path in pictures:
        path.unlink()
    assert run(checkout, specs) == 0 and pictures == {path: path.read_bytes() for path in pictures}  # to the byte

    assert run(checkout, specs | {"bars": BARS | {"where": {"condition": "clean"}}}, "--check") == 1
    path = checkout / ROWS / "study.jsonl"
    study = read_study(path)
    rows = [StudyRow(**{**vars(row), "low": row.low - 0.01}) for row in study.rows]
    write_study(path, type(study)(study.about, rows))
    committed.study.cache_clear()
    capsys.readouterr()
    assert run(checkout, specs, "--check") == 1
    assert "docs/bars.svg" in (out := capsys.readouterr().out) and "docs/seeds.svg" not in out


def test_bars_have_the_average_last_and_the_intervals_of_the_rows(checkout: Path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "domain_bars", lambda comparisons, path: drawn.append(comparisons))
    rows = figures.chosen(BARS, "picture")
    figures.draw(BARS, rows, checkout / "a.svg")
    assert [c.data for c in drawn[0]] == ["digits", "crops", "average"]
    cell = drawn[0][2].cells["adapted"]
    row = next(row for row in rows if (row.data, row.arm) == ("average", "adapted"))
    assert (cell.value, cell.low, cell.high) == (row.value, row.low, row.high)


def test_seeds_are_those_of_the_trainings(checkout: Path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "seeds_figure", lambda panels, arms, path: drawn.append((panels, arms)))
    rows = figures.chosen(SEEDS, "picture")
    figures.draw(SEEDS, rows, checkout / "a.svg")
    panels, arms = drawn[0]
    assert arms == ["frozen", "adapted"] and [panel.title for panel in panels] == ["digits", "crops", "average"]
    assert panels[0].values == pytest.approx(
        {("frozen", 0): 50, ("frozen", 1): 51, ("adapted", 0): 60, ("adapted", 1): 61}
    )


def test_a_trade_has_a_dot_for_each_training_and_joins_the_rates_of_an_arm(checkout: Path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, _: drawn.append(figure.axes[0]))
    study = read_study(checkout / ROWS / "study.jsonl")
    names = {"frozen": "lora-1e-3", "adapted": "lora-3e-3"}
    found = [row for row in study.rows if row.arm in names and not row.minus]
    rows = [StudyRow(**{**vars(row), "arm": names[row.arm], "by_seed": (row.value, row.value + 0.01)}) for row in found]
    write_study(checkout / ROWS / "trades.jsonl", type(study)(study.about, rows))
    where = {"metric": "accuracy", "condition": "clean", "data": ["digits", "crops"], "arm": [*names.values()]}
    committed.study.cache_clear()
    spec = {"study": "trades", "kind": "trade", "where": where}
    figures.draw(spec, figures.chosen(spec, "picture"), checkout / "a.svg")
    (axes,) = drawn
    assert [line.get_xdata() for line in axes.lines if len(line.get_xdata()) == 2] == [pytest.approx([50, 60])]
    assert sorted(x for dots in axes.collections for x, _ in dots.get_offsets()) == pytest.approx([50, 51, 60, 61])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "bar"}, "picture 'a': has study, kind, where; give study, where and kind: bars or certified"),
        ({"kind": "seeds"}, "picture 'a': 'study' has no rows by seed; give it kind: bars"),
        ({"kind": "trade"}, "picture 'a': a trade has two scores; `where` leaves 3"),
        ({"note": "a"}, "picture 'a': has study, kind, where, note; give study"),
        ({"where": {"arn": "a"}}, "picture 'a': rows have no field 'arn'. Near: 'arm'"),
        ({"study": "studi"}, "tables: no rows of a study 'studi' in docs/results/rows. Near: 'study'"),
        ({"where": {"arm": "frosen"}}, "picture 'a': no row of 'study' has arm 'frosen'. Near: 'frozen'"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(checkout: Path, capsys, change: dict, words: str) -> None:
    assert run(checkout, {"a": BARS | change}) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_updates_by_depth_are_rows_and_a_picture(checkout: Path, tmp_path_factory) -> None:
    folder = make_folder(tmp_path_factory.mktemp("run"), seeds=[0, 1])
    write_choice(folder / ARMS / "adapted" / "chosen.json", "adapted", [0.1], {0.1: 0.5})
    for seed in (0, 1):
        weights = {"blocks.0.fc1.weight": 0.1, "blocks.0.fc2.weight": 0.3, "blocks.7.fc1.weight": 0.6 + 0.2 * seed}
        lines = [
            {"weight": name, "norm": 1.0, "change": change, "stable_rank": 1.0} for name, change in weights.items()
        ]
        write_lines(folder / ARMS / "adapted" / f"lr-0.1-seed-{seed}" / CHANGES, lines)
    study = study_of(folder)
    found = {row.data: row for row in study.rows if row.metric == CHANGE}
    assert {data: (row.value, row.n) for data, row in found.items() if data != "matrices"} == {
        "block 0": pytest.approx((0.2, 2)),
        "block 7": pytest.approx((0.7, 1)),
    }
    assert found["matrices"].n == 3 and found["matrices"].by_seed[1] == pytest.approx(0.4)
    assert found["block 7"].by_seed == pytest.approx((0.6, 0.8))
    write_study(checkout / ROWS / "depths.jsonl", study)
    spec = {"study": "depths", "kind": "depth", "where": {"metric": CHANGE}}
    assert run(checkout, {"depth": spec}) == 0 and "<svg" in (checkout / "docs/depth.svg").read_text()
    # No changed weights.
    assert run(checkout, {"depth": spec | {"study": "study", "where": {"condition": "clean"}}}) == 2
