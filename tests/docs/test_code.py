"""The code blocks of README.md and the pages: Python runs on tiny models, commands parse, YAML is read strictly."""

from __future__ import annotations

import importlib.util
import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import pages
from helpers.pages import PAGES, ROOT
from helpers.tiny import images, shake, tiny_vit

import vismt
from vismt import methods
from vismt.cli import parse
from vismt.config.sections import find_config
from vismt.config.yaml_text import read_yaml
from vismt.data.cards import load_card
from vismt.jobs import JOBS, load_config, make_job
from vismt.metatune.amt.selection_rules import RULES
from vismt.metatune.settings import HEADS
from vismt.multitask.balancing.base import BALANCERS
from vismt.multitask.tasks import TASKS
from vismt.robustness.attacks import ATTACKS

ASSERTED = {
    "README.md",
    "docs/extending.md",
    "docs/methods/index.md",
    "docs/methods/emtal.md",
    "docs/guides/robustness.md",
}  # each in a test of its own
SLOW = {"docs/guides/python.md"}  # runs studies
FOREIGN = {"cluster_name", "compute_environment"}  # files of Ray and accelerate
INITIAL = {f"{job}.yaml" for job in (*JOBS, "shop")}
LANGUAGES = {"python", "bash", "yaml", ""}  # "": output, equations, logs


def with_language(language: str) -> list[Any]:
    found = [page for page in PAGES if pages.blocks(page, language)]
    return [
        pytest.param(page, id=name, marks=[pytest.mark.slow] * (name in SLOW and language == "python"))
        for page, name in zip(found, map(pages.name, found))
    ]


@pytest.fixture
def tiny_models(monkeypatch, tmp_path):
    """Every published model that a block creates is a tiny one with random values; returns the stock models in order."""
    import timm

    transformers = pytest.importorskip("transformers")
    create = timm.create_model
    made = []

    def create_model(name: str, pretrained: bool = False, **options: Any):
        if not pretrained:
            return create(name, **options)
        made.append(tiny_vit(**options))
        return made[-1]

    def from_pretrained(*_: Any, **__: Any):
        config = transformers.LlamaConfig(
            hidden_size=32, num_hidden_layers=2, intermediate_size=48, num_attention_heads=2, vocab_size=30
        )
        made.append(transformers.LlamaForCausalLM(config).eval())
        return made[-1]

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path / "cache"))  # where the clustering is kept
    monkeypatch.chdir(tmp_path)
    yield made
    methods.METHODS._items.pop("orthogonal", None)
    for name in ("close_depth", "near"):
        TASKS._items.pop(name, None)
    for table, name in (
        (BALANCERS, "geometric"),
        (HEADS, "nearest"),
        (ATTACKS, "corners"),
        (RULES, "nearest_prototypes"),
    ):
        table._items.pop(name, None)


def run(page: str, *changes: tuple[str, str], **names: Any) -> dict[str, Any]:
    """Run the Python blocks of a page one after the other in one namespace, which is returned.

    Its name is that of a module, as timm looks up the module of a function that it registers.
    """
    names["__name__"] = __name__
    for block in pages.blocks(ROOT / page, "python"):
        code = block.code
        for old, new in changes:
            code = code.replace(old, new)
        exec(compile(code, page, "exec"), names)
    return names


def test_the_example_of_help_runs(tiny_models: list[Any]) -> None:
    example = textwrap.dedent(str(vismt.__doc__).partition("\n\n")[2].partition("\n\n`adapt`")[0])
    assert example.startswith("import timm, vismt\n")
    exec(example, names := {})
    assert Path("adapter", "adapter.json").is_file() and "qkv" in str(names["report"]) and len(tiny_models) == 1


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_every_block_has_a_language_that_is_tested(page: Path) -> None:
    for block in pages.blocks(page):
        assert block.language in LANGUAGES, block.code
        if not block.language:
            assert not re.search(r"^(vismt|pip|python|import|from) ", block.code, re.M), block.code
    assert pages.read(page).count("```") == 2 * len(pages.blocks(page))


@pytest.mark.parametrize("page", [page for page in with_language("python") if page.id not in ASSERTED])
def test_python_blocks_run(page: Path, tiny_models) -> None:
    assert run(pages.name(page)).keys() > {"__builtins__", "__name__"}


def test_the_readme_saves_exports_and_merges(tiny_models, tmp_path, capsys) -> None:
    model = run("README.md")["model"]
    assert "pissa" in capsys.readouterr().out and (tmp_path / "adapter" / "adapter.json").exists()
    assert (tmp_path / "adapter-peft" / "adapter_config.json").exists()
    assert type(model.blocks[0].attn.qkv) is torch.nn.Linear


@pytest.mark.slow
def test_the_own_method_is_what_its_page_says(tiny_models, capsys) -> None:
    model = run("docs/extending.md")["model"]
    assert "orthogonal" in capsys.readouterr().out and model.blocks[0].attn.qkv.blocks == (32, 32, 32)
    factor = model.blocks[0].mlp.fc1.lora_A
    assert torch.allclose(factor @ factor.T, torch.eye(4), atol=1e-5)
    moved = shake(model)(images())
    assert torch.allclose(vismt.merge(model)(images()), moved, atol=1e-5)


