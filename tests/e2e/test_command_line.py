"""Details of the command line: examples in help texts, sizes of checkpoints, missing files, exit codes of checks."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import timm
from helpers.installed import ROOT
from helpers.own_images import write_folder
from helpers.tiny_runs import VIT, refused, written
from safetensors.torch import save_file

from vismt.cli import commands, main, parse
from vismt.cli.data import option_texts
from vismt.data import check
from vismt.engine.study import resolve_arms
from vismt.jobs import load_config
from vismt.methods import METHODS, list_methods
from vismt.report.results import RESULTS, read_results


@pytest.mark.parametrize("command", commands.EXAMPLES)  # `Commands.add` takes no other
def test_every_command_has_an_example_that_it_takes(command: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    example = commands.EXAMPLES[command]
    words = " ".join(capsys.readouterr().out.split())  # argparse breaks lines
    assert f"Example: {example}" in words
    program, *arguments = shlex.split(example)
    assert program == "vismt" and parse(arguments).command == command


def test_help_and_no_command_list_every_command_in_groups(capsys) -> None:
    assert sorted(name for names in commands.GROUPS.values() for name in names) == sorted(commands.EXAMPLES)
    assert main([]) == 2
    alone = capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0 and capsys.readouterr().out == alone
    titles = [line.rstrip(":") for line in alone.splitlines() if line.endswith(":") and line != "options:"]
    assert titles == [*commands.GROUPS] and titles[0] == "begin here"
    for name in commands.EXAMPLES:
        assert re.search(rf"^  {name} +\w", alone, re.M), name
    begin = re.search(r"Begin with `vismt (.*?)`, or with `vismt (.*?)`", alone)
    assert begin is not None and {parse(shlex.split(words)).command for words in begin.groups()} == {"init", "run"}


def test_every_option_of_every_method_has_a_default_and_a_meaning(capsys) -> None:
    assert main(["list", "methods"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^method +ilora +Add gated", printed, re.M)
    for name in list_methods():
        if not name.startswith("peft:"):
            for option, (default, text) in option_texts(METHODS[name]).items():
                assert text and not text.endswith(","), (name, option)
                assert re.search(rf" {option} \({re.escape(default)}\): {re.escape(text)}$", printed, re.M)
    texts = option_texts(METHODS["emtal"])
    assert texts["temperature"] == ("5.0", "Temperature of the router's softmax.")
    assert option_texts(METHODS["lisa"])["active"] == (
        "2",
        "Number gamma of layers that train, 0 to L.",
    )  # of a class that the docstring names


def test_json_is_all_that_is_printed(tmp_path: Path, capsys, monkeypatch) -> None:
    """The keys are those of docs/runs.md."""
    table = (ROOT / "docs" / "runs.md").read_text().partition("## JSON on the console")[2]
    shapes = dict(re.findall(r"^\| `(.+?)` \| (.+?) \|$", table, re.M))
    write_folder(tmp_path / "pictures", 12)
    monkeypatch.chdir(tmp_path)
    config = {"model": VIT, "adapt": {"method": "lora", "rank": 2}, "train": {"steps": 1}, "batch": 4}
    task = {"name": "mine", "train": ["pictures"], "test_share": 0.3}
    written(tmp_path / "mine.yaml", {"task": "multitask", "tasks": [task], **config})
    written(tmp_path / "other.yaml", {"task": "multitask", "tasks": [task], **config, "seed": 1})

    def answered(*words: str) -> Any:
        assert main([*words, "--json"]) == 0
        out = capsys.readouterr()
        return json.loads(out.out)

    found = {"run": answered("run", "mine.yaml")}
    run = found["run"]["folder"]
    assert Path(found["run"]["report"]).is_file()
    rows = [asdict(row) for row in read_results(Path(run) / RESULTS, found["run"]["config_hash"])]
    assert found["run"]["results"] == json.loads(json.dumps(rows))
    other = answered("run", "other.yaml")["folder"]
    found["report"] = answered("report", run, "--format", "html,csv")
    assert found["report"]["files"] and all(Path(file).is_file() for file in found["report"]["files"])
    pairs = answered("compare", run, other)
    assert pairs and [*pairs[0]] == re.findall(r"`(\w+)`", shapes["compare"])
    found["predict"] = answered("predict", run, "pictures")
    assert found["predict"]["accuracy"]["n"] == len(found["predict"]["rows"]) == 36
    found["list"] = answered("list")
    found["list runs"] = answered("list", "runs")
    assert {row["folder"] for row in found["list runs"]["runs"]} == {run, other}
    found["list methods"] = answered("list", "methods")
    found["data list"] = answered("data", "list")
    found["data check"] = answered("data", "check", "digits")
    assert found["data check"]["sets"][0]["ok"] is True
    found["assets list"] = answered("assets", "list")
    for command, content in found.items():
        keys = re.findall(r"`(\w+)`", shapes[command].partition(":")[0])
        assert [*content] == keys, command
        inner = re.findall(r"`(\w+)`", shapes[command].partition(":")[2])
        rows = next((value for value in content.values() if isinstance(value, list) and value), [{}])
        assert not inner or {*rows[0]} == {*inner}, command
    assert main(["report", str(tmp_path), "--json"]) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith("error: ")


def test_attacking_a_checkpoint_of_another_size(tmp_path: Path, capsys) -> None:
    images = write_folder(tmp_path / "pictures", 2)
    model = timm.create_model("test_vit", img_size=32, num_classes=3)
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    command = [
        "attack",
        "--model",
        str(tmp_path / "vit.safetensors"),
        "--architecture",
        "test_vit",
        "--data",
        str(images),
    ]
    command += ["--attack", "fgsm", "--out"]
    assert main([*command, str(tmp_path / "a")]) == 2 and "does not fit test_vit" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "b"), "--img-size", "32"]) == 0
    assert "pictures  one of 3 classes  vit" in capsys.readouterr().out
    convolutional = timm.create_model("test_resnet", num_classes=3)  # takes any size
    save_file(convolutional.state_dict(), tmp_path / "resnet.safetensors")
    command[2] = str(tmp_path / "resnet.safetensors")
    command[4] = "test_resnet"
    assert main([*command, str(tmp_path / "c"), "--img-size", "48"]) == 0


OWN = """
from torch import nn


