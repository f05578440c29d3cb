"""Recommendation as a run: a recommender trained once, arms with their controls, resume, report, and what is refused."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import yaml
from helpers.lm_parts import changed, ranked_task, save_interactions, save_lm, save_opt, save_texts
from helpers.pages import ROOT
from helpers.tiny_runs import interrupted, refused, run_config, written

from vismt.base import ranks
from vismt.base.errors import UserError
from vismt.cli import main
from vismt.engine import training_files
from vismt.jobs import open_run
from vismt.jobs.lm.recommender import Recommender
from vismt.llm.ilora.hybrid import Hybrid
from vismt.llm.ilora.method import gate_part
from vismt.report.results import EXAMPLE, RECORDS, read_results
from vismt.storage.lines import read_lines
from vismt.uncertainty.intervals import wilson

ARMS = ["frozen", "sasrec", "lora", "ilora", "random", "shuffled", "cnn"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("walks")
    return {
        "lm": str(save_lm(folder / "tiny")),
        "walks": str(save_interactions(folder)),
        "films": str(save_texts(folder)["films"]),
    }


def settings(home: dict[str, str], **changes: object) -> dict[str, object]:
    walks = home["walks"]
    options = {"candidates": 4, "history": 3, "curriculum": 0.5, "length": 96}
    task = ranked_task(walks, options=options, validation=[f"{walks}:validation"])
    return {
        "task": "lm",
        "model": {"name": home["lm"], "first_block": 1},
        "tasks": [task],
        "adapt": {"method": "ilora", "rank": 4, "targets": ["q_proj", "v_proj"], "options": {"n_experts": 2}},
        "recommender": {"width": 8, "steps": 60, "batch": 30, "lr": 1e-2},
        "train": {"steps": 6, "lr": 1e-2, "checkpoint_every": 3, "rates": {"instance_gate": 0.3}},
        "batch": 4,
        "evaluate": {"batch": 4},
        **changes,
    }


def write(folder: Path, config: dict[str, object]) -> Path:
    return written(folder / "walks.yaml", config)


@pytest.fixture(scope="module")
def study(home, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    config = settings(home, seeds=[0, 1], arms={
        "lora": {"adapt": {"method": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]}, "train.rates": {}},
        "ilora": {}, "random": {"gates": "random", "adapt.options.gate": None, "train.rates": {}},
        "shuffled": {"gates": "shuffled-user"}, "cnn": {"adapt.options.gate": "cnn"},
    })  # fmt: skip
    written = {
        **config["tasks"][0],
        "name": "written",
        "options": {**config["tasks"][0]["options"], "answer": "write", "new_tokens": 4},
    }
    config["tasks"].append({key: written[key] for key in ("name", "kind", "prompt", "options", "test")})
    return run_config(write(folder, config))


def test_every_arm_and_both_references_answer_the_same_rows(study: Path) -> None:
    rows = [row for row in read_results(study / "results.jsonl", open_run(study).hash) if row.seed is None]
    ranked = [row for row in rows if row.task == "ranked"]
    assert [row.arm for row in ranked if row.metric == "HitRatio@1"] == ARMS
    assert {row.metric for row in ranked} == {"HitRatio@1", "NLL in nats"} and {row.n for row in rows} == {30}
    metrics = {row.metric for row in rows if row.task == "written"}
    assert metrics == {"HitRatio@1", "ValidRatio", "HitRatio@1 by substring", "ValidRatio by substring"}
    ids = []
    for row in ranked:
        records = read_lines(study / RECORDS / f"{row.stem}.jsonl")
        ids.append([line[EXAMPLE] for line in records])
        assert sum(line["clean"] for line in records) / 30 == pytest.approx(row.value)
    assert all(names == ids[0] for names in ids) and len(set(ids[0])) == 30  # paired, user by user
    nll = {row.arm: row.value for row in ranked if row.metric == "NLL in nats"}
    assert nll["sasrec"] < math.log(4) and len(set(nll.values())) == 7  # the walk is easy, and no two arms are alike
    report = (study / "report.md").read_text()
    assert "(unpaired)" not in report and "HitRatio@1" in report


def test_the_rank_of_the_right_candidate_follows_from_the_records(study: Path) -> None:
    """HitRatio@k, MRR and NDCG@k are functions of the rank."""
    rows = read_results(study / "results.jsonl", open_run(study).hash)
    for seed in (0, 1):
        (path,) = (study / "arms" / "lora").glob(f"*-seed-{seed}/records/test-ranked*.jsonl")
        records = read_lines(path)[1:]
        ranks_of = [1 + sum(p > line["log_p"][line["label"]] for p in line["log_p"]) for line in records]
        assert len(records) == 30 and {len(line["log_p"]) for line in records} == {4} and max(ranks_of) > 1
        (hits,) = (r for r in rows if (r.arm, r.seed, r.task, r.metric) == ("lora", seed, "ranked", "HitRatio@1"))
        assert sum(rank == 1 for rank in ranks_of) / 30 == pytest.approx(hits.value)


def test_shares_have_wilsons_interval(study: Path) -> None:
    """Of single trainings; that of a mean over trainings ends at 0 and 1, and that of the NLL is symmetric."""
    rows = read_results(study / "results.jsonl")
    shares = [row for row in rows if row.seed is not None and row.metric != "NLL in nats"]
    assert len(shares) == 2 * 5 * 5
    for row in shares:
        assert (row.low, row.high) == pytest.approx(wilson(round(row.value * 30), 30))
    others = [row for row in rows if row.seed is None or row.metric == "NLL in nats"]
    for row in others:
        if row.metric == "NLL in nats":
            assert row.high - row.value == pytest.approx(row.value - row.low, abs=1e-9)
        else:
            assert 0 <= row.low < row.value < row.high <= 1 or row.value in (row.low, row.high)


def test_arms_share_one_recommender_and_differ_in_their_gates(study: Path) -> None:
    job = open_run(study).job
    nets = {arm: job.loaded(job.study.find(f"{arm}:1")) for arm in ("lora", "ilora", "random", "shuffled")}
    assert (study / "recommender" / "sasrec.safetensors").exists()
    conditions = {arm: (net.head.condition, len(net.head.others)) for arm, net in nets.items()}
    assert conditions == {
        "lora": ("user", 0),
        "ilora": ("user", 0),
        "random": ("random", 0),
        "shuffled": ("shuffled-user", 120),
    }
    weights = [net.head.recommender.item.weight for net in nets.values()]
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    net = job.loaded(job.study.find("ilora"))
    assert isinstance(net.head, Hybrid) and gate_part(net.lm).user_width == 8
    logged = read_lines(next((study / "arms" / "ilora").glob("*-seed-0/metrics.jsonl")))
    assert {line["hybrid"] for line in logged} == {0.0, 1.0} and [line["hybrid"] for line in logged[3:]] == [1.0] * 3
    merged = {arm: list((study / "arms" / arm).glob("*/merge.json")) for arm in ("lora", "ilora")}
    assert len(merged["lora"]) == 2 and not merged["ilora"]  # gates of many users fit into no weight


def test_the_recommender_sees_training_rows_alone(study: Path) -> None:
    data = open_run(study).job.data
    rows = data.interactions()
    assert len(rows) == 120  # all of them, though the LM trains on twelve
    test = next(iter(data._sets["ranked"]["test"].values()))[0].rows
    users = {tuple(row["history"][:2]): (row["history"], row["next"]) for row in test}
    for history, target in rows:  # all of it before the last but one interaction of the user
        whole, last = users[tuple(history[:2])]
        assert [*history, target] == whole[: len(history) + 1] and len(history) + 1 < len(whole) and target != last
    assert len(data.training()) == 12


def test_several_processes_take_no_curriculum(study: Path, monkeypatch) -> None:
    job = open_run(study).job
    monkeypatch.setattr("vismt.jobs.lm.job.runtime.processes", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(UserError, match=r"curriculum 0.5 with 2 processes"):
        job.batches(job.config)


def test_evaluating_again_computes_nothing(study: Path, monkeypatch) -> None:
    before = (study / "results.jsonl").read_bytes()
    monkeypatch.setattr("vismt.llm.net.LmNet.hidden", lambda *_: pytest.fail("a row was evaluated again"))
    monkeypatch.setattr("vismt.engine.loop.train", lambda *_, **__: pytest.fail("the recommender was trained again"))
    open_run(study).evaluate()
    assert (study / "results.jsonl").read_bytes() == before


def test_exporting_gates_of_many_users_is_refused(study: Path, tmp_path: Path, capsys) -> None:
    where = ["--format", "transformers", "--to", str(tmp_path / "out"), "--quiet"]
    assert "gate" in refused(capsys, "export", study, "--arm", "ilora", *where)
    assert main(["export", str(study), "--arm", "lora", *where]) == 0
    assert (tmp_path / "out" / "head.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["recommender", "arms"])
def test_an_interrupted_run_goes_on_bit_for_bit(home, tmp_path: Path, monkeypatch, inside: str) -> None:
    steps, step = {"recommender": (501, 500), "arms": (5, 3)}[inside]
    path = write(tmp_path, settings(home, recommender={"width": 8, "steps": steps, "batch": 30, "lr": 1e-2}))
    assert main(["train", str(path), "--out", str(tmp_path / "straight"), "--quiet"]) == 0
    interrupted(monkeypatch, step, "train", path, "--out", tmp_path / "stopped", "--quiet", inside=inside)
    assert main(["train", str(path), "--out", str(tmp_path / "stopped"), "--quiet"]) == 0
    for name in (
        "recommender/sasrec.safetensors",
        "arms/adapted/lr-0.01-seed-0/head.safetensors",
        "arms/adapted/lr-0.01-seed-0/adapter/adapter.json",
    ):
        straight, stopped = (next((tmp_path / run).glob(f"*/{name}")).read_bytes() for run in ("straight", "stopped"))
        assert straight == stopped, name


@pytest.mark.parametrize(("changes", "words"), [
    ({"arms": {"a": {"recommender.width": 4}}}, "arms.a: recommender.width must be the same for all arms"),
    ({"arms": {"sasrec": {}}}, "'sasrec' is the name of a recommender"),
    ({"gates": "shuffled"}, "gates: 'shuffled' is not known. Near: 'shuffled-user'"),
    ({"gates": "random"}, "adapt.options.gate is null where gates are random or group"),
    ({"adapt.options": {"n_experts": 2, "gate": None}}, "adapt.options.gate is null where gates are random or group"),
    ({"adapt": {"method": "lora"}, "gates": "random"}, "'lora' has no gates"),
    ({"recommender.steps": 0}, "recommender.steps is 0; it must be at least 1"),
    ({"recommender.batch": 5000}, "recommender.batch: 5000, with"),
    ({"recommender.baselines": ["popular"]}, "recommender.baselines: 'popular' is not known. Near: 'popularity'"),
    ({"projector": "line"}, "projector: 'line' is not known. Near: 'linear'"),
    ({"adapt.options": {"user_width": 16}}, "needed (samples, 16)"),
    ({"evaluate.split": "tests"}, "evaluate.split: 'tests' is not known. Near: 'test'"),
])  # fmt: skip
def test_user_errors(home, tmp_path: Path, capsys, changes, words) -> None:
    path = write(tmp_path, changed(settings(home), changes))
    assert words in refused(capsys, "train", path, "--out", tmp_path / "runs", "--quiet")


def test_item_vectors_as_wide_as_narrow_embeddings_need_the_first_block(home, tmp_path: Path, capsys) -> None:
    config = changed(settings(home), {"model.name": str(save_opt(tmp_path / "opt"))})
    error = refused(capsys, "train", write(tmp_path, config), "--out", tmp_path / "runs", "--quiet")
    assert "model.first_block: 1; the embeddings of OPTForCausalLM are 8 wide and its blocks 16" in error
    config["model"]["first_block"] = 0
    assert main(["train", str(write(tmp_path, config)), "--out", str(tmp_path / "runs"), "--quiet"]) == 0


def test_tasks_that_do_not_go_together(home, tmp_path: Path, capsys) -> None:
    films = {"name": "films", "kind": "causal", "options": {"answer": "{text}"}, "test": [f"{home['films']}:test"]}
    plain = {**films, "train": [f"{home['films']}:train"]}
    ranked = settings(home)["tasks"][0]
    shown = {**{key: ranked[key] for key in ("kind", "prompt", "test")}, "name": "seen", "options": {"length": 96}}

    def with_options(**options: object) -> dict[str, object]:
        return {**ranked, "options": {**ranked["options"], **options}}

    other = save_interactions(tmp_path / "other")
    lora = {"method": "lora", "rank": 2, "targets": ["q_proj"]}
    for changes, words in (
        ({"tasks": [ranked, films]}, "'films' has none; take tasks of kind recommendation only"),
        (
            {"tasks": [with_options(items=False), shown]},
            "'seen' shows item vectors that nothing trains; set items to false",
        ),
        ({"tasks": [with_options(history=2), shown]}, "'seen' has a history of 10, and the recommender reads 2"),
        ({"tasks": [plain], "adapt": lora}, "recommender: is for a recommendation, and 'causal' is trained"),
        ({"tasks": [plain], "adapt": lora, "recommender": None, "gates": "random"}, "gates: is for a recommendation"),
        ({"tasks": [{**ranked, "train": films["test"]}], "adapt": lora}, "needs sets of kind interactions"),
        ({"tasks": [{**ranked, "test": [f"{other}:test"]}]}, "knows the items of one card"),
    ):
        path = write(tmp_path, settings(home, **changes))
        assert words in refused(capsys, "train", path, "--out", tmp_path / "r", "--quiet")


# ---- candidates that are judged, users that are held out -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged(home, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    options = {"candidates": 4, "history": 3, "answer": "judge", "question": " and {candidate} is", "negatives": 2}
    ranked = ranked_task(
        home["walks"],
        prompt="the {history}",
        options={**options, "sample": "users", "titles": False, "curriculum": 0, "length": 96},
        validation_share=0.1,
        test_share=0.3,
        test=[],
        limit=20,
    )
    config = settings(
        home,
        tasks=[ranked],
        recommender={
            "width": 8,
            "steps": 60,
            "batch": 20,
            "lr": 1e-2,
            "cross_fit": True,
            "baselines": ["popularity", "recency", "mean-item", "gru4rec"],
        },
        projector="linear",
        seeds=[0, 1],
        arms={
            "lora": {"adapt": {"method": "lora", "rank": 4, "targets": ["q_proj"]}, "train.rates": {}},
            "text": {"gates": "text"},
        },
        evaluate={"batch": 4, "limit": 27, "frozen": False},
    )
    return run_config(write(folder, config))


def test_no_user_is_in_two_parts(judged: Path) -> None:
    data = open_run(judged).job.data
    parts = {
        part: [row["user"] for sets in named.values() for texts in sets for row in texts.rows]
        for part, named in data._sets["ranked"].items()
    }
    users = {part: set(names) for part, names in parts.items()}
    assert {part: len(names) for part, names in users.items() if part in ("validation", "test")} == {
        "validation": 3,
        "test": 9,
    }
    assert len(users["train"]) + len(users["sasrec"]) == 18 and min(len(users["train"]), len(users["sasrec"])) > 4
    assert sum(map(len, parts.values())) == 120 == sum(len(parts[part]) for part in users)
    assert len(set.union(*users.values())) == sum(map(len, users.values())) == 30
    assert data.fitted == "sasrec" and len(data.interactions(data.fitted)) == len(parts["sasrec"])
    assert len(data.interactions()) == len(parts["train"])
    trained = {item.listed.user for item in data.training()}
    assert trained <= users["train"] and len(data.training()) == 20
    counts = [sum(item.listed.user == user for item in data.training()) for user in trained]
    assert len(trained) == len(users["train"]) and max(counts) - min(counts) <= 1  # a limit keeps as many of each


def test_intervals_are_over_users(judged: Path) -> None:
    rows = [row for row in read_results(judged / "results.jsonl") if row.seed is None]
    arms = ["sasrec", "popularity", "recency", "mean-item", "gru4rec", "lora", "text"]
    assert [row.arm for row in rows if row.metric == "HitRatio@1"] == arms
    assert {(row.n, row.unit) for row in rows} == {(9, "users")} and {row.protocol for row in rows} == {
        "the next of 4 items, each judged by a question, 27 test rows"
    }
    names = [line[EXAMPLE] for line in read_lines(judged / RECORDS / f"{rows[0].stem}.jsonl")]
    assert len(names) == 9 and len({row.value for row in rows}) > 9
    assert {row.chance for row in rows if row.metric == "HitRatio@1"} == {0.25}


def test_every_baseline_answers_by_its_own_scores(judged: Path) -> None:
    job = open_run(judged).job
    recommender, items = job.recommender_of(0), job.data.rows("ranked", "test", job.data.names("ranked", "test")[0])
    targets = [target for _, target in job.data.interactions("sasrec")]
    for item, record in zip(items, recommender.records("popularity", items)):
        counts = torch.tensor([targets.count(number) + 1.0 for number in item.listed.candidates])
        assert record["log_p"] == pytest.approx((counts / counts.sum()).log().tolist(), abs=1e-6)
    kinds = [
        tuple(recommender.records(arm, items)[0]["log_p"]) for arm in ("sasrec", "gru4rec", "recency", "mean-item")
    ]
    assert len(set(kinds)) == 4 and (judged / "gru4rec" / "gru4rec.safetensors").exists()
    assert len({recommender.fingerprint(arm) for arm in ("sasrec", "gru4rec")}) == 2
    net = job.loaded(job.study.find("text:1"))
    assert net.head.condition == "text" and gate_part(net.lm).user_width == 32
    assert isinstance(net.head.projector, torch.nn.Linear)


# ---- folds


@pytest.fixture(scope="module")
def folds(home, tmp_path_factory) -> Path:
    """The configuration of the gates' study with three folds, on a tiny LM and two steps."""
    config = yaml.safe_load((ROOT / "configs/lm/ilora_gates.yaml").read_text())
    (task,), walks = config["tasks"], home["walks"]
    options = {**task["options"], "candidates": 4, "negatives": 2, "history": 3, "shown": 1, "length": 96}
    options["question"] = " and {candidate} is"
    task |= {
        "options": options,
        "prompt": "the {history}",
        "train": [f"{walks}:train"],
        "limit": 20,
        "test_share": 1 / 3,
    }
    targets = ["q_proj"]
    config["arms"]["lora"]["adapt"]["targets"] = config["adapt"]["targets"] = targets
    config |= {
        "model": {"name": home["lm"], "first_block": 1},
        "seeds": [0, 1, 2],
        "recommender": {**config["recommender"], "width": 8, "steps": 20, "batch": 20},
        "train": {**config["train"], "steps": 2, "warmup": 0},
        "batch": 4,
    }
    return run_config(write(tmp_path_factory.mktemp("folds"), config))


