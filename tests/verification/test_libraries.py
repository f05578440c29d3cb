"""What readers do with a folder: peft, transformers and timm are run on every condition.

The truth of a run is an error, or how many modules carry the update they were trained to and whether the logits are those of the
trained model; both have to be what the rules say.
"""

from __future__ import annotations

import functools
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import timm
import torch
import transformers
from helpers.language_models import SHAPE, outputs, stock
from helpers.readers import reader as model_with_experts
from helpers.verified_folders import edit_config
from helpers.verified_folders import edit_tensors as edit_file
from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.cli import main
from vismt.lowrank.files.facts import PEFT_PREFIX, TENSORS
from vismt.lowrank.files.peft_settings import PEFT_CONFIG
from vismt.verification.checkpoints import Located, locate, translated
from vismt.verification.facts import Facts, read_facts
from vismt.verification.libraries import Reading, readings
from vismt.verification.rules import FolderCase

Change = Callable[[Path], object]
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "gpt2": ["c_attn", "c_fc"],
    "qwen2": ["q_proj"],
    "vit": ["qkv", "fc1"],
}
Q0 = "layers.0.self_attn.q_proj"


@functools.cache
def trained(kind: str, config: str) -> nn.Module:
    """Return a hosted model whose trained values have moved. config: of peft, as JSON, with the name of its class."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[kind], **json.loads(config)}
    made = getattr(peft, options.pop("class", "LoraConfig"))
    known = {key: value for key, value in options.items() if key in made.__dataclass_fields__}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(stock(kind), made(**known)).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Change:
    """Return a change that gives the file of an adapter other tensors."""

    def on_file(held: dict[str, Tensor]) -> None:
        changed = change(dict(held))
        held.clear()
        held.update(changed)

    return lambda folder: edit_file(folder / TENSORS, on_file)


def renamed(old: str, new: str) -> Change:
    return tensors(lambda held: {name.replace(old, new): value for name, value in held.items()})


def without(*texts: str) -> Change:
    return tensors(lambda held: {k: v for k, v in held.items() if not any(text in k for text in texts)})


def setting(**values: Any) -> Change:
    return lambda folder: edit_config(folder, lambda config: config.update(values))


def no_setting(key: str) -> Change:
    return lambda folder: edit_config(folder, lambda config: config.pop(key))


def as_bin(folder: Path) -> None:
    torch.save(safetensors.torch.load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()


def other_name(folder: Path) -> None:
    (folder / TENSORS).rename(folder / "adapter_model-00001-of-00001.safetensors")


def turned(held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.T for name, value in held.items()}


def narrow(held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:, :16] if "lora_A" in name else value for name, value in held.items()}


def empty(held: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[:0] if "lora_A" in name else value[:, :0] for name, value in held.items()}


def unchanged(folder: Path) -> None:
    """Leave the folder as peft wrote it."""


@dataclass(frozen=True)
class Condition:
    """How a folder comes to meet a condition."""

    change: Change = unchanged
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "llama"


SAVED = {"modules_to_save": ["lm_head"]}
DORA = {"use_dora": True}
BIAS = {"lora_bias": True}
PISSA = {"init_lora_weights": "pissa"}
TABLE = {"target_modules": ["q_proj", "embed_tokens"]}
CONDITIONS = {
    # that no reader minds
    "plain": Condition(),
    "Conv1D": Condition(kind="gpt2"),
    "an absent target": Condition(setting(target_modules=[*TARGETS["llama"], "nothing"])),
    "unknown setting": Condition(setting(use_a_later_thing=True)),
    "rank 32": Condition(options={"r": 32}),
    "embedding": Condition(options=TABLE),
    # files and settings
    "only .bin": Condition(as_bin),
    "a shard": Condition(other_name),
    "no peft_type": Condition(no_setting("peft_type")),
    "no lora_alpha": Condition(no_setting("lora_alpha")),
    "no r": Condition(no_setting("r"), options={"r": 8}),
    "IA3": Condition(unchanged, {"class": "IA3Config", "feedforward_modules": ["down_proj"]}),
    "LoHa": Condition(unchanged, {"class": "LoHaConfig"}),
    "VeRA": Condition(unchanged, {"class": "VeraConfig", "target_modules": ["q_proj"]}),
    "timm": Condition(unchanged, kind="vit"),
    # names
    "no prefix": Condition(renamed(PEFT_PREFIX, "")),
    "language_model": Condition(renamed(".model.layers", ".model.language_model.layers")),
    "adapter name": Condition(renamed(".weight", ".default.weight")),
    "another adapter name": Condition(renamed(".weight", ".other.weight")),
    "old peft": Condition(renamed(".lora_", ".model.lora_")),
    "shifted layers": Condition(renamed("layers.1.", "layers.7.")),
    # modules and shapes
    "half of the layers": Condition(without("layers.1.")),
    "no B": Condition(without(f"{Q0}.lora_B")),
    "outside the targets": Condition(setting(target_modules=["q_proj", "v_proj"])),
    "some layers": Condition(setting(layers_to_transform=[0])),
    "excluded": Condition(setting(exclude_modules=["down_proj"])),
    "another r": Condition(setting(r=8)),
    "transposed": Condition(tensors(turned)),
    "too narrow": Condition(tensors(narrow)),
    # scales
    "patterns": Condition(unchanged, {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 32}}),
    "rank pattern, same scale": Condition(options={"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 4}}),
    "rsLoRA": Condition(unchanged, {"use_rslora": True}),
    "alpha 0": Condition(setting(lora_alpha=0)),
    # variants
    "DoRA": Condition(unchanged, DORA),
    "DoRA without flag": Condition(setting(use_dora=False), DORA),
    "DoRA without magnitudes": Condition(without("magnitude"), DORA),
    "biases of B": Condition(unchanged, BIAS),
    "biases of B without flag": Condition(setting(lora_bias=False), BIAS),
    "biases": Condition(unchanged, {"bias": "all"}, "qwen2"),
    "biases without flag": Condition(setting(bias="none"), {"bias": "lora_only"}, "qwen2"),
    "saved head": Condition(unchanged, SAVED),
    "saved head not in the file": Condition(without("lm_head"), SAVED),
    "saved head not in the settings": Condition(setting(modules_to_save=None), SAVED),
    "saved block": Condition(unchanged, {"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}),
    "saved norm": Condition(unchanged, {"modules_to_save": ["norm"]}),
    "PiSSA": Condition(unchanged, PISSA),
    "OLoRA": Condition(unchanged, {"init_lora_weights": "olora"}),
    "CorDA": Condition(setting(init_lora_weights="corda")),
    "LoftQ": Condition(setting(init_lora_weights="loftq", loftq_config={})),
    "EVA": Condition(setting(init_lora_weights="eva", eva_config=None)),
    # values that do not fit
    "bias: x": Condition(setting(bias="x")),
    "init_lora_weights: x": Condition(setting(init_lora_weights="x")),
    "task_type: x": Condition(setting(task_type="x")),
    "rank_pattern: null": Condition(setting(rank_pattern=None)),
    "alpha_pattern: null": Condition(setting(alpha_pattern=None)),
    "four dimensions": Condition(tensors(lambda held: {n: v[..., None, None] for n, v in held.items()})),
    "rank 0": Condition(tensors(empty)),
    "whole numbers": Condition(tensors(lambda held: {n: (10 * v).to(torch.int8) for n, v in held.items()})),
    "biases not in the file": Condition(without("bias"), options={"bias": "lora_only"}, kind="qwen2"),
    "wrapped": Condition(renamed(PEFT_PREFIX, f"{PEFT_PREFIX}_orig_mod.")),
    "fsdp": Condition(renamed("layers.1.", "layers.1._fsdp_wrapped_module.")),
    "token rows": Condition(unchanged, {"trainable_token_indices": [*range(40)]}),
    "token rows not in the file": Condition(
        without("token_adapter"), options={"trainable_token_indices": [*range(40)]}
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


@functools.cache
def base_folder(kind: str, root: Path) -> Path:
    folder = root / f"base-{kind}"
    model = stock(kind)
    if kind == "vit":
        write_timm(model, folder)
    else:
        model.save_pretrained(folder)
    return folder


def written(name: str, root: Path) -> tuple[nn.Module, Path]:
    """Return the trained model of a condition, and the folder that meets it."""
    condition = CONDITIONS[name]
    model, folder = trained(condition.kind, json.dumps(condition.options)), root / name
    if not folder.exists():
        model.save_pretrained(folder, save_embedding_layers=False)
        condition.change(folder)
    return model, folder


def located(facts: Facts, kind: str, root: Path) -> Located:
    return locate(facts, translated(read_facts(base_folder(kind, root)), facts))


def reading(reader: str, folder: Path, kind: str, root: Path) -> Reading:
    facts = read_facts(folder)
    (found,) = readings(FolderCase(facts, located(facts, kind, root)), [reader])
    return found


def loaded(reader: str, folder: Path, kind: str) -> nn.Module | None:
    """Return the model that a reader makes of the folder; None where it raises."""
    model = stock(kind)
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if reader == "peft":
                return peft.PeftModel.from_pretrained(model, str(folder)).eval()
            # as the remark on .bin files says
            model.load_adapter(str(folder), **({} if (folder / TENSORS).exists() else {"use_safetensors": False}))
            return model.eval()
    except Exception:  # whatever a reader raises
        return None


def updates(model: nn.Module) -> dict[str, list[Tensor]]:
    """Return what each adapted module holds: its update, then the parts beside the factors."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer) and module.active_adapters:
            beside = [
                p for n, p in module.named_parameters() if "magnitude" in n or ("lora_B" in n and n.endswith("bias"))
            ]
            found[path.removeprefix(PEFT_PREFIX)] = [module.get_delta_weight("default"), *beside]
    return found