def test_combined_adapters_are_the_weighted_sum(tiny_models, tmp_path) -> None:
    scope = run("docs/methods/index.md", ("    ...  ", "    shake(model)  "), shake=shake)
    model = scope["model"]
    assert torch.equal(scope["base"], tiny_vit()(scope["batch"]))
    assert not torch.allclose(scope["served"](scope["batch"]), scope["base"], atol=1e-3)
    assert (tmp_path / "both" / "adapter_config.json").exists() and model.vismt_record.method == "lora"
    flowers = vismt.merge(vismt.load_adapter(tiny_vit(), "flowers")).state_dict()
    birds = vismt.merge(vismt.load_adapter(tiny_vit(), "birds")).state_dict()
    base = tiny_vit().state_dict()
    for key, value in vismt.merge(model).state_dict().items():
        expected = base[key] + 0.7 * (flowers[key] - base[key]) + 0.3 * (birds[key] - base[key])
        assert torch.allclose(value, expected, atol=1e-5)
    assert not torch.equal(model(images()), tiny_vit()(images()))


def test_the_attacked_model_normalises_its_images(tiny_models) -> None:
    scope = run("docs/guides/robustness.md")
    seen = scope["images"]
    mean, std = (torch.tensor(scope["vit"].pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std"))
    assert torch.allclose(scope["model"](seen), scope["vit"]((seen - mean) / std), atol=1e-5)
    assert not torch.allclose(scope["model"](seen), scope["vit"](seen), atol=1e-5)
    assert scope["withstands"].dtype == torch.bool and len(scope["withstands"]) == 8


@pytest.mark.slow
def test_the_loop_of_emtal_ends_in_stock_weights(tiny_models) -> None:
    import timm

    scope = run("docs/methods/emtal.md")
    assert scope["fade"].value == 1 and scope["loss"].isfinite() and bool((scope["retain"].ema < 10).all())
    stock = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, patch_size=8)
    assert list(scope["model"].state_dict()) == list(stock.state_dict())


def arguments_of(words: list[str]) -> list[str] | None:
    """Return the arguments of the command vismt, None for other commands."""
    if words[0] == "vismt":
        return words[1:]
    return words[words.index("vismt.cli") + 1 :] if "vismt.cli" in words else None


@pytest.mark.parametrize("page", with_language("bash"))
def test_commands_parse_and_their_configurations_are_valid(page: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    for block in pages.blocks(page, "bash"):
        for words in pages.commands(block.code):
            arguments = arguments_of(words)
            if arguments is not None:
                check(arguments, tmp_path)
            elif words[0] == "python":
                _parse_script(words[1:], monkeypatch)


def check(arguments: list[str], folder: Path) -> None:
    """Parse the arguments of a command; check the configuration that it runs, but for what `vismt init` writes (test_init.py)."""
    options = parse(arguments)
    if options.command == "run" and options.config not in INITIAL:
        make_job(load_config(find_config(options.config), options.overrides), folder)


@pytest.mark.parametrize("page", PAGES, ids=pages.name)
def test_commands_within_sentences_exist(page: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    for command in re.findall(r"`vismt ([^`]+)`", pages.prose(page)):
        arguments = shlex.split(command)
        if len(arguments) > 1:
            check(arguments, tmp_path)
        else:
            with pytest.raises(SystemExit) as ended:
                parse([*arguments, "--help"])
            assert ended.value.code == 0


def _parse_script(words: list[str], monkeypatch) -> None:
    """Read the flags of a script of the repository by its own parser."""
    module = words[1].replace(".", "/")
    file = next(name for name in (f"{module}.py", f"{module}/__main__.py", words[0]) if (ROOT / name).is_file())
    spec = importlib.util.spec_from_file_location("script", ROOT / file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", words[words[0] == "-m" :])
    script.arguments()


def test_a_wrong_command_is_noticed(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    page = ROOT / "docs" / "install.md"
    wrong = "```bash\nA=1 vismt run configs/quickstart.yaml \\\n  train.step=2    # a comment\n```\n"
    monkeypatch.setattr(pages, "read", lambda _: wrong)
    with pytest.raises(vismt.UserError, match=r"unknown key 'train.step'"):
        test_commands_parse_and_their_configurations_are_valid(page, tmp_path, monkeypatch)


@pytest.mark.parametrize("page", with_language("yaml"))
def test_yaml_blocks_are_read_strictly(page: Path, tmp_path) -> None:
    path = tmp_path / "block.yaml"
    for block in pages.blocks(page, "yaml"):
        path.write_text(block.code, encoding="utf8")
        values = read_yaml(path, "block")
        if "sources" in values:
            assert load_card(path).sources
        elif "task" in values:
            assert make_job(load_config(path, []), tmp_path).config.task == values["task"]
        elif not FOREIGN & values.keys():
            config = load_config(path, [])
            assert all(getattr(config, key) is not None for key, value in values.items() if value is not None)


def test_the_own_card_finds_its_images(tmp_path) -> None:
    from torchvision.io import write_png

    from vismt.data.images import open_images

    card = next(block.code for block in pages.blocks(ROOT / "docs/data.md", "yaml") if "kind: folder" in block.code)
    (tmp_path / "card.yaml").write_text(card)
    for name in "abc":
        (tmp_path / "images" / name).mkdir(parents=True)
        write_png(torch.zeros(3, 8, 8, dtype=torch.uint8), str(tmp_path / "images" / name / "0.png"))
    assert len(open_images(str(tmp_path / "card.yaml"))) == 3