def test_every_user_is_tested_once_by_trainings_that_did_not_see_it(folds: Path) -> None:
    job = open_run(folds).job
    tested: list[set[str]] = []
    for seed in job.study.seeds:
        data = job.fold(seed).data
        users = {
            part: {row["user"] for sets in named.values() for texts in sets for row in texts.rows}
            for part, named in data._sets["held-out"].items()
        }
        assert len(users["test"]) == 10 and not users["test"] & users["train"] and len(users["train"]) == 20
        tested.append(users["test"])
        for arm in job.study.arms:
            records = next((folds / "arms" / arm).glob(f"*-seed-{seed}/records/*.jsonl"))
            assert {line["user"] for line in read_lines(records)[1:]} == users["test"]
        assert data.fitted == "train" and (folds / f"fold-{seed}" / "recommender" / "sasrec.safetensors").exists()
    assert len(set.union(*tested)) == sum(map(len, tested)) == 30


def test_folds_are_one_score_over_all_users(folds: Path) -> None:
    rows = read_results(folds / "results.jsonl", open_run(folds).hash)
    assert {(row.n, row.unit, row.seed, row.interval) for row in rows} == {(30, "users", None, "examples")}
    hits = {row.arm: row for row in rows if row.metric == "HitRatio@1"}
    assert list(hits) == ["sasrec", "popularity", "recency", "lora", "ilora", "group-gate", "shuffled-user"]
    for arm, row in hits.items():
        lines = read_lines(folds / RECORDS / f"{row.stem}.jsonl")
        assert len({line[EXAMPLE] for line in lines}) == 30, arm
        assert math.fsum(line["clean"] for line in lines) / 30 == pytest.approx(row.value)
    assert {row.protocol for row in rows} == {"the next of 4 items, each judged by a question, test rows of 3 folds"}


