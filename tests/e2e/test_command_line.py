"""Details of the command line: examples in help texts, sizes of checkpoints, missing files, exit codes of checks."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from helpers.installed import ROOT
from helpers.own_images import write_folder
from helpers.tiny_runs import refused
from safetensors.torch import save_file

from vismt.cli import commands, main, parse
from vismt.data import check
from vismt.engine.study import resolve_arms
from vismt.jobs import load_config


@pytest.mark.parametrize("command", commands.EXAMPLES)  # `Commands.add` takes no other
def test_every_command_has_an_example_that_it_takes(command: str, capsys) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    example = commands.EXAMPLES[command]
    words = " ".join(capsys.readouterr().out.split())  # argparse breaks lines
    assert f"Example: {example}" in words
    program, *arguments = shlex.split(example)
    assert program == "vismt" and parse(arguments).command == command


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
    assert all(f"    {command}" in done.stdout for command in commands.EXAMPLES)


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
