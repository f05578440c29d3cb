"""How the package is found and started: what an import loads, wheels, editable installs, and shell completion."""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import os
import pydoc
import re
import runpy
import subprocess
import sys
import types
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.installed import ROOT, clone_in, environment_in, pip, served, started
from helpers.lm_parts import save_lm

import vismt
from vismt.cli import commands
from vismt.config.sections import find_config, flat, list_configs, read_config_file

HEAVY = ("torch", "timm", "transformers", "numpy", "matplotlib")


@pytest.mark.parametrize(
    "code",
    [
        "import vismt",
        "import contextlib, vismt.cli\nwith contextlib.suppress(SystemExit): vismt.cli.main(['--help'])",
        "import contextlib, vismt.cli\nwith contextlib.suppress(SystemExit): vismt.cli.main(['run', '--help'])",
    ],
)
def test_import_and_help_load_no_library(code: str) -> None:
    code += f"\nimport sys\nprint('loaded', *sorted({set(HEAVY)!r} & set(sys.modules)))"
    printed = started(sys.executable, "-c", code, folder=ROOT)
    assert printed.splitlines()[-1].split() == ["loaded"]


# A process in which no package of an extra can be imported, as after an install without extras.
WITHOUT_EXTRAS = """
import contextlib, re, sys
from importlib import metadata
extras = {re.match(r"[\\w-]+", line)[0] for line in metadata.requires("vismt") if "extra ==" in line}
absent = {name for name, packages in metadata.packages_distributions().items() if {*packages} & extras} - {"vismt"}
class Absent:
    @staticmethod
    def find_spec(name, *_):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Absent)
sys.path.insert(0, "")
"""
CORE = """
import torch, vismt
made = lambda: (torch.manual_seed(0), torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4)))[1]
net = made()
report = vismt.adapt(net, "lora", ["0", "1"], rank=2)
loaded = {"einops", "numpy", "yaml", "rich", "filelock"} & ({*sys.modules} - before)
[torch.nn.init.ones_(weight) for weight in net.parameters() if weight.requires_grad]
vismt.save_adapter(net, "adapter")
vismt.export_peft(net, "peft")
vismt.merge(net)
other = made()
vismt.load_adapter(other, "adapter")
vismt.merge(other)
assert torch.equal(net[0].weight, other[0].weight) and not torch.equal(net[0].weight, made()[0].weight)
assert str(report) and "applied, 2 of 2" in str(vismt.verify("peft"))
from vismt.cli import main
assert main(["list", "methods"]) == 0 and main(["verify", "peft"]) in (0, 3)
print("loaded", *loaded)
assert main(["run", "quickstart"]) == 2
"""


def test_the_core_works_without_extras(tmp_path: Path) -> None:
    code = WITHOUT_EXTRAS + "import torch\nbefore = {*sys.modules}" + CORE
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() in (["loaded"], ["loaded", "einops"])
    fix = r'error: vismt run: needs (\w+), which is not installed: pip install "vismt\[jobs\]"\.'
    assert re.fullmatch(fix, done.stderr.strip().splitlines()[-1])


def test_a_missing_package_of_a_checkout_is_the_error_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = ModuleNotFoundError("No module named 'skimage'", name="skimage.morphology")
    assert commands.explanation(missing) == 'needs skimage, which is not installed: pip install "vismt[quickstart]".'
    assert commands.explanation(ModuleNotFoundError("No module named 'other'", name="other")) is None

    def absent(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(commands.metadata, "requires", absent)
    assert commands.explanation(missing) is None


def test_public_names_are_there_when_used() -> None:
    assert {type(getattr(vismt, name)).__name__ for name in vismt.__all__} == {"function", "module"}
    assert {*dir(vismt)} - {*vismt.__all__} == {"StudyResults", "UserError", "Verdict"}
    with pytest.raises(AttributeError, match="module 'vismt' has no attribute 'adpat'"):
        _ = vismt.adpat
    with pytest.raises(ImportError):
        exec("from vismt import adpat")


def test_help_begins_with_an_example_and_shows_no_special_method() -> None:
    text = pydoc.render_doc(vismt, renderer=pydoc.plaintext)
    lines = [line for line in text.partition("DESCRIPTION")[2].splitlines() if line.strip()]
    assert lines[0].strip() == "import timm, vismt" and "NAME\n    vismt - Low-rank adaptation methods" in text
    contents, _, described = text.partition("FUNCTIONS")
    assert not re.search(r"__\w+__\(|annotations|TYPE_CHECKING|PLACES", text) and "CLASSES" not in contents
    functions = {name for name in vismt.__all__ if isinstance(getattr(vismt, name), types.FunctionType)}
    assert {*re.findall(r"^    (\w+)\(", described, re.M)} == functions


def test_names_for_type_checkers_are_those_at_run_time() -> None:
    for package in (vismt, vismt.llm, vismt.lowrank, vismt.metatune, vismt.multitask, vismt.robustness):
        tree = ast.parse(Path(str(package.__file__)).read_text(encoding="utf8"))
        block = next(node for node in tree.body if isinstance(node, ast.If))
        imports = {alias.name: node.module for node in block.body for alias in node.names}
        assert sorted(imports) == dir(package)
        assert {*imports} - {*package.__all__} <= (
            {"StudyResults", "UserError", "Verdict"} if package is vismt else set()
        )
        for name, module in imports.items():
            # Importing a file of this name would put the file in the place of the object.
            assert module == package.__name__ or not (Path(str(package.__file__)).parent / f"{name}.py").exists(), name
            value = getattr(package, name)
            assert value is getattr(importlib.import_module(module), name), name
            assert not isinstance(value, types.ModuleType) or module == package.__name__


def test_module_and_version() -> None:
    printed = started(sys.executable, "-m", "vismt", "--version", folder=ROOT)
    assert printed.split() == ["vismt", vismt.__version__]
    assert f"version: {vismt.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf8")
    assert f"## {vismt.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf8")


