"""Folders for `vismt verify`: a base, an adapter and a merged checkpoint that belong together, and faults put into them."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
from torch import Tensor, nn

import vismt
from helpers.every_method import adapted_vit, small_vit
from helpers.language_models import tiny_lm
from helpers.tiny import tiny_vit
from vismt.storage.files import write_tensors

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
TARGETS = {"vit": ["qkv", "fc1", "proj"], "llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"]}
HEADS = {"vit": "head", "llama": "lm_head", "gpt2": "lm_head"}
ADAPTERS = ("lora", "pissa-export", "dora")
RANK = 4


def stock(kind: str, seed: int = 0) -> nn.Module:
    """Return a small random model; its head and embedding are not tied."""
    if kind == "vit":
        return tiny_vit(seed)
    model = tiny_lm(kind, seed)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def write_model(model: nn.Module, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a stock model as `vismt export` does."""
    model = copy.deepcopy(model).to(dtype)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(folder)
        tokens = {"<unk>": 0, **{f"t{number}": number for number in range(1, 40)}}
        content = {"model": {"type": "WordLevel", "vocab": tokens, "unk_token": "<unk>"}, "added_tokens": []}
        (folder / "tokenizer.json").write_text(json.dumps(content))
    else:
        write_tensors(folder / "model.safetensors", model.state_dict(), {"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224"}))
    return folder


def trained(model: nn.Module, scale: float, seed: int) -> None:
    """Move what is trained as training does: every tensor by noise, a zero factor to a share of its weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                size = scale if ("lora_B" in name or "lora_embedding_A" in name) else 0.02
                noise = size * torch.randn(parameter.shape, generator=generator).to(parameter)
                parameter.add_(noise * parameter if "magnitude" in name else noise)


@dataclass
class Folders:
    """base, adapter, merged: folders that belong together. head: name of the module that is trained whole."""

    kind: str
    base: Path
    adapter: Path
    merged: Path
    head: str = ""

    def copied(self, root: Path) -> Folders:
        paths = {name: shutil.copytree(getattr(self, name), root / name) for name in ("base", "adapter", "merged")}
        return Folders(self.kind, paths["base"], paths["adapter"], paths["merged"], self.head)


def made(
    kind: str,
    adapter: str,
    root: Path,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    head: bool = True,
    size: float = 0.1,
    **options: Any,
) -> Folders:
    """Train an adapter by noise, write base, adapter and merged checkpoint. options: of peft's LoraConfig."""
    torch.manual_seed(100 + seed)
    model = stock(kind, seed).to(dtype)
    base = write_model(model, root / "base", dtype)
    saved = HEADS[kind] if head else ""
    if adapter == "pissa-export":
        also = [f"{saved}.weight", *(["head.bias"] if kind == "vit" else [])] if head else []
        vismt.adapt(model, "pissa", targets=TARGETS[kind], rank=RANK, also_train=also)
        trained(model, 0.02, seed)
        vismt.export_peft(model, root / "adapter")
        merged = vismt.merge(model)
    else:
        chosen = {
            "r": RANK,
            "lora_alpha": 2 * RANK,
            "target_modules": TARGETS[kind],
            "use_dora": adapter == "dora",
            **options,
        }
        hosted = peft.get_peft_model(model, peft.LoraConfig(**chosen, modules_to_save=[saved] if head else None))
        trained(hosted, size, seed)
        hosted.save_pretrained(root / "adapter", save_embedding_layers=False)
        merged = hosted.merge_and_unload()
    if kind != "vit":
        shutil.copy(base / "tokenizer.json", root / "adapter")
    return Folders(kind, base, root / "adapter", write_model(merged, root / "merged", dtype), saved)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change adapter_config.json in place."""
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change a safetensors file in place."""
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    path.write_bytes(
        safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()}, {"format": "pt"})
    )


def modules_of(tensors: dict[str, Tensor]) -> list[str]:
    return sorted({name.partition(".lora_")[0] for name in tensors if ".lora_A" in name})


# ---- faults
def _wrong_base(folders: Folders) -> None:
    write_model(stock(folders.kind, 7), folders.base)