def fn():
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3)), 3
"""


def test_a_function_of_one_s_own_is_attacked(tmp_path: Path, monkeypatch, capsys) -> None:
    """As the first lines of the guide on robustness promise."""
    images = write_folder(tmp_path / "pictures", 2)
    (tmp_path / "my_own_module.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    command = ["attack", "--model", "my_own_module:fn", "--data", str(images), "--attack", "fgsm"]
    message = refused(capsys, *command)
    assert "--model my_own_module:fn is a function: give --img-size, and no --architecture" in message
    assert "--architecture" in refused(capsys, *command, "--img-size", "8", "--architecture", "test_vit")
    assert main([*command, "--img-size", "8"]) == 0
    assert "pictures  one of 3 classes  my_own_module-fn" in capsys.readouterr().out
    assert "no 'other'" in refused(
        capsys, "attack", "--model", "my_own_module:other", "--data", images, "--img-size", "8"
    )


@pytest.mark.parametrize("words", [["-m", "vismt"], ["-m", "vismt.cli"]])
def test_without_a_command_the_commands_are_listed(words: list[str]) -> None:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2 and not done.stderr
    assert all(f"\n  {command} " in done.stdout for command in commands.EXAMPLES)


def test_the_check_before_submitting_a_study_loads_as_printed() -> None:
    page = (ROOT / "docs" / "cluster.md").read_text()
    before = page[page.index("Before you submit it") :]
    path = re.search(r"configs/\S+\.yaml", before)
    printed = re.search(r"`(train\.steps=[^`]*)`", before)
    assert path is not None and printed is not None
    config = load_config(ROOT / path[0], shlex.split(printed[1]))
    assert all(arm.training.steps == 2 for arm in resolve_arms(config).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["attack", "--model", "no/where.safetensors", "--data", "digits"],
            "checkpoint 'no/where.safetensors': no such file.",
        ),
        (["attack", "--model", "no/such/folder", "--data", "digits"], "model 'no/such/folder': no such file."),
        (["data", "check", "no/where"], "data 'no/where': no such file or folder."),
        (["data", "check", "digit"], "data 'digit': no card of that name"),
    ],
)
def test_missing_files(arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert not list(tmp_path.iterdir())  # no run folder is left


def test_exit_codes_of_data_check(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(check, "list_cards", lambda: ["digits", "cifar100"])
    monkeypatch.setenv("VISMT_DATA", str(tmp_path))
    assert main(["data", "check", "--no-decode"]) == 0  # what is here is as its card says
    assert "1 of 2 sets are not on this machine" in capsys.readouterr().out
    assert main(["data", "check", "cifar100"]) == 1
    images = write_folder(tmp_path / "pictures", 1)
    assert main(["data", "check", str(images)]) == 0
    (images / "red" / "00.png").write_bytes(b"no image")
    assert main(["data", "check", str(images)]) == 1
    assert "damaged 'red/00.png'" in capsys.readouterr().out