def test_the_container_runs_the_two_commands_of_the_readme() -> None:
    install, run = re.search(
        r"^(pip install .*) && (vismt run .*)$", (ROOT / "README.md").read_text("utf8"), re.M
    ).groups()
    docker = (ROOT / "Dockerfile").read_text("utf8").replace(" --no-cache-dir", "")
    assert f"&& {install}\n" in docker and f"CMD {json.dumps(run.split())}\n" in docker


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vismt ru", {"run "}),
        ("vismt run quick", {"quickstart "}),
        ("vismt run {folder}/min", {"{folder}/mine.yaml "}),
        ("vismt report --fo", {"--format "}),
    ],
)
def test_shell_completion(line: str, expected: set[str], tmp_path: Path) -> None:
    pytest.importorskip("argcomplete")
    completions = tmp_path / "completions"
    (tmp_path / "mine.yaml").touch()
    line, expected = line.format(folder=tmp_path), {text.format(folder=tmp_path) for text in expected}
    environment = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    environment |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(completions), "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-m", "vismt"]
    subprocess.run(call, env={**os.environ, **environment}, check=True, cwd=tmp_path, capture_output=True)
    assert set(completions.read_text().split("\n")) == expected


def is_python_3_10(code: str) -> bool:
    with contextlib.suppress(SyntaxError):
        return bool(ast.parse(code, feature_version=(3, 10)))
    return False


def test_every_file_is_python_3_10() -> None:
    paths = [*(ROOT / "vismt").rglob("*.py"), ROOT / "setup.py"]
    assert [path for path in paths if not is_python_3_10(path.read_text(encoding="utf8"))] == []
    assert not is_python_3_10("try:\n    pass\nexcept* ValueError:\n    pass")  # of Python 3.11


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout in a folder named vismt, as `git clone` makes it."""
    return clone_in(tmp_path_factory.mktemp("home"))


# Prints what is importable of the names in a checkout, first among them vismt itself.
LOOKUP = """
import importlib.util, sys
checkout, site, *names = sys.argv[1:]
sys.path[1:1] = [site] if site else []
specs = {name: importlib.util.find_spec(name) for name in names}
places = {name: [spec.origin, *(spec.submodule_search_locations or [])] for name, spec in specs.items() if spec}
shadows = [name for name, found in places.items() if any(str(place).startswith(checkout) for place in found)]
import vismt
print(vismt.adapt.__name__, vismt.__file__, *shadows)
"""


def importable(interpreter: str, checkout: Path, folder: Path, site: str = "") -> list[str]:
    """Return what LOOKUP prints as a script in `folder`; `site` is a folder of packages before those of the interpreter."""
    script = folder / "script.py"
    script.write_text(LOOKUP)
    names = {path.stem for path in checkout.iterdir() if path.stem.isidentifier()} - {"vismt"}
    assert {"datasets", "configs", "tests", "setup"} <= names
    return started(interpreter, script, checkout, site, *sorted(names), folder=folder).split()


def test_an_editable_install_has_vismt_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a clone Python takes its folder, which has no __init__.py, for a namespace package, unless it finds a real one."""
    (tmp_path / "vismt").symlink_to(ROOT)
    given: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    written: dict[str, str] = {}
    strategy = given["cmdclass"]["editable_wheel"]._select_strategy(None, "vismt", "py3-none-any", "build")
    strategy(SimpleNamespace(writestr=written.__setitem__), [], {})
    assert list(written) == ["vismt/__init__.py"]
    (tmp_path / "site" / "vismt").mkdir(parents=True)
    (tmp_path / "site" / "vismt" / "__init__.py").write_text(written["vismt/__init__.py"])
    printed = importable(sys.executable, ROOT, tmp_path, site=str(tmp_path / "site"))
    assert printed == ["adapt", str(ROOT / "vismt" / "__init__.py")]


