"""The rules of the house: who imports whom, what is imported when, what must not lie where."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "vismt"
# What a package may import besides itself: everything on a floor before its own.
FLOORS = (
    ("base",),
    ("storage",),
    ("config",),
    ("uncertainty", "lowrank", "data", "backbones"),
    ("methods",),
    ("llm", "multitask", "metatune"),
    ("robustness", "engine"),
    ("evaluation",),
    ("report",),
    ("verification",),
    ("jobs", "integrations"),
    ("api",),
    ("cli", "testing"),
)
TOP_FILES = {"__init__", "__main__", "api", "methods"}
MODULES_IN_A_FOLDER = 20
CORE_FLOORS = {"base", "storage", "config", "lowrank"}  # what the core may import
WITH_DOCSTRING = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
# typing_extensions comes with torch, and is imported by type checkers alone.
CORE_LIBRARIES = {"torch", "einops", "safetensors", "regex", "typing_extensions"}
LAZY = (
    "learn2learn",
    "torchattacks",
    "transformers",
    "peft",
    "matplotlib",
    "sklearn",
    "skimage",
    "onnx",
    "accelerate",
    "wandb",
    "torchmetrics",
    "numba",
    "onnxruntime",
    "timm",
    "torchvision",
    "scipy.linalg",
    "scipy.ndimage",
)
LIGHT = (
    "vismt",
    "vismt.cli",
    "vismt.metatune",
    "vismt.multitask",
    "vismt.backbones.vit",
    "vismt.backbones.lm",
    "vismt.backbones.convert",
    "vismt.data.images",
    "vismt.robustness.evaluate",
    "vismt.robustness.attacks.attacks",
    "vismt.report.writer",
)
JOBS = tuple(f"vismt.jobs.{job}.job" for job in ("fewshot", "multitask", "lm", "robustness"))
ONLY_IN = {"torchattacks": {"robustness/attacks/foreign.py"}, "learn2learn": {"metatune/maml.py"}}


@functools.cache
def imports(path: Path) -> set[str]:
    """Dotted names that a file imports, at any depth of it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def floor(package: str) -> int:
    """Return the number of the floor that a package or a file at the top of vismt/ is on."""
    return next(number for number, names in enumerate(FLOORS) if package in names)


def test_import_direction() -> None:
    for path in files():
        package = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if package.startswith("__"):
            continue
        for name in imports(path):
            pieces = name.split(".")
            known = pieces[0] == "vismt" and len(pieces) > 1 and any(pieces[1] in names for names in FLOORS)
            assert not known or floor(pieces[1]) <= floor(package), f"{path.relative_to(ROOT)} imports {name}"


