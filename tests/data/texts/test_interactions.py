"""Sets of interactions: both forms by hand, the split by time, candidates (I11), what is refused, and the real set."""

from __future__ import annotations

import gzip
import json
import zipfile

import pytest

from vismt.base.errors import UserError
from vismt.data.cards import load_card
from vismt.data.check import check, prepare
from vismt.data.copies import write_manifest
from vismt.data.images import open_images
from vismt.data.texts.interactions import Catalogue, draw_candidates, numbered
from vismt.data.texts.text_set import open_texts
from vismt.storage import wheels

EVENTS = "{kind: interactions, root: t, items: i.csv, item_columns: [item, title], events: e.csv, splits: %s}"
ITEMS = 'item,title\na,Alpha\nb,"Beta, the second"\nc,Gamma\nd,Delta\n'
LINES = "{kind: interactions, root: t, items: i.txt, item_separator: '::', files: {all: s.jsonl}, splits: {all: null}}"


@pytest.fixture
def put(home, write_card):
    """put(source, **files): a card over the files in t/."""

    def write(source: str, **files: str | bytes):
        (home / "data" / "t").mkdir(exist_ok=True)
        for name, content in files.items():
            path = home / "data" / "t" / name.replace("_", ".", 1)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return write_card(f"  - {source}", classes=0)

    return write


def rows_of(path, split: str) -> list[tuple[list[str], str, str]]:
    data = open_texts(path, split)
    titles = data.catalogue.titles
    return [([titles[i] for i in row["history"]], titles[row["next"]], name) for row, name in zip(data.rows, data.ids)]


def test_the_last_of_each_user_is_the_test_and_nothing_later_is_before_it(put):
    # User 1 is out of order in the file and takes Alpha twice; user 2 has two items, which is too few to be tested on.
    events = "timestamp,user,item\n30,1,c\n10,1,a\n20,1,b\n40,1,a\n50,1,d\n1,2,d\n2,2,a\n7,3,a\n8,3,b\n9,3,c\n"
    path = put(EVENTS % "{train: 2, validation: 2, test: 2}", e_csv=events, i_csv=ITEMS)
    beta = "Beta, the second"
    assert rows_of(path, "train") == [(["Alpha"], beta, "train:1:1"), (["Delta"], "Alpha", "train:2:1")]
    assert rows_of(path, "test") == [
        (["Alpha", beta, "Gamma"], "Delta", "test:1:3"),
        (["Alpha", beta], "Gamma", "test:3:2"),
    ]
    assert rows_of(path, "validation") == [
        (["Alpha", beta], "Gamma", "validation:1:2"),
        (["Alpha"], beta, "validation:3:1"),
    ]


def test_a_row_that_does_not_continue_the_row_before_it_begins_another_user(put):
    rows = [
        {"history": [], "next": 0},
        {"history": [0], "next": 1},
        {"history": [0, 1], "next": 2},
        {"history": [1, 2], "next": 0},  # cut at its beginning
        {"history": [1, 2], "next": 3},  # the item before it is 0, not 2
        {"history": [], "next": 3},
        {"history": [2], "next": 3},
    ]
    lines = "\n".join(json.dumps(row) for row in rows)
    source = LINES.replace("splits", "fields: [history, next], splits")
    data = open_texts(put(source, s_jsonl=lines, i_txt="0::A\n1::B\n2::C\n3::D\n"))
    assert data.users == [0, 0, 0, 1, 2]  # of the rows with a history
    assert data.take([2, 3, 4]).users == [0, 1, 2] and numbered(["b", "a", "b"]) == [0, 1, 0]


def test_users_of_events_keep_their_names_in_all_splits(put):
    events = "user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u in "xy" for t, i in enumerate("abcd"))
    path = put(EVENTS % "{train: 2, validation: 2, test: 2}", e_csv=events, i_csv=ITEMS)
    names = [[row["user"] for row in open_texts(path, split).rows] for split in ("train", "test")]
    assert names == [["x", "y"]] * 2


def test_sequences_with_their_own_split(put):
    rows = [{"seq": [2, 0], "next": 1}, {"seq": [], "next": 0}]
    packed = gzip.compress("\n".join(json.dumps(row) for row in rows).encode())
    source = (
        "{kind: interactions, root: t, items: i.txt, item_separator: '::', title: '(.*?)(?: .*)?', fields: [seq, next],"
        " files: {train: s.jsonl.gz, test: u.jsonl}, splits: {train: 1, test: 1}, manifest: m.json}"
    )
    path = put(source, s_jsonl="", i_txt="0::Zero (1990)\n1::One :: more\n2::Two\n", u_jsonl=json.dumps(rows[0]))
    (path.parent.parent.parent / "data" / "t" / "s.jsonl.gz").write_bytes(packed)
    assert rows_of(path, "train") == [(["Two", "Zero"], "One", "train:0")]
    assert len(open_texts(path)) == 2 and open_texts(path).ids == ["train:0", "test:0"]
    assert open_texts(path, "train").take([0]).catalogue.titles == ("Zero", "One", "Two")
    write_manifest(
        path.parent / "m.json", load_card(path).sources[0].list_files(path.parent.parent.parent / "data" / "t")
    )
    assert check(path).ok and "2 rows, 3 hashes agree" in str(check(path))
    (path.parent.parent.parent / "data" / "t" / "i.txt").write_text("0::Nil\n1::One\n2::Two\n")
    assert not check(path).ok and "changed 'i.txt'" in str(check(path))