@pytest.mark.slow
def test_an_editable_install_from_the_folder_of_the_clone_and_its_removal(clone: Path, tmp_path: Path) -> None:
    interpreter = environment_in(tmp_path / "env")
    before = sorted((tmp_path / "env").rglob("*"))
    pip("--python", interpreter, "install", "-e", clone)
    for folder in (clone.parent, tmp_path):
        assert importable(interpreter, clone, folder) == ["adapt", str(clone / "vismt" / "__init__.py")]
    code = "from vismt.config import sections; from vismt.data import cards"
    code += "; print(sections.find_config('quickstart'), *cards.list_cards())"
    printed = started(interpreter, "-c", code, folder=tmp_path).split()
    assert printed[0] == str(clone / "configs" / "quickstart.yaml")
    assert "digits" in printed
    assert started(interpreter.parent / "vismt", "--version", folder=tmp_path).split() == ["vismt", vismt.__version__]
    started(sys.executable, "-m", "pip", "--python", interpreter, "uninstall", "--yes", "vismt", folder=tmp_path)
    assert sorted((tmp_path / "env").rglob("*")) == before


VIT = ("model.name=test_vit", "model.pretrained=false", "model.position=timm")
SHORT = ("arms={}", "train.steps=1", "train.warmup=0")
# Quick start -> what makes it small; nothing is fetched.
QUICK = {
    "quickstart": (
        *VIT,
        *("model.img_size=32", "model.block=null", "train.steps=1", "train.warmup=0", "pool=null", "adapt.rank=2"),
        *("source.queries=1", "evaluate.episodes=2", "evaluate.queries=1", "evaluate.attacks=[]"),
        "evaluate.models=[frozen, adapted]",
    ),
    "multitask/quickstart": (
        *(*VIT, *SHORT, "model.img_size=32", "adapt.options={n_experts: 4, cluster: false}"),
        *("tasks.digits.limit=20", "tasks.photo_crops.limit=20"),
    ),
    "dense/quickstart": (
        *VIT,
        *SHORT,
        "size=[144, 112]",
        "adapt.options={n_experts: 4, cluster: false}",
        "batch=1",
        "baseline=null",
    ),
    "lm/quickstart": (*SHORT, "model.name={lm}", "model.first_block=1", "tasks.topics.options.length=17"),
    "robustness/quickstart": (
        "evaluate.images=8",
        "evaluate.attacks=[]",
        "evaluate.corruptions=[]",
    ),
}


def test_configurations_name_no_code_that_a_wheel_lacks() -> None:
    assert {name for name in list_configs() if Path(name).name == "quickstart"} == set(QUICK)
    for name in list_configs():
        texts = [str(value) for value in flat(read_config_file(find_config(name))).values()]
        named = {match[1] for text in texts for match in re.finditer(r"\b(\w+)(?:\.\w+)*:[a-z]\w*\b", text)}
        assert not named & {path.name for path in ROOT.iterdir()} - {"vismt"}, name


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_an_installed_wheel_runs_its_quick_starts_from_an_empty_folder(
    name: str, program: Path, tmp_path: Path
) -> None:
    lm = save_lm(tmp_path / "lm")
    folder = tmp_path / "empty"
    folder.mkdir()
    served(
        program, "run", name, *(word.format(lm=lm) if "{lm}" in word else word for word in QUICK[name]), folder=folder
    )
    assert len(list(folder.glob("runs/quickstart-*/report.html"))) == 1


@pytest.mark.slow
def test_a_wheel_has_its_configurations_and_cards(wheel: Path, program: Path, tmp_path: Path) -> None:
    # `pip install --target`: no environment of its own
    pip("install", "--target", tmp_path / "target", wheel)
    names = {path.name for path in (tmp_path / "target").iterdir() if path.suffix != ".dist-info"}
    assert names == {"bin", "share", "vismt"}
    code = "import sys; sys.path.insert(0, 'target'); from vismt.config import sections; from vismt.data import cards"
    code += "; print(sections.find_config('quickstart'), *cards.list_cards())"
    printed = started(program.parent / "python", "-c", code, folder=tmp_path)
    assert printed.split()[0] == str(tmp_path / "target" / "share" / "vismt" / "configs" / "quickstart.yaml")
    assert "digits" in printed.split()