@torch.no_grad()
def truth(model: nn.Module | None, meant: nn.Module) -> tuple[str, int | None]:
    """Return the state of a loaded model, and how many modules have the update of the one that is meant, of a LoRA."""
    if model is None:
        return "refused", None
    same = torch.allclose(outputs(model), outputs(meant), rtol=1e-4, atol=1e-5)
    ours, theirs = updates(model), updates(meant)
    equal = [
        path
        for path in theirs
        if len(ours.get(path, [])) == len(theirs[path])
        and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours[path], theirs[path]))
    ]
    return "applied" if same else "differs", len(equal) if theirs else None


@pytest.mark.parametrize("reader", ["peft", "transformers"])
@pytest.mark.parametrize("name", CONDITIONS)
def test_rules_say_what_readers_do(name: str, reader: str, root: Path) -> None:
    meant, folder = written(name, root)
    kind = CONDITIONS[name].kind
    found = reading(reader, folder, kind, root)
    state, equal = truth(loaded(reader, folder, kind), meant)
    assert found.state == state, [remark.text for remark in found.remarks]
    if equal is not None:
        assert found.applied == equal
    assert found.source.startswith(f"tested with {reader} ")


def test_answer_in_one_line(root: Path) -> None:
    _, folder = written("half of the layers", root)
    facts = read_facts(folder)
    lines = [one.line for one in readings(FolderCase(facts, located(facts, "llama", root)))]
    assert lines == [f"{name}: 3 of 6, served model differs" for name in ("peft", "transformers")]
    _, folder = written("no prefix", root)
    assert reading("peft", folder, "llama", root).line == "peft: 0 of 6, serves the base"