CATALOGUE = Catalogue(tuple(map(str, range(60))), tuple(f"title {i // 2}" for i in range(60)))


def test_i11_candidates():
    drawn: list[list[int]] = []
    for row in range(40):
        history, target = [row % 60, (row + 2) % 60, (row + 7) % 60], (row + 12) % 60
        candidates = draw_candidates(CATALOGUE, history, target, 20, f"user {row}")
        titles = [CATALOGUE.titles[i] for i in candidates]
        assert (
            len(candidates) == len(set(titles)) == 20 and candidates.count(target) == 1
        )  # titles come twice in the catalogue
        assert not {CATALOGUE.titles[i] for i in history} & set(titles)
        assert candidates == draw_candidates(CATALOGUE, history, target, 20, f"user {row}")
        assert candidates != draw_candidates(CATALOGUE, history, target, 20, f"user {row}", seed=1)
        drawn.append(candidates)
    places = [candidates.index((row + 12) % 60) for row, candidates in enumerate(drawn)]
    assert (
        len(set(places)) > 10 and len({tuple(candidates) for candidates in drawn}) == 40
    )  # the target's place tells nothing
    assert draw_candidates(CATALOGUE, [0], 2, 4, "a") == draw_candidates(CATALOGUE, [0], 2, 4, "a") != [2, 3, 4, 5]


@pytest.mark.parametrize(("count", "message"), [
    (1, "candidates: 1 of 60 items"), (59, "candidates: 59 of 60 items"), (40, "fewer than 40 titles that differ are left")
])  # fmt: skip
def test_too_many_candidates(count, message):
    with pytest.raises(UserError, match=message):
        draw_candidates(CATALOGUE, [0], 2, count, "user")


@pytest.mark.parametrize(("files", "message"), [
    ({"e_csv": "user,item,time\n"}, "e.csv: has no column 'timestamp'"),
    ({"e_csv": "user,item,timestamp\n1,a,x\n"}, "line 2: time 'x' is not a number"),
    ({"e_csv": "user,item,timestamp\n1,a,nan\n"}, "line 2: time 'nan' is not a number"),
    ({"e_csv": "user,item,timestamp\n1,a,-inf\n"}, "line 2: time '-inf' is not a number"),
    ({"e_csv": 'user,item,timestamp\n1,a,"' + "9" * 140_000}, "e.csv: line 2: cannot be read as a table: field larger than"),
    ({"e_csv": "user,item,timestamp\n1,z,3\n"}, "item 'z' has no title"),
    ({"e_csv": "user,item,timestamp\n1,a\n"}, "line 2: has 2 fields, the first line names 3"),
    ({"e_csv": "user,item,timestamp\n1,a,1\n1,b,2\n1,c,3\n"}, "1 of 2 rows found under .VISMT_DATA/t"),
    ({"e_csv": b"user,item,timestamp\n1,\xe5,1\n"}, "e.csv' cannot be read"),
    ({"i_csv": ITEMS + "a,Again\n"}, "item 'a' twice"),
    ({"i_csv": "item,title\na,\n"}, "no id and title"),
    ({"i_csv": "item,name\na,b\n"}, "has no column 'title'"),
])  # fmt: skip
def test_tables_that_the_card_does_not_describe(put, files, message):
    path = put(EVENTS % "{test: 2}", **{"e_csv": "user,item,timestamp\n1,a,1\n", "i_csv": ITEMS, **files})
    with pytest.raises(UserError, match=message):
        open_texts(path)


@pytest.mark.parametrize(("line", "message"), [
    ("{", "line 1: is not JSON"), ("[1]", "is not an object with history, a list, and next"),
    ('{"history": 1, "next": 0}', "is not an object"), ('{"history": [5], "next": 0}', "item '5' has no title"),
])  # fmt: skip
def test_sequences_that_the_card_does_not_describe(put, line, message):
    with pytest.raises(UserError, match=message):
        open_texts(put(LINES, s_jsonl=line, i_txt="0::A\n1::B\n"))