def _alpha_halved(folders: Folders) -> None:
    def change(config: dict[str, Any]) -> None:
        config["lora_alpha"] /= 2
        config["alpha_pattern"] = {name: value / 2 for name, value in config["alpha_pattern"].items()}

    edit_config(folders.adapter, change)


def _transposed(folders: Folders) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        module = modules_of(tensors)[0]
        for side in "AB":
            tensors[f"{module}.lora_{side}.weight"] = tensors[f"{module}.lora_{side}.weight"].T

    edit_tensors(folders.adapter / TENSORS, change)


def _swapped(folders: Folders) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        one = modules_of(tensors)[0]
        two = one.replace(".0.", ".1.")
        for name in [name for name in tensors if name.startswith(f"{one}.")]:
            other = name.replace(one, two)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    edit_tensors(folders.adapter / TENSORS, change)


def _merged_by(factor: float) -> Callable[[Folders], None]:
    def change(folders: Folders) -> None:
        base = safetensors.torch.load_file(folders.base / "model.safetensors")

        def scaled(tensors: dict[str, Tensor]) -> None:
            for name, value in tensors.items():
                if not name.startswith(folders.head):
                    update = value.float() - base[name].float()
                    tensors[name] = (base[name].float() + factor * update).to(value.dtype)

        edit_tensors(folders.merged / "model.safetensors", scaled)

    return change


def _overflow(folders: Folders) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for module in modules_of(tensors)[:2]:
            tensors[f"{module}.lora_B.weight"] = (1e6 * tensors[f"{module}.lora_B.weight"]).half()

    edit_tensors(folders.adapter / TENSORS, change)


def _truncated(folders: Folders) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for module in modules_of(tensors):
            A, B = (tensors[f"{module}.lora_{side}.weight"] for side in "AB")
            half = A.shape[0] // 2
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = A[:half], B[:, :half]

    def halve(config: dict[str, Any]) -> None:
        config["r"], config["lora_alpha"] = config["r"] // 2, config["lora_alpha"] / 2
        for name in ("rank_pattern", "alpha_pattern"):
            config[name] = {key: value // 2 for key, value in config[name].items()}

    edit_tensors(folders.adapter / TENSORS, change)
    edit_config(folders.adapter, halve)  # so that the file fits its settings


def _nan(folders: Folders) -> None:
    edit_tensors(folders.adapter / TENSORS, lambda t: t[f"{modules_of(t)[0]}.lora_A.weight"][0, :2].fill_(math.nan))


def _missing(folders: Folders) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        module = modules_of(tensors)[1]
        for name in [name for name in tensors if name.startswith(f"{module}.")]:
            del tensors[name]

    edit_tensors(folders.adapter / TENSORS, change)


def _rslora_dropped(folders: Folders) -> None:
    """Drop the flag of settings that mean the same: alpha' = alpha / sqrt(r) with rsLoRA."""

    def change(config: dict[str, Any]) -> None:
        ranks = {name: config["rank_pattern"].get(name, config["r"]) for name in config["alpha_pattern"]}
        config["lora_alpha"] /= config["r"] ** 0.5
        config["alpha_pattern"] = {name: value / ranks[name] ** 0.5 for name, value in config["alpha_pattern"].items()}

    edit_config(folders.adapter, change)


def _head_lost(folders: Folders) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if f".{folders.head}." in name]:
            del tensors[name]

    edit_tensors(folders.adapter / TENSORS, change)


def _foreign_tokenizer(folders: Folders) -> None:
    path = folders.adapter / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = {token: (number * 7) % 40 for token, number in content["model"]["vocab"].items()}
    path.write_text(json.dumps(content))


def _prefix(folders: Folders) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(PREFIX, f"{PREFIX}language_model.", 1)] = tensors.pop(name)

    edit_tensors(folders.adapter / TENSORS, change)
    edit_config(
        folders.adapter,
        lambda config: config.update(target_modules=[name.rpartition(".")[2] for name in config["target_modules"]]),
    )