def test_no_circle() -> None:
    """Take away, again and again, the modules that import none of the others: none is left.

    Imports inside functions count. A name that a package exports leads to the module that has it.
    """
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files()}
    exported = {}
    for name, path in modules.items():
        if name.endswith(".__init__"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
                if isinstance(node, ast.ImportFrom):
                    exported |= {f"{name[:-9]}.{alias.name}": str(node.module) for alias in node.names}
    arrows = {
        name: ({exported.get(target, target) for target in imports(path)} & modules.keys()) - {name}
        for name, path in modules.items()
        if "__" not in name
    }
    while free := [name for name, targets in arrows.items() if not targets & arrows.keys()]:
        for name in free:
            del arrows[name]
    assert not arrows


def test_the_rooms_are_small() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == TOP_FILES
    for folder in {path.parent for path in files()}:
        modules = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(modules) <= MODULES_IN_A_FOLDER, folder


def test_the_core_imports_its_four_libraries_only() -> None:
    for path in (PACKAGE / "lowrank").rglob("*.py"):
        for name in imports(path):
            top, *rest = name.split(".")
            if top == "vismt":
                assert rest[0] in CORE_FLOORS, f"{path.name} imports {name}"
            else:
                assert top in CORE_LIBRARIES or top in sys.stdlib_module_names, f"{path.name} imports {name}"


def test_one_file_each_for_the_attack_and_meta_learning_libraries() -> None:
    for path in files():
        for library, places in ONLY_IN.items():
            if any(name.split(".")[0] == library for name in imports(path)):
                assert path.relative_to(PACKAGE).as_posix() in places


def test_heavy_libraries_are_imported_when_needed_only() -> None:
    """One process imports the modules in turn: the first with a library beside it is at fault."""
    code = f"""
import importlib, sys
for module in {LIGHT + JOBS!r}:
    importlib.import_module(module)
    print(module, *(name for name in {LAZY!r} if name in sys.modules))
"""
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert printed == [*LIGHT, *(f"{job} accelerate" for job in JOBS)]


def test_no_init_in_datasets_nor_pickle_nor_paths_of_a_machine() -> None:
    # An __init__.py there would make the folder shadow Hugging Face's `datasets`.
    assert not list((ROOT / "datasets").rglob("__init__.py"))
    for path in files():
        text = path.read_text(encoding="utf8")
        assert "allow_pickle=True" not in text and "weights_only=False" not in text, path
        prints = any(isinstance(node, ast.Name) and node.id == "print" for node in ast.walk(ast.parse(text)))
        assert not prints or path.name == "console.py", path


def strings(path: Path) -> set[str]:
    """Return the string constants of a file that are not docstrings."""
    tree = ast.parse(path.read_text(encoding="utf8"))
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, WITH_DOCSTRING)}
    constants = (
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return {value for value in constants if value not in docstrings}


def test_jobs_do_not_import_each_other() -> None:
    jobs = [folder.name for folder in (PACKAGE / "jobs").iterdir() if (folder / "job.py").exists()]
    assert len(jobs) >= 4
    for job in jobs:
        assert {"config.py", "data.py", "models.py", "evaluation.py", "job.py"} <= {
            path.name for path in (PACKAGE / "jobs" / job).glob("*.py")
        }
        for path in (PACKAGE / "jobs" / job).glob("*.py"):
            others = {name for name in imports(path) if name.startswith("vismt.jobs.") and name.split(".")[2] in jobs}
            assert all(name.split(".")[2] == job for name in others), f"{path} imports {sorted(others)}"


def test_the_engine_and_the_report_name_no_job() -> None:
    from vismt.jobs import JOBS

    for package in ("engine", "report"):
        for path in (PACKAGE / package).rglob("*.py"):
            assert not strings(path) & set(JOBS), path


def test_no_file_but_its_own_names_a_method() -> None:
    from vismt.methods import METHODS

    places = [path for package in ("engine", "report", "jobs") for path in (PACKAGE / package).rglob("*.py")]
    words = {"full", "head"}  # also a structure of curvature, and a section
    for path in places:
        assert not strings(path) & (set(METHODS) - words), path


# A configuration is read without what it configures, but with the declarations of features: the most modules of vismt that its
# file may load.
MOST_OF_A_CONFIG = {"fewshot": 68, "multitask": 81, "lm": 67, "robustness": 54}


# Prints what vismt loads for each module, in forks of one process that has torch.
LOADED = """
import importlib, os, sys, torch
for module in sys.argv[1:]:
    if not os.fork():
        importlib.import_module(module)
        print(module, *(name for name in sys.modules if name.startswith("vismt.")), flush=True)
        os._exit(0)
    os.wait()
"""


def test_a_configuration_does_not_load_what_it_configures_nor_a_run_verification() -> None:
    modules = [*(f"vismt.jobs.{job}.config" for job in MOST_OF_A_CONFIG), "vismt.jobs.run"]
    call = [sys.executable, "-c", LOADED, *modules]
    printed = subprocess.run(call, capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    *configs, run = [line.split()[1:] for line in printed]
    assert not [name for name in run if name.startswith("vismt.verification")]
    rooms = (
        "vismt.verification",
        "vismt.robustness.attacks",
        "vismt.report",
        "vismt.metatune.protocol",
        "vismt.methods",
    )
    for most, loaded in zip(MOST_OF_A_CONFIG.values(), configs, strict=True):
        assert len(loaded) <= most, sorted(loaded)
        assert not [name for name in loaded if name.startswith(rooms)]


def test_messages_cut_the_values_that_they_show() -> None:
    """A value may be a whole model: `shown_value` cuts what stands in a message, and no message has `!r` in its place."""
    files = [path for path in PACKAGE.rglob("*.py") if "!r}" in path.read_text()]
    assert files == []


def test_a_feature_is_one_file() -> None:
    """No other module reads the key of a feature. Where its name is no other word, it stands nowhere but in its module, in the

    mathematics that the feature takes from below, and in the function of the same argument in api.py.
    """
    from vismt.evaluation.sections import FEATURES

    alone = ("certify", "ood")
    below = {"certify": "smoothing", "attacks": "conditions", "corruptions": "conditions"}
    for key in FEATURES:
        word = rf"\b{key}\b" if key in alone else rf"\bevaluate\.{key}\b(?!`)|\bjobs\b.*\bsettings\.{key}\b"
        named = {
            path.relative_to(PACKAGE).as_posix()
            for path in PACKAGE.rglob("*.py")
            if re.search(word, path.as_posix() + path.read_text(encoding="utf8"), re.DOTALL)
        }
        beside = {f"evaluation/{key}.py", "evaluation/sections.py", f"robustness/{below.get(key)}.py"}
        assert named <= beside | ({"api.py"} if key in alone else set()), key