def test_a_damaged_archive(put):
    path = put(LINES.replace("s.jsonl", "s.jsonl.gz"), i_txt="0::A\n")
    (path.parent.parent.parent / "data" / "t" / "s.jsonl.gz").write_bytes(gzip.compress(b"{}" * 50)[:20])
    with pytest.raises(UserError, match=r"s.jsonl.gz' is damaged"):
        open_texts(path)
    (path.parent.parent.parent / "data" / "t" / "s.jsonl.gz").unlink()
    with pytest.raises(UserError, match="missing file"):
        open_texts(path)
    with pytest.raises(UserError, match=r"is a set of texts \(kind interactions\); open it with open_texts"):
        open_images(path)


@pytest.mark.parametrize(("change", "message"), [
    ("files: {test: s.jsonl}", "give either 'files'"),
    ("splits: {dev: 1}", "a table of events has no split 'dev'"),
    ("columns: [user, user, time]", "'columns' must be 3 different names"),
    ("separator: ', '", "separator ', ' must be one character"),
    ("item_separator: ''", "item_separator '' must be one character"),
    ("shortest: 0", "shortest is 0; it must be at least 1"),
    ("title: 'x'", "has 0 groups, must have one"),
    ("title: '('", "is not a regular expression"),
    ("encoding: latin-99", "encoding 'latin-99' is not known"),
    ("inside: ../data", "must be a relative path"),
    ("wheel: recbole", "wheel 'recbole' must be 'package==version', with a 'manifest'"),
    ("items: ../i.csv", "must be a relative path"),
    ("events: /e.csv", "must be a relative path"),
])  # fmt: skip
def test_cards_that_contradict_themselves(put, change, message):
    key, _, value = change.partition(": ")
    base = {
        "kind": "interactions",
        "root": "t",
        "items": "i.csv",
        "item_columns": "[item, title]",
        "events": "e.csv",
        "splits": "{test: 1}",
        key: value,
    }
    with pytest.raises(UserError, match=message):
        open_texts(put("{" + ", ".join(f"{name}: {text}" for name, text in base.items()) + "}", i_csv=ITEMS, e_csv="x"))


# ---- out of a wheel ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def wheeled(home, write_card, monkeypatch, tmp_path):
    """wheeled(**members): a card with its files in a wheel that a fake pip delivers."""
    source = EVENTS.replace("root: t,", "root: t, wheel: some-package==1.0, inside: pkg/data, manifest: m.json,")
    path = write_card(f"  - {source}" % "{test: 1}", classes=0)
    content = {"i.csv": ITEMS, "e.csv": "user,item,timestamp\n1,a,1\n1,b,2\n1,c,3\n"}
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    write_manifest(path.parent / "m.json", {name: [(name, tmp_path / name)] for name in content})

    def write(**members: str):
        whole = {**content, **{name.replace("_", "."): text for name, text in members.items()}}

        def pip(arguments, scratch, text, megabytes):
            with zipfile.ZipFile(
                f"{arguments[arguments.index('--dest') + 1]}/some_package-1.0-py3-none-any.whl", "w"
            ) as archive:
                archive.writestr("pkg/__init__.py", "raise SystemExit('imported')")
                for name, text in whole.items():
                    if text:
                        archive.writestr(f"pkg/data/{name}", text)
            return 0, ""

        monkeypatch.setattr(wheels, "run_pip", pip)
        return path

    return write


def test_a_set_out_of_a_wheel_comes_on_request_only(wheeled, home):
    path = wheeled()
    with pytest.raises(UserError, match=r"nothing found under .*VISMT_CACHE/wheels/t.*`vismt data prepare"):
        open_texts(path)
    assert prepare(path).ok and len(open_texts(path)) == 1
    names = sorted(file.name for file in (home / "cache" / "wheels").rglob("*"))
    assert names == [".t.lock", "e.csv", "i.csv", "t"]  # and nothing else
    (home / "cache" / "wheels" / "t" / "i.csv").write_text(ITEMS.replace("Gamma", "Zeta"))
    assert not check(path).ok and prepare(path).ok and check(path).ok  # a changed file of the cache is fetched again


@pytest.mark.parametrize(("members", "message"), [
    ({"i_csv": ITEMS.replace("Gamma", "Zeta")}, "'i.csv' in the wheel is not the file that the card's manifest names"),
    ({"e_csv": ""}, "has no member 'pkg/data/e.csv'"),
])  # fmt: skip
def test_a_wheel_with_other_files_is_refused(wheeled, home, members, message):
    with pytest.raises(UserError, match=message):
        prepare(wheeled(**members))
    assert [path.name for path in (home / "cache" / "wheels").iterdir()] == [".t.lock"]


@pytest.mark.realdata
def test_the_real_set():
    try:
        test = open_texts("lastfm", "test")
    except UserError as error:
        pytest.skip(str(error))
    assert check("lastfm").ok and len(test) == 122 and len(test.catalogue) == 4606
    for name, row in zip(test.ids, test.rows):
        assert len(draw_candidates(test.catalogue, row["history"], row["next"], 20, name)) == 20