@pytest.mark.parametrize(("changes", "words"), [
    ({"test_share": 0.3}, "a test_share of 1/2, 1/3 and so on, here 'recommendation' and 0.3"),
    ({"test_share": 0.0}, "rotate needs interactions of users and a test_share"),
])  # fmt: skip
def test_shares_that_make_no_folds(home, tmp_path: Path, capsys, changes, words) -> None:
    task = {**settings(home)["tasks"][0], "rotate": True, "test": [], "validation": [], **changes}
    path = write(tmp_path, settings(home, tasks=[task]))
    assert words in refused(capsys, "train", path, "--out", tmp_path, "--quiet")


def test_rates_are_not_chosen_on_the_test_users_of_another_fold(home, tmp_path: Path, capsys) -> None:
    shares = {"rotate": True, "test_share": 0.2, "validation_share": 0.2, "test": [], "validation": []}
    config = settings(home, tasks=[{**settings(home)["tasks"][0], **shares}], tune={"rates": [1e-3, 1e-2]})
    error = refused(capsys, "train", write(tmp_path, config), "--out", tmp_path, "--quiet")
    assert "validation users of one fold of 'ranked' are test users of another" in error


def test_processes_that_share_a_run_folder_train_one_recommender(tmp_path, monkeypatch, capsys):
    """As the parts of a study do; who comes later waits, and loads what the first one trained."""
    trained, started = [], Event()

    def train(self, net, folder, file):
        trained.append(net)
        started.set()
        time.sleep(0.3)
        torch.nn.init.constant_(net.weight, 3.0)
        safetensors.torch.save_file(training_files.state(net), folder / file)
        training_files.finish(net, folder, False, {})

    def use():
        recommender = Recommender.__new__(Recommender)
        recommender.folder = tmp_path
        return recommender._trained("sasrec", torch.nn.Linear(2, 2))

    monkeypatch.setattr(Recommender, "_train", train)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(use)
        started.wait()
        nets = [pool.submit(use).result(), first.result()]
    assert len(trained) == 1 and all(bool((net.weight == 3).all()) for net in nets)
    # Whether it is trained the first process of a launch says: another one may see the file later, or earlier.
    monkeypatch.setattr(ranks, "on_first", lambda function: False)
    use()
    assert len(trained) == 2
    assert "another process trains it" in capsys.readouterr().out