# Each with the codes of findings of which one has to be there.
FAULTS: dict[str, tuple[Callable[[Folders], None], set[str]]] = {
    "wrong base": (_wrong_base, {"other-base"}),
    "alpha halved": (_alpha_halved, {"merged-twice", "scale"}),
    "transposed factor": (_transposed, {"transposed"}),
    "swapped modules": (_swapped, {"swapped"}),
    "merged twice": (_merged_by(2.0), {"merged-twice"}),
    "merged with half scale": (_merged_by(0.5), {"scale"}),
    "fp16 overflow": (_overflow, {"not-finite"}),
    "truncated rank": (_truncated, {"another-update", "not-this-adapter", "start-inside"}),
    "NaN": (_nan, {"not-finite"}),
    "missing module": (_missing, {"missing-module"}),
    "rsLoRA flag dropped": (_rslora_dropped, {"scale", "merged-twice"}),
    "modules_to_save lost": (_head_lost, {"head-lost"}),
    "foreign tokenizer": (_foreign_tokenizer, {"tokenizer"}),
    "prefix changed": (_prefix, {"prefix"}),
}


def cases(kind: str, fault: str) -> bool:
    """Return whether a model can have a fault: a ViT has no tokenizer."""
    return not (kind == "vit" and fault == "foreign tokenizer")


def faults(kind: str) -> Iterator[str]:
    yield from (fault for fault in FAULTS if cases(kind, fault))


# ---- clean folders
PEFT_LORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "r = alpha": {"lora_alpha": RANK, "use_rslora": True},
    "patterns": {"rank_pattern": {r"0\..*": 2}, "alpha_pattern": {r"1\..*": 16}},
    "biases": {"bias": "lora_only"},
    "one layer": {"layers_to_transform": [1]},
    "lora_bias": {"lora_bias": True},
    "all linears": {"target_modules": "all-linear"},
}
TUNERS: dict[str, dict[str, Any]] = {
    "LoHa": {},
    "LoKr": {},
    "IA3": {"feedforward_modules": []},
    "OFT": {"oft_block_size": 4},
    "Vera": {},
    "HRA": {},
}
VISMT = ("lora", "polar", "pissa", "ilora", "emtal", "s2ft", "lisa", "corda", "amt")


def clean_folders(root: Path) -> Iterator[tuple[str, Folders]]:
    """Make folders without a fault: of peft and of vismt, with several tuners, dtypes and models."""
    for number, (name, options) in enumerate(PEFT_LORA.items()):
        for kind in ("llama", "gpt2")[name == "lora_bias" :]:  # Llama has no bias to merge into
            dtype = torch.bfloat16 if number % 2 else torch.float32
            yield (
                f"peft {name} {kind}",
                made(kind, "lora", root / f"{number}{kind}", dtype=dtype, seed=number, head=not number % 3, **options),
            )
    for number, (name, settings) in enumerate(TUNERS.items()):
        model = stock("llama", number)
        folder = root / name
        base = write_model(model, folder / "base")
        hosted = peft.get_peft_model(
            model, getattr(peft, f"{name}Config")(target_modules=["q_proj", "o_proj"], **settings)
        )
        trained(hosted, 0.02, number)
        hosted.save_pretrained(folder / "adapter")
        yield (
            f"peft {name}",
            Folders("llama", base, folder / "adapter", write_model(hosted.merge_and_unload(), folder / "merged")),
        )
    for number, method in enumerate(VISMT):
        folder = root / f"vismt-{method}"
        base = write_model(small_vit(), folder / "base")
        model = adapted_vit(method)
        vismt.save_adapter(model, folder / "adapter")
        routed = method in ("ilora", "emtal")  # whose merged weights depend on gates
        merged = (
            base
            if routed
            else write_model(vismt.merge(model), folder / "merged", (torch.float32, torch.float16)[number % 2])
        )
        yield f"vismt {method}", Folders("vit", base, folder / "adapter", merged)
    fresh = peft.get_peft_model(stock("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    base = write_model(stock("llama"), root / "fresh" / "base")
    fresh.save_pretrained(root / "fresh" / "adapter")
    yield "peft fresh", Folders("llama", base, root / "fresh" / "adapter", base)