def test_table_by_group(root: Path) -> None:
    _, folder = written("DoRA", root)
    assert reading("transformers", folder, "llama", root).table == {
        "factors": {"used": 12},
        "magnitudes": {"ignored": 6},
    }


def test_unknown_reader(root: Path) -> None:
    _, folder = written("plain", root)
    with pytest.raises(UserError, match=r"no reader 'vllm'.*peft"):
        readings(FolderCase(read_facts(folder)), ["vllm"])


def test_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A reader that is named counts in the exit code; one that is not is shown."""
    _, folder = written("DoRA", root)
    assert main(["verify", str(folder)]) == 0
    assert "load_adapter renames no magnitudes of DoRA" in capsys.readouterr().out
    assert main(["verify", str(folder), "--reader", "transformers"]) == 4
    assert main(["verify", str(folder), "--reader", "peft"]) == 0
    assert main(["verify", str(folder), "--reader", "vllm"]) == 2
    assert "no reader 'vllm'" in capsys.readouterr().err


def test_without_a_base_nothing_is_compared_with_it(root: Path) -> None:
    _, folder = written("shifted layers", root)
    assert {one.state for one in readings(FolderCase(read_facts(folder)))} == {"applied"}


@pytest.mark.parametrize("reader", ["peft", "transformers"])
@pytest.mark.parametrize("rslora", [False, True])
def test_fused_experts(reader: str, rslora: bool, tmp_path: Path) -> None:
    """Per-expert factors of Mixtral, by hand: with rsLoRA the readers take √2 times the update of w1 and w3."""
    generator = torch.Generator().manual_seed(5)
    shapes, held = {"w1": (24, 32), "w3": (24, 32), "w2": (32, 24)}, {}
    for layer, expert, (name, (rows, columns)) in (
        (l, e, s) for l in range(2) for e in range(4) for s in shapes.items()
    ):
        key = f"{PEFT_PREFIX}model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.lora_"
        held[f"{key}A.weight"] = 0.1 * torch.randn(4, columns, generator=generator)
        held[f"{key}B.weight"] = 0.1 * torch.randn(rows, 4, generator=generator)
    safetensors.torch.save_file(held, tmp_path / TENSORS)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [*shapes], "use_rslora": rslora}
    (tmp_path / PEFT_CONFIG).write_text(json.dumps({**settings, "task_type": "CAUSAL_LM"}))
    meant, model = model_with_experts("mixtral"), model_with_experts("mixtral")
    scale = 8 / 2 if rslora else 8 / 4
    with torch.no_grad():
        for layer in range(2):
            for expert in range(4):
                key = f"{PEFT_PREFIX}model.layers.{layer}.block_sparse_moe.experts.{expert}."
                one, two, three = (
                    scale * held[f"{key}{n}.lora_B.weight"] @ held[f"{key}{n}.lora_A.weight"]
                    for n in ("w1", "w2", "w3")
                )
                meant.model.layers[layer].mlp.experts.gate_up_proj[expert] += torch.cat([one, three])
                meant.model.layers[layer].mlp.experts.down_proj[expert] += two
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if reader == "peft":
            model = peft.PeftModel.from_pretrained(model, str(tmp_path)).eval()
        else:
            model.load_adapter(str(tmp_path))
    ids = torch.arange(3, 10)[None]
    same = torch.allclose(model(ids).logits, meant(ids).logits, rtol=1e-4, atol=1e-5)
    (found,) = readings(FolderCase(read_facts(tmp_path)), [reader])
    assert found.state == ("applied" if same else "differs") == ("differs" if rslora else "applied")


# ---- checkpoints
def write_timm(model: nn.Module, folder: Path) -> Path:
    folder.mkdir(parents=True)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": shape}
    about = {"num_classes": 5, "input_size": [3, 16, 16]}
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": about}))
    safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder


CHECKPOINTS: dict[str, Callable[[str], str]] = {
    "plain": lambda name: name,
    "unmerged": lambda name: name.replace("proj.weight", "proj.base_layer.weight").replace(
        "fc1.weight", "fc1.base_layer.weight"
    ),
    "prefix of peft": lambda name: f"{PEFT_PREFIX}{name}",
    "prefix of DDP": lambda name: f"module.{name}",
}


@pytest.mark.parametrize("reader", ["transformers", "timm"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name: str, reader: str, tmp_path: Path) -> None:
    kind = "llama" if reader == "transformers" else "vit"
    meant, folder = stock(kind), tmp_path / "model"
    if reader == "timm":
        write_timm(meant, folder)
    else:
        meant.save_pretrained(folder)
    edit_file(
        folder / "model.safetensors",
        lambda held: held.update({CHECKPOINTS[name](key): held.pop(key) for key in list(held)}),
    )
    transformers.logging.set_verbosity_error()
    try:
        if reader == "timm":
            model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        else:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        state = "applied" if torch.allclose(outputs(model), outputs(meant), atol=1e-5) else "differs"
    except RuntimeError:
        state = "refused"
    (found,) = readings(FolderCase(read_facts(folder)), [reader])
    assert found.state == state


def test_kinds_of_folders(root: Path, tmp_path: Path) -> None:
    """A timm checkpoint is for timm, another for the others; peft reads neither, timm no adapter."""
    states = {
        one.reader: one.state for one in readings(FolderCase(read_facts(base_folder("vit", root))), ["peft", "timm"])
    }
    assert states == {"peft": "refused", "timm": "applied"}
    states = {
        one.reader: one.state for one in readings(FolderCase(read_facts(base_folder("llama", root))), ["peft", "timm"])
    }
    assert states == {"peft": "refused", "timm": "refused"}
    _, folder = written("timm", root)
    assert [one.line for one in readings(FolderCase(read_facts(folder)))] == ["peft: applied, 4 of 4", "timm: refused"]
    (tmp_path / "notes.txt").write_text("no weights")
    assert {one.state for one in readings(FolderCase(read_facts(tmp_path)))} == {"refused"}


@pytest.mark.parametrize(
    ("name", "of_peft", "of_timm"),
    [("lora", "write it in peft's", "merge it"), ("lisa", "load it", "merge it"), ("mtlora", "load it", "load it")],
)
def test_what_to_do_with_an_adapter_of_vismt_is_not_refused(name: str, of_peft: str, of_timm: str) -> None:
    """LISA has no low-rank update to export, MTLoRA's tasks have one each and no merged weight."""
    folder = Path(__file__).resolve().parents[1] / "golden" / "adapters" / name
    fixes = {one.reader: one.remarks[0].fix for one in readings(FolderCase(read_facts(folder)), ["peft", "timm"])}
    assert fixes["peft"].startswith(of_peft) and fixes["timm"].startswith(of_timm)


def test_adapter_beside_a_merged_model(tmp_path: Path, root: Path) -> None:
    """transformers takes the merged weights for the base and applies the adapter again."""
    meant, folder = written("plain", root)
    shutil.copytree(folder, tmp_path / "both")
    torch.manual_seed(0)
    merged = peft.PeftModel.from_pretrained(stock("llama"), str(folder)).merge_and_unload()
    merged.save_pretrained(tmp_path / "both")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "both").eval()
    assert not torch.allclose(outputs(model), outputs(meant), atol=1e-2)
    (found,) = readings(FolderCase(read_facts(tmp_path / "both")), ["transformers"])
    assert "twice" in found.remarks[0].text and SHAPE["num_hidden_layers"] == 2
