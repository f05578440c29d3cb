"""The command line on a tiny random ViT and real digits, from configuration to report; user errors exit with code 2."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import yaml
from helpers.results import scores_of
from helpers.tiny_runs import interrupted, refused, run_config, run_on_two, save_classifier, written

from vismt import cli
from vismt.cli import main
from vismt.storage.lines import read_lines, write_lines

TRAINING, EPISODES = "arms/adapted/lr-0.001-seed-0", "episodes/seed-0"
SMALL = {
    "model": {"name": "test_vit", "img_size": 32, "pretrained": False, "block": 4},
    "on_bad_sample": "error",
    "adapt": {"method": "lora", "rank": 2},
    "source": {"data": ["photo_crops:train"], "ways": 3, "shots": 2, "queries": 2, "augment": False},
    "train": {"steps": 4, "lr": 1e-3, "checkpoint_every": 2},
    "evaluate": {
        "data": ["digits"],
        "ways": 3,
        "shots": [1],
        "queries": 2,
        "episodes": 3,
        "attacks": [{"name": "pgd", "epsilon": "4/255", "steps": 2}],
    },
}


def write(folder: Path, **changes: object) -> Path:
    return written(folder / "small.yaml", {**SMALL, **changes})


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("e2e")
    return run_config(write(folder))


def test_a_run_leaves_everything_a_number_needs(run_folder: Path) -> None:
    assert run_folder.name.startswith("small-")
    rows = scores_of(run_folder)
    assert {(row["arm"], row["condition"]) for row in rows} == {
        (model, condition) for model in ("frozen", "adapted") for condition in ("clean", rows[1]["condition"])
    }
    facts = json.loads((run_folder / "run.json").read_text())
    for row in rows:
        assert (
            row["n"] == 3
            and row["low"] <= row["value"] <= row["high"]
            and row["config_hash"] == facts["config_hash"] == run_folder.name.rpartition("-")[2]
        )
    assert facts["adapt"]["arms"]["adapted"]["method"] == "lora" and facts["finished"]
    assert facts["wall_time_s"] > 0 and facts["cpu_time_s"] > 0
    assert [row["step"] for row in read_lines(run_folder / TRAINING / "metrics.jsonl")] == [1, 2, 3, 4]
    for name in ("report.md", "report.html", "config.resolved.yaml", f"{TRAINING}/adapter/adapter.json"):
        assert (run_folder / name).stat().st_size > 0
    assert list((run_folder / "figures").glob("*.svg"))
    (panel,) = (run_folder / "panels").glob("*.npz")
    with np.load(panel, allow_pickle=False) as arrays:
        assert str(arrays["model"]) == "adapted"
    # the episodes are named by how they were drawn, so that another run can be compared on the same ones
    assert len({row["examples"] for row in rows}) == 1 and len(rows[0]["examples"]) == 16
    # a header and 3 episodes of each model; the values by example of each model's accuracy, NLL and Brier score
    assert [len(read_lines(path)) for path in sorted((run_folder / EPISODES).iterdir())] == [4, 4]
    assert [len(read_lines(path)) for path in sorted((run_folder / "records").iterdir())] == [3] * 6


def test_what_is_not_trained_is_evaluated_first_and_printed_once(tmp_path: Path, capsys) -> None:
    config = str(write(tmp_path, train={"steps": 1}, evaluate={**SMALL["evaluate"], "attacks": []}))
    assert main(["run", config, "--out", str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[0] + (" frozen" if "frozen" in line else "") for line in lines]
    assert shown.index("eval frozen") < shown.index("train") < shown.index("eval")
    assert shown.count("eval frozen") == shown.count("eval") == 1
    # `vismt train` evaluates nothing
    assert main(["train", config, "--out", str(tmp_path / "others")]) == 0
    assert "eval" not in capsys.readouterr().out


def test_the_command_of_a_report_can_be_pasted(tmp_path: Path, monkeypatch) -> None:
    import shlex

    from vismt.jobs.run import _command

    words = ["run", "my configs/a.yaml", "evaluate.data=[a, b]", "title=it's $HOME"]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vismt", *words])
    assert shlex.split(_command()) == ["vismt", *words]
    monkeypatch.setattr(sys, "argv", ["/lib/vismt/__main__.py", *words])
    assert shlex.split(_command()) == ["python", "-m", "vismt", *words]


def test_the_same_command_again_does_nothing_twice(run_folder: Path, capsys) -> None:
    before = {path: path.read_text() for path in (run_folder / EPISODES).iterdir()}
    assert main(["run", str(write(run_folder.parent.parent)), "--out", str(run_folder.parent)]) == 0
    assert {path: path.read_text() for path in (run_folder / EPISODES).iterdir()} == before
    out = capsys.readouterr().out
    assert "done before" in out and out.strip().splitlines()[-1].endswith("report.html")


def test_merged_export_is_a_stock_timm_checkpoint(run_folder: Path, tmp_path: Path) -> None:
    assert main(["merge", str(run_folder), "--quiet"]) == 0
    assert main(["export", str(run_folder), "--format", "timm", "--to", str(tmp_path / "timm"), "--quiet"]) == 0
    file = tmp_path / "timm" / "model.safetensors"
    state = safetensors.torch.load_file(file)
    model = timm.create_model("test_vit", img_size=32, num_classes=0, checkpoint_path=str(file))
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert (run_folder / "merged-adapted-seed-0" / "model.safetensors").read_bytes() == file.read_bytes()
    from_folder = timm.create_model(f"local-dir:{file.parent}", pretrained=True)  # the folder alone is enough
    assert set(from_folder.state_dict()) == set(state) and from_folder.patch_embed.img_size == (32, 32)
    assert all(torch.equal(from_folder.state_dict()[name], value) for name, value in state.items())
    assert list(timm.data.resolve_model_data_config(from_folder)["input_size"]) == [3, 32, 32]


def test_peft_export_is_read_by_peft(run_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from vismt.backbones.timm_models import create

    assert main(["export", str(run_folder), "--format", "peft", "--to", str(tmp_path), "--quiet"]) == 0
    stock = create("test_vit", 32, False).vit
    images = torch.rand(2, 3, 32, 32)
    before = stock(images)
    peft_model = peft.PeftModel.from_pretrained(stock, str(tmp_path)).eval()
    merged_model = timm.create_model("test_vit", img_size=32, num_classes=0).eval()
    merged_model.load_state_dict(
        safetensors.torch.load_file(run_folder / "merged-adapted-seed-0" / "model.safetensors")
    )
    after = peft_model(images)
    assert torch.allclose(after, merged_model(images), atol=1e-5) and not torch.equal(after, before)


def test_attacking_a_run_adds_rows_and_two_radii_stand_side_by_side(run_folder: Path) -> None:
    before = read_lines(run_folder / "results.jsonl")
    for epsilon in ("2/255", "16/255"):
        assert main(["attack", str(run_folder), "--attack", "fgsm", "--epsilon", epsilon, "--quiet"]) == 0
    after = read_lines(run_folder / "results.jsonl")
    assert len(after) == len(before) + 4
    conditions = {row["condition"] for row in after}
    assert all(sum("FGSM" in name and radius in name for name in conditions) == 1 for radius in ("2/255", "16/255"))
    clean = [[row["value"] for row in rows if row["condition"] == "clean"] for rows in (before, after)]
    assert sorted(clean[0]) == sorted(clean[1])


def test_damaged_run_folders_are_named(run_folder: Path, tmp_path: Path, capsys) -> None:
    import shutil

    records = next((run_folder / EPISODES).glob("*frozen.jsonl"))
    first, *rows = read_lines(records)
    write_lines(tmp_path / "abc.jsonl", [first, {**rows[0], "clean": "abc"}, *rows[1:]])
    results = (run_folder / "results.jsonl").read_text()
    changed = (run_folder / "config.resolved.yaml").read_text().replace("rank: 2", "rank: 3")
    for name, text, words in (
        ("run.json", "[]", "run.json"),
        ("run.json", '{"wall_time_s": "a"}', "run.json"),
        ("run.json", '{"cpu_time_s": "a"}', "run.json"),
        ("results.jsonl", results.replace('"n": 3', '"n": 4', 1), "results.jsonl' line 1 was changed"),
        (f"{EPISODES}/{records.name}", records.read_text().replace("0.", "1.", 1), "was changed or damaged"),
        (f"{EPISODES}/{records.name}", (tmp_path / "abc.jsonl").read_text(), "line 2: 'clean' is 'abc'"),
        (f"{TRAINING}/classifier.safetensors", "x", "classifier.safetensors"),
        ("config.resolved.yaml", changed, "changed after"),
    ):
        folder = tmp_path / "copy"
        shutil.copytree(run_folder, folder)
        (folder / name).write_text(text)
        assert words in refused(capsys, "evaluate", folder)
        shutil.rmtree(folder)


def test_merging_before_training_says_what_to_do(tmp_path: Path, capsys) -> None:
    path = write(tmp_path, adapt=None, train=None, source={})
    folder = run_config(path)
    for command in (["merge", str(folder)], ["export", str(folder), "--format", "peft"]):
        assert "no trained adapter" in refused(capsys, *command)


def test_interrupted_training_and_evaluation_go_on(tmp_path: Path, monkeypatch, capsys) -> None:
    from vismt.metatune.protocol import episode_runner
    from vismt.metatune.protocol.episode_runner import EpisodeRunner

    path = write(tmp_path)
    out = tmp_path / "runs"
    interrupted(monkeypatch, 2, "run", path, "--out", out)
    assert "interrupted. Run the same command again: " in capsys.readouterr().err
    calls = []
    run_episode = EpisodeRunner.__call__

    def second_fails(self, block: range):
        calls.append(block)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_episode(self, block)

    monkeypatch.setattr(episode_runner, "_BLOCK", 1)
    monkeypatch.setattr(EpisodeRunner, "__call__", second_fails)
    assert main(["run", str(path), "--out", str(out)]) == 130
    assert "at step 2 of 4" in capsys.readouterr().out
    monkeypatch.setattr(EpisodeRunner, "__call__", run_episode)
    assert main(["run", str(path), "--out", str(out)]) == 0
    assert "1 of 3 batches are on record" in capsys.readouterr().out


def test_evaluation_of_frozen_features_needs_no_training(tmp_path: Path) -> None:
    rows = read_lines(run_config(write(tmp_path, adapt=None, train=None, source={})) / "results.jsonl")
    assert {row["arm"] for row in rows} == {"frozen"}


def test_an_image_classifier_from_elsewhere_is_attacked(tmp_path: Path, capsys) -> None:
    save_classifier(tmp_path)
    where = ["--model", str(tmp_path / "model.safetensors"), "--out", str(tmp_path / "out")]
    code = main(["attack", *where, "--data", "digits", "--images", "12", "--steps", "2"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert captured.out.count("(n = 12 images; 95 % over new examples)") == 1 and "report.html" in captured.out
    rows = scores_of(tmp_path / "out")
    assert [row["n"] for row in rows] == [12, 12] and rows[1]["value"] <= rows[0]["value"]
    assert [row["kind"] for row in rows] == ["clean", "attack"] and rows[0]["chance"] == 0.1


@pytest.mark.parametrize(
    "command,words",
    [
        (["run", "nowhere.yaml"], ["nowhere.yaml"]),
        (["attack", "{run}", "--images", "3"], ["--images", "--model"]),
        (["attack", "{run}", "--seed", "3"], ["--seed", "--model"]),
        (["attack", "{run}", "--batch", "3"], ["--batch", "--model"]),
        (["attack", "--model", "test_vit", "--random-weights", "--data", "digits", "--images", "0"], ["images is 0"]),
        (["evaluate", "nowhere"], ["nowhere", "no such folder"]),
        (["attack"], ["run folder or --model"]),
        (["attack", "--model", "test_vit"], ["--data"]),
        (["attack", "--model", "test_vit", "--random-weights", "--data", "digits"], ["1000 outputs", "10 classes"]),
        (["export", "{run}", "--format", "onxx"], ["'onxx'", "'onnx'"]),
        (["export", "{run}", "--format", "transformers"], ["not a transformers model"]),
        (["data", "check", "digitz"], ["digitz"]),
        (["data", "prepare"], ["name a card"]),
        (["assets", "get", "vit_small_patch14_imgfocs"], ["vit_small_patch14_imgfocus"]),
    ],
)
def test_user_errors_are_one_line_and_code_2(command, words, run_folder: Path, tmp_path: Path, capsys) -> None:
    path = write(tmp_path)
    filled = [part.format(config=path, run=run_folder) for part in command]
    if command[0] == "run":
        filled += ["--out", str(tmp_path / "runs")]
    error = refused(capsys, *filled)
    assert all(word in error for word in words)


def test_a_list_and_a_wrong_run_folder_are_answered_without_heavy_imports() -> None:
    heavy = "torch numpy PIL transformers torchattacks matplotlib accelerate sklearn skimage onnx"
    code = (
        "import sys; from vismt.cli import main\n"
        "codes = [main(['list']), *(main([name, 'nowhere']) for name in ('evaluate', 'report', 'merge', 'export', 'attack'))]\n"
        "codes += [main(['predict', 'nowhere', 'image.png']), main(['compare', 'nowhere', '.'])]\n"
        f"print(codes, [name for name in {heavy!r}.split() if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.split("\n")[-2] == "[0, 2, 2, 2, 2, 2, 2, 2] []"


def test_a_divergent_run_is_reported_and_keeps_its_folder(tmp_path: Path, capsys) -> None:
    path = write(tmp_path, train={"steps": 6, "lr": 1e30, "checkpoint_every": 1, "clip": None, "optimizer": "sgd"})
    assert "not finite at step" in refused(capsys, "train", path, "--out", tmp_path / "runs")


@pytest.fixture
def card_path(tmp_path: Path) -> Path:
    """A card of three classes with one file that is not an image."""
    from torchvision.io import write_png

    generator = torch.Generator().manual_seed(0)
    for name in "abc":
        (tmp_path / "set" / "images" / name).mkdir(parents=True)
        for number in range(5):
            image = torch.randint(0, 256, (3, 20, 24), generator=generator, dtype=torch.uint8)
            write_png(image, str(tmp_path / "set" / "images" / name / f"{number}.png"))
    (tmp_path / "set" / "images" / "b" / "9.png").write_bytes(b"not an image")
    source = {"kind": "folder", "root": "images", "layout": "{class}", "splits": {"all": None}}
    card = {"name": "small_set", "title": "t", "source": "s", "licence": "l", "classes": 3, "sources": [source]}
    (tmp_path / "set" / "card.yaml").write_text(yaml.safe_dump(card))
    return tmp_path / "set" / "card.yaml"


def test_a_file_that_is_no_image_stops_the_run_or_is_counted(card_path: Path, tmp_path: Path, capsys) -> None:
    evaluate = {**SMALL["evaluate"], "data": [str(card_path)], "attacks": []}
    path = write(tmp_path, adapt=None, train=None, source={}, evaluate=evaluate)
    command = ["run", str(path), "--out", str(tmp_path / "runs")]
    assert "9.png" in refused(capsys, *command)
    assert main([*command, "on_bad_sample=skip"]) == 0
    out = capsys.readouterr().out
    assert "15 images" in out and "9.png" in out
    (card_path.parent / "images" / "d").mkdir()
    assert "images/d' holds no image" in refused(capsys, *command)


def test_bf16_trains_beside_a_full_precision_run(tmp_path: Path) -> None:
    """Two runs of different precision in one process; accelerate alone would keep the first precision."""
    train = {"steps": 2, "lr": 1e-3}
    for precision in ("no", "bf16", "no"):
        path = write(tmp_path, train={**train, "precision": precision})
        assert main(["train", str(path), "--out", str(tmp_path / precision), "--quiet"]) == 0
    losses = [
        read_lines(next((tmp_path / name).iterdir()) / TRAINING / "metrics.jsonl")[0]["loss"] for name in ("no", "bf16")
    ]
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.1 * losses[0]


def test_an_unwritable_run_folder_is_code_2(tmp_path: Path, capsys) -> None:
    (tmp_path / "runs").write_text("a file")
    assert "cannot write" in refused(capsys, "run", write(tmp_path), "--out", tmp_path / "runs")


def test_lists(capsys) -> None:
    for words in (["list"], ["list", "methods"], ["data", "list"], ["assets", "list"]):
        assert main(words) == 0
    out = capsys.readouterr().out
    for word in ("lora", "pissa", "split_qkv", "fewshot", "photo_crops", "vit_small_patch14_imgfocus"):
        assert word in out


def test_methods_are_listed_without_torch_until_a_file_changes(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path))
    printed = []
    for damaged in (False, False, True):
        assert main(["list", "methods"]) == 0
        printed.append(capsys.readouterr().out)
        (kept,) = (tmp_path / "listings").iterdir()
        if damaged:
            continue
        with monkeypatch.context() as patched:
            patched.setattr("vismt.cli.data._described_methods", None)
            assert main(["list", "methods"]) == 0
        printed.append(capsys.readouterr().out)
        kept.write_text("{}")
    assert "emtal" in printed[0] and len(set(printed)) == 1


@pytest.mark.slow
def test_two_processes_train_one_model_that_one_process_does_not_continue(tmp_path: Path, capsys) -> None:
    """torchrun on two CPU processes: each draws its own episodes, gradients are averaged, one adapter is written."""
    path = write(tmp_path, evaluate={**SMALL["evaluate"], "attacks": []})
    folder, printed = run_on_two(path)
    assert len(read_lines(folder / TRAINING / "metrics.jsonl")) == 4 and (folder / "report.html").exists()
    assert printed.count("report  ") == 1
    assert "| Processes of a training | 2 |" in (folder / "report.md").read_text()
    (folder / TRAINING / "done.json").unlink()
    (folder / "run.json").unlink()
    assert "2 process(es) began its trainings, and this launch has 1" in refused(
        capsys, "run", path, "--out", folder.parent
    )


@pytest.mark.parametrize(
    ("overrides", "options", "words"),
    [
        ([], ["--workers", "9"], "9 processes for"),
        ([], ["--part", "1/2", "--workers", "2"], "exclude each other"),
        (["evaluate.data=[nothing]"], [], "data 'nothing': no card"),
        (["evaluate.ways=40"], [], "'digits' has 10 classes"),
        (["model.pretrained=no.safetensors"], [], "checkpoint 'no.safetensors' does not exist"),
    ],
)
def test_a_run_that_is_refused_before_anything_was_done_leaves_no_folder(
    tmp_path: Path, capsys, overrides: list[str], options: list[str], words: str
) -> None:
    command = ["run", str(write(tmp_path)), *overrides, "--out", str(tmp_path / "all" / "runs"), *options]
    assert words in refused(capsys, *command)
    assert not (tmp_path / "all").exists()


def test_a_refused_run_keeps_what_was_there(run_folder: Path, tmp_path: Path, capsys) -> None:
    other = tmp_path / "runs" / "notes.txt"
    other.parent.mkdir()
    other.write_text("mine")
    assert main(["run", str(write(tmp_path)), "evaluate.ways=40", "--out", str(tmp_path / "runs"), "--quiet"]) == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["notes.txt"]
    before = sorted(run_folder.rglob("*"))
    command = ["run", str(write(tmp_path)), "--out", str(run_folder.parent), "--workers", "9"]
    assert main(command) == 2 and sorted(run_folder.rglob("*")) == before


def test_a_run_folder_in_use_is_refused(run_folder: Path, capsys) -> None:
    import os

    from vismt.storage.locks import LOCK

    locks = pytest.importorskip("filelock")
    with locks.FileLock(run_folder / LOCK):
        (run_folder / ".lock-holder").write_text(json.dumps({"host": "node7", "pid": os.getpid()}))
        for command in ("evaluate", "merge"):
            assert f"is in use by process {os.getpid()} on node7" in refused(capsys, command, run_folder)


@pytest.mark.parametrize("verbose", [False, True])
def test_what_dependencies_log_is_shown_with_verbose_only(verbose: bool, monkeypatch, caplog) -> None:
    def runner(_: object) -> None:
        logging.getLogger("torch.utils._pytree").warning("an Enum subclass")
        logging.getLogger("a.library").error("it failed")

    options = SimpleNamespace(command="list", quiet=True, verbose=verbose, debug=False, runner=runner)
    monkeypatch.setattr(cli, "parse", lambda arguments: options)
    assert cli.main([]) == 0
    assert [record.message for record in caplog.records] == ["an Enum subclass"] * verbose + ["it failed"]
    logging.getLogger("a.library").warning("later")
    assert caplog.records[-1].message == "later"  # the caller of `main` has its own logs again
