"""The zoo of `vismt verify`: tiny models of many kinds, healthy folders made of them, and faults put into copies of those."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

import vismt
from helpers.tiny import built_once
from helpers.verified_folders import CONFIG, PREFIX, TENSORS, Folders, edit_config, edit_tensors, modules_of, trained
from vismt.llm.pissa.quantized import nf4

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TEXT: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
DEEP = {**TEXT, "num_hidden_layers": 4}
WIDE = {**TEXT, "head_dim": 8}
EXPERTS = {**WIDE, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
    "initializer_range": 0.2,
}
SWIN: dict[str, Any] = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "window_size": 4}
SIGLIP = {**IMAGE, "model_type": "siglip_vision_model"}
# By kind: the automatic class that builds it, the model type, and its configuration.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("CausalLM", "llama", TEXT),
    "deep": ("CausalLM", "llama", DEEP),
    "square": ("CausalLM", "llama", {**TEXT, "num_key_value_heads": 4}),
    "tied": ("CausalLM", "llama", {**TEXT, "tie_word_embeddings": True}),
    "qwen2": ("CausalLM", "qwen2", TEXT),
    "gpt2": ("CausalLM", "gpt2", {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("CausalLM", "gpt_neox", TEXT),
    "phi3": ("CausalLM", "phi3", TEXT),
    "opt": ("CausalLM", "opt", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gemma2": ("CausalLM", "gemma2", {**WIDE, "tie_word_embeddings": True}),
    "mixtral": ("CausalLM", "mixtral", EXPERTS),
    "qwen3_moe": ("CausalLM", "qwen3_moe", EXPERTS),
    "gpt_oss": ("CausalLM", "gpt_oss", EXPERTS),
    "llama classes": ("SequenceClassification", "llama", TEXT),
    "llama tokens": ("TokenClassification", "llama", TEXT),
    "bert classes": ("SequenceClassification", "bert", TEXT),
    "bert tokens": ("TokenClassification", "bert", TEXT),
    "roberta classes": ("SequenceClassification", "roberta", TEXT),
    "roberta tokens": ("TokenClassification", "roberta", TEXT),
    "distilbert": (
        "SequenceClassification",
        "distilbert",
        {"vocab_size": 48, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64},
    ),
    "vit": ("ImageClassification", "vit", IMAGE),
    "dinov2": ("ImageClassification", "dinov2", {**IMAGE, "mlp_ratio": 2}),
    "beit": ("ImageClassification", "beit", IMAGE),
    "swin": ("ImageClassification", "swin", {**SWIN, "depths": [1, 1], "num_heads": [2, 4], "initializer_range": 0.2}),
    "clip": ("ZeroShotImageClassification", "clip", {"text_config": TEXT, "vision_config": IMAGE}),
    "siglip": ("ZeroShotImageClassification", "siglip", {"text_config": TEXT, "vision_config": IMAGE}),
    "llava": (
        "ImageTextToText",
        "llava",
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**IMAGE, "model_type": "clip_vision_model"},
            "image_token_index": 5,
        },
    ),
    "gemma3": (
        "ImageTextToText",
        "gemma3",
        {"text_config": {**WIDE, "model_type": "gemma3_text"}, "vision_config": SIGLIP, "mm_tokens_per_image": 1},
    ),
    "paligemma": (
        "ImageTextToText",
        "paligemma",
        {
            "text_config": {**WIDE, "model_type": "gemma"},
            "vision_config": {**SIGLIP, "projection_dim": 32},
            "projection_dim": 32,
        },
    ),
    "qwen2_vl": (
        "ImageTextToText",
        "qwen2_vl",
        {
            "text_config": {**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            "vision_config": {"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 8},
        },
    ),
    "t5": (
        "Seq2SeqLM",
        "t5",
        {"vocab_size": 48, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
}
TASKS = {
    "CausalLM": "CAUSAL_LM",
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "Seq2SeqLM": "SEQ_2_SEQ_LM",
}
TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value", "dense"],
    "phi3": ["qkv_proj", "o_proj"],
    "bert classes": ["query", "value"],
    "bert tokens": ["query", "value"],
    "roberta classes": ["query", "value"],
    "roberta tokens": ["query", "value"],
    "distilbert": ["q_lin", "v_lin", "lin1"],
    "t5": ["q", "v", "wi"],
    "deep": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
STACKS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def model_of(kind: str) -> nn.Module:
    """Return a random model of a kind, in eval mode; biases and norms do not have their first values."""
    return built_once(_random, 0, kind)


def _random(kind: str) -> nn.Module:
    auto, model_type, shape = MODELS[kind]
    config = transformers.AutoConfig.for_model(model_type, **json.loads(json.dumps(shape)))
    model = getattr(transformers, f"AutoModelFor{auto}").from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def write(model: nn.Module, folder: Path, **options: Any) -> Path:
    """Write a model as its library does."""
    model.save_pretrained(folder, **options)
    return folder


def healthy(case: str, root: Path) -> Folders:
    """Return the folders of a case of HEALTHY, made once below a root."""
    kind, options = HEALTHY[case]
    folder = root / re.sub(r"\W", "-", case)
    found = Folders(kind, folder / "base", folder / "adapter", folder / "merged")
    if folder.exists():
        return found
    options = {"dtype": torch.float32, "method": "", "size": 0.05, **options}
    dtype, method, size = (options.pop(name) for name in ("dtype", "method", "size"))
    merge_dtype = options.pop("merge_dtype", dtype)
    shards = {name: options.pop(name) for name in ("max_shard_size",) if name in options}
    targets = options.pop("target_modules", TARGETS.get(kind, ["q_proj", "v_proj"]))
    model = model_of(kind).to(dtype)
    model.config._name_or_path = str(write(model, found.base, **shards))
    torch.manual_seed(1)
    if method:
        vismt.adapt(model, method, targets=targets, **options)
        trained(model, size, 1)
        vismt.save_adapter(model, found.adapter)
        merged = vismt.merge(model)
    else:
        shape = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": TASKS.get(MODELS[kind][0]), **options}
        hosted = peft.get_peft_model(model, peft.LoraConfig(**shape))
        trained(hosted, size, 1)
        hosted.save_pretrained(found.adapter)
        merged = hosted.to(merge_dtype).merge_and_unload()
    write(merged.to(merge_dtype), found.merged, **shards)
    return found


SAVED = ["lm_head"]
BF16, FP16 = torch.bfloat16, torch.float16
DORA = {"use_dora": True}
ALL = {"target_modules": "all-linear"}
HEALTHY: dict[str, tuple[str, dict[str, Any]]] = {
    **{kind: (kind, {}) for kind in MODELS},
    **{f"{kind} bf16": (kind, {"dtype": BF16}) for kind in MODELS},
    **{f"{kind} DoRA": (kind, DORA) for kind in ("llama", "gpt2", "bert classes", "vit", "swin", "llava", "deep")},
    **{
        f"{kind} DoRA merged in {name}": (kind, {**DORA, "merge_dtype": dtype, "size": size})
        for kind, name, dtype, size in (
            ("llama", "bf16", BF16, 0.05),
            ("llama", "fp16", FP16, 0.05),
            ("deep", "bf16", BF16, 0.02),
            ("deep", "fp16", FP16, 0.01),
            ("gpt2", "bf16", BF16, 0.01),
            ("vit", "fp16", FP16, 0.02),
        )
    },
    **{
        f"{kind} DoRA in {name}": (kind, {**DORA, "dtype": dtype, "size": size})
        for kind, name, dtype, size in (
            ("llama", "bf16", BF16, 0.02),
            ("deep", "fp16", FP16, 0.02),
            ("gpt2", "bf16", BF16, 0.05),
            ("vit", "bf16", BF16, 0.02),
        )
    },
    **{
        f"{kind} merged in {name}": (kind, {"merge_dtype": dtype})
        for kind, name, dtype in (("llama", "bf16", BF16), ("deep", "fp16", FP16), ("vit", "bf16", BF16))
    },
    **{f"{kind} all linears": (kind, ALL) for kind in ("llama", "gpt2", "t5", "llava", "qwen2_vl")},
    **{f"{kind} head": (kind, {"modules_to_save": SAVED}) for kind in ("llama", "tied", "gpt2", "gemma2", "qwen2")},
    **{f"{kind} table": (kind, {"modules_to_save": ["embed_tokens"]}) for kind in ("llama", "tied", "qwen2", "gemma2")},
    **{f"{kind} both": (kind, {"modules_to_save": ["embed_tokens", "lm_head"]}) for kind in ("llama", "tied")},
    **{f"{kind} norm": (kind, {"modules_to_save": ["norm"]}) for kind in ("llama", "qwen2")},
    **{
        f"{kind} tokens trained": (kind, {"trainable_token_indices": [3, 4, 7]})
        for kind in ("llama", "tied", "gpt2", "gemma2")
        if kind != "gpt2"
    },
    "tokens by module": ("llama", {"trainable_token_indices": {"embed_tokens": [1, 2]}}),
    **{f"{kind} experts": (kind, STACKS) for kind in ("mixtral", "qwen3_moe", "gpt_oss")},
    **{
        f"{kind} only experts": (kind, {**STACKS, "target_modules": []}) for kind in ("mixtral", "qwen3_moe", "gpt_oss")
    },
    "mixtral router": ("mixtral", {"modules_to_save": ["gate"]}),
    "mixtral gate": ("mixtral", {"target_parameters": ["mlp.gate.weight"]}),
    "qwen3_moe experts bf16": ("qwen3_moe", {**STACKS, "dtype": BF16}),
    **{f"{kind} biases": (kind, {"bias": "all"}) for kind in ("qwen2", "gpt2", "bert classes", "vit")},
    **{f"{kind} own biases": (kind, {"bias": "lora_only"}) for kind in ("qwen2", "opt", "swin")},
    **{f"{kind} embedding": (kind, {"target_modules": ["q_proj", "embed_tokens"]}) for kind in ("llama", "qwen2")},
    "tied table, both saved": ("tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "vismt lora experts": (
        "mixtral",
        {"method": "lora", "rank": 2, "target_modules": ["experts.gate_up_proj", "experts.down_proj", "q_proj"]},
    ),
    "rslora": ("llama", {"use_rslora": True}),
    "rslora DoRA": ("deep", {"use_rslora": True, **DORA}),
    "patterns": ("deep", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 32}}),
    "regex": ("deep", {"target_modules": r".*layers\.[02]\.self_attn\.(q|v)_proj"}),
    "some layers": ("deep", {"layers_to_transform": [1, 2]}),
    "excluded": ("deep", {"exclude_modules": r".*\.0\..*"}),
    "tiny update": ("llama", {"size": 1e-5}),
    "large update": ("llama", {"size": 0.3}),
    "gaussian": ("llama", {"init_lora_weights": "gaussian"}),
    "a PiSSA start inside": ("llama", {"init_lora_weights": "pissa"}),
    "t5 head": ("t5", {"modules_to_save": SAVED}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
    "dropout": ("llama", {"lora_dropout": 0.1}),
    "rank 1": ("llama", {"r": 1}),
    "rank 16": ("llama", {"r": 16}),
    "biases of B": ("qwen2", {"lora_bias": True}),
    "shards": ("deep", {"max_shard_size": "20KB"}),
    "shards bf16": ("mixtral", {"max_shard_size": "8KB", "dtype": BF16}),
    **{
        f"vismt {method} {kind}": (kind, {"method": method, "rank": 2})
        for method in ("lora", "pissa", "polar")
        for kind in ("vit", "llama", "swin", "bert classes")
    },
    **{
        f"{name}convolution {kind}": (kind, {**options, "target_modules": [target]})
        for kind, target in (("vit", "patch_embeddings.projection"), ("swin", "patch_embeddings.projection"))
        for name, options in (("", {}), ("vismt lora ", {"method": "lora", "rank": 2}))
    },
    "vismt s2ft": ("llama", {"method": "s2ft", "ratio": 0.25, "target_modules": None}),
}

PROMPTS = {"num_virtual_tokens": 3}
LINEARS = {"target_modules": ["q_proj", "v_proj"]}
# Folders of the Llama that peft does not merge, by name: the class of settings and its options.
UNMERGED: dict[str, tuple[Any, dict[str, Any]]] = {
    "prompt tuning": (peft.PromptTuningConfig, PROMPTS),
    "prefix tuning": (peft.PrefixTuningConfig, PROMPTS),
    "p-tuning": (peft.PromptEncoderConfig, {"encoder_hidden_size": 16, **PROMPTS}),
    "CPT": (peft.CPTConfig, {"cpt_token_ids": [1, 2, 3], "cpt_tokens_type_mask": [1, 2, 3]}),
    "adaption prompt": (peft.AdaptionPromptConfig, {"adapter_len": 4, "adapter_layers": 2}),
    "replicated layers": (peft.LoraConfig, {"layer_replication": [[0, 2], [1, 2]], **LINEARS}),
    "LoHa": (peft.LoHaConfig, LINEARS),
    "IA3": (peft.IA3Config, {"feedforward_modules": [], **LINEARS}),
    "VeRA": (peft.VeraConfig, {"r": 4, **LINEARS}),
    "BOFT": (peft.BOFTConfig, {"boft_block_size": 4, **LINEARS}),
}


def unmerged(case: str, root: Path) -> Folders:
    """Return the base and the adapter of a case of UNMERGED."""
    made, options = UNMERGED[case]
    folder = root / re.sub(r"\W", "-", case)
    found = Folders("llama", folder / "base", folder / "adapter", folder / "merged")
    model = model_of("llama")
    model.config._name_or_path = str(write(model, found.base))
    torch.manual_seed(1)
    hosted = peft.get_peft_model(model, made(task_type="CAUSAL_LM", **options))
    trained(hosted, 0.05, 1)
    hosted.save_pretrained(found.adapter)
    return found


# ---- faults
Change = Callable[[Folders], object]
Tensors = dict[str, Tensor]


def adapter(change: Callable[[Tensors], object]) -> Change:
    """Return a change of the tensors of an adapter."""
    return lambda folders: edit_tensors(folders.adapter / TENSORS, change)


def setting(**values: Any) -> Change:
    return lambda folders: edit_config(folders.adapter, lambda config: config.update(values))


def merged(change: Callable[[Tensors], object]) -> Change:
    return lambda folders: edit_tensors(folders.merged / WEIGHTS, change)


def base(change: Callable[[Tensors], object]) -> Change:
    return lambda folders: edit_tensors(folders.base / WEIGHTS, change)


def model_config(**values: Any) -> Change:
    def change(folders: Folders) -> None:
        path = folders.merged / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def updates(rule: Callable[[str, Tensor, Tensor], Tensor]) -> Change:
    """Return a change of a merged checkpoint: W + rule(name, W, D) in the place of W + D, where D is not zero."""

    def change(folders: Folders) -> None:
        stock = safetensors.torch.load_file(folders.base / WEIGHTS)

        def on(held: Tensors) -> None:
            for name, value in held.items():
                D = value.float() - stock[name].float()
                if D.any():
                    held[name] = (stock[name].float() + rule(name, stock[name].float(), D)).to(value.dtype)

        edit_tensors(folders.merged / WEIGHTS, on)

    return change


def stock_weights(rule: Callable[[Tensor], Tensor], words: str = "") -> Change:
    """Return a change of the base's share of a merged checkpoint: rule(W) + D for matrices whose names have a word."""
    return updates(lambda name, W, D: rule(W) - W + D if W.ndim == 2 and re.search(words, name) else D)


def every(word: str, rule: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    """Return a change of all tensors with a word in their names."""
    return lambda held: held.update({name: rule(value) for name, value in held.items() if re.search(word, name)})


def renamed(pattern: str, by: str) -> Callable[[Tensors], object]:
    return lambda held: held.update({re.sub(pattern, by, name): held.pop(name) for name in list(held)})


def without(word: str) -> Callable[[Tensors], object]:
    return lambda held: [held.pop(name) for name in list(held) if re.search(word, name)]


def exchanged(one: str, two: str) -> Callable[[Tensors], object]:
    """Return an exchange of the tensors whose names have one or the other word."""

    def change(held: Tensors) -> None:
        before = dict(held)
        for name in before:
            for a, b in ((one, two), (two, one)):
                other = name.replace(a, b)
                if a in name and other != name and other in before:
                    held[name] = before[other]

    return change


def layers(order: Callable[[int], int]) -> Callable[[Tensors], object]:
    """Return a change that gives each layer the tensors of another."""

    def change(held: Tensors) -> None:
        before = dict(held)
        for name in before:
            held[name] = before[re.sub(r"layers\.(\d+)", lambda match: f"layers.{order(int(match[1]))}", name)]

    return change


def noise(value: Tensor, size: float) -> Tensor:
    scale = size * value.float().std() if value.numel() > 1 else size
    return (value.float() + scale * torch.randn(value.shape, generator=torch.Generator().manual_seed(7))).to(
        value.dtype
    )


def grid(W: Tensor, bits: int) -> Tensor:
    """Return rows on a grid of 2^bits - 1 levels, as quantisation and its inverse leave them."""
    most = 2 ** (bits - 1) - 1
    scale = W.abs().amax(1, keepdim=True) / most
    return (W / scale).round() * scale


def pairs(rule: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Callable[[Tensors], object]:
    """Return a change of all pairs A, B."""

    def change(held: Tensors) -> None:
        for module in modules_of(held):
            a, b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
            held[a], held[b] = rule(held[a], held[b])

    return change


def file(which: str, content: bytes | None) -> Change:
    """Return a change of the file of tensors of a folder: half of it is left for None."""

    def change(folders: Folders) -> None:
        folder = getattr(folders, which)
        path = next(iter(sorted(folder.glob("*.safetensors"))))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)

    return change


def both(*changes: Change) -> Change:
    return lambda folders: [change(folders) for change in changes]


def header(dtype: str) -> Change:
    """Return a change of the type of every tensor of an adapter, whose bytes stay, as far as they are needed."""

    def change(folders: Folders) -> None:
        data = (folders.adapter / TENSORS).read_bytes()
        size = struct.unpack("<Q", data[:8])[0]
        found = json.loads(data[8 : 8 + size])
        end = 0
        for entry in (entry for name, entry in found.items() if name != "__metadata__"):
            bits = int(re.sub(r"\D.*", "", dtype[1:])) * int(torch.Size(entry["shape"]).numel())
            entry["dtype"], entry["data_offsets"] = dtype, [end, end + bits // 8]
            end += bits // 8
        text = json.dumps(found).encode()
        (folders.adapter / TENSORS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))

    return change


def sharded(which: str, hit: str, rule: Callable[[Path], object]) -> Change:
    """Return a change of the shards with a word in the names of all of their tensors."""

    def change(folders: Folders) -> None:
        for path in getattr(folders, which).glob("*.safetensors"):
            if all(re.search(hit, name) for name in safetensors.torch.load_file(path)):
                rule(path)
                return
        raise AssertionError(hit)

    return change


def principal(folders: Folders) -> None:
    """Give an adapter the principal parts of the base, as a start of PiSSA leaves them inside."""
    stock = safetensors.torch.load_file(folders.base / WEIGHTS)

    def change(held: Tensors) -> None:
        for module in modules_of(held):
            W = stock[f"{module.removeprefix(PREFIX)}.weight"]
            u, s, v = torch.linalg.svd(W, full_matrices=False)
            root = (s[:4] / 2).sqrt()
            held[f"{module}.lora_B.weight"] = noise(u[:, :4] * root, 0.02)
            held[f"{module}.lora_A.weight"] = noise(root[:, None] * v[:4], 0.02)

    edit_tensors(folders.adapter / TENSORS, change)


def other_model(kind: str, which: str = "base") -> Change:
    """Return a change of a folder for a model of another kind or, of the same kind, with other values."""

    def change(folders: Folders) -> None:
        shutil.rmtree(getattr(folders, which))
        model = model_of(kind)
        if kind == folders.kind:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(parameter[torch.randperm(len(parameter))])
        write(model, getattr(folders, which))

    return change


def stale(folders: Folders) -> None:
    """Put the single file of a base beside the shards of the merged checkpoint."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folders.base)
    model.save_pretrained(folders.merged / "whole")
    shutil.move(folders.merged / "whole" / WEIGHTS, folders.merged / WEIGHTS)
    shutil.rmtree(folders.merged / "whole")


def twin(held: Tensors) -> None:
    for side in "AB":
        names = [name for name in held if f"q_proj.lora_{side}" in name]
        held[names[1]] = held[names[0]].clone()


def half_rows(value: Tensor) -> Tensor:
    return torch.cat([value[: len(value) // 2], torch.zeros_like(value[len(value) // 2 :])])


def meta_order(W: Tensor) -> Tensor:
    """Return the rows of a projection in the order of Meta's rotary embedding."""
    return W.view(4, 2, W.shape[0] // 8, -1).transpose(1, 2).reshape(W.shape)


def without_magnitudes(folders: Folders) -> None:
    """Merge the factors of a DoRA without its magnitudes."""
    model = model_of(folders.kind)
    edit_config(folders.adapter, lambda config: config.update(use_dora=False))
    hosted = peft.PeftModel.from_pretrained(model, str(folders.adapter))
    edit_config(folders.adapter, lambda config: config.update(use_dora=True))
    shutil.rmtree(folders.merged)
    write(hosted.merge_and_unload(), folders.merged)


WRAPPED = {
    "torch.compile": ("^", "_orig_mod."),
    "DDP": ("^", "module."),
    "peft": ("^", PREFIX),
    "FSDP": (r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module."),
    "checkpointing": (r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module."),
}
JUNK = {
    "half of it": None,
    "empty": b"",
    "text": b"not safetensors" * 20,
    "a pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "a zip": b"PK\x03\x04" + bytes(200),
}
# By name: the healthy case, what has to be given for it to be found, and the change.
ALONE, BASE, MERGED = "alone", "base", "merged"
FAULTS: dict[str, tuple[str, str, Change]] = {
    # ---- the adapter alone
    **{f"tensors: {name}": ("llama", ALONE, file("adapter", junk)) for name, junk in JUNK.items()},
    **{f"vismt's tensors: {name}": ("vismt lora vit", ALONE, file("adapter", junk)) for name, junk in JUNK.items()},
    "vismt's tensors lack a factor": (
        "vismt lora vit",
        ALONE,
        lambda folders: edit_tensors(
            next(folders.adapter.glob("*.safetensors")), lambda t: t.pop(next(n for n in t if "lora_B" in n))
        ),
    ),
    "vismt's tensors are missing": (
        "vismt lora vit",
        ALONE,
        lambda folders: next(folders.adapter.glob("*.safetensors")).unlink(),
    ),
    "vismt's settings without an end": (
        "vismt lora vit",
        ALONE,
        lambda folders: (folders.adapter / "adapter.json").write_text("{" + " " * 2**24 + "}"),
    ),
    **{
        f"adapter of {name}": ("deep", ALONE, adapter(renamed(f"^{PREFIX}", PREFIX + by)))
        for name, by in (("torch.compile", "_orig_mod."), ("DDP", "module."), ("peft twice", PREFIX))
    },
    **{f"adapter of {name}": ("deep", ALONE, adapter(renamed(*WRAPPED[name]))) for name in ("FSDP", "checkpointing")},
    "largest number of fp16": ("llama", ALONE, adapter(every("lora_B", lambda v: v.half().fill_(65504)))),
    "NaN": ("llama", ALONE, adapter(every("lora_A", lambda v: v * float("nan")))),
    "infinite head": ("llama head", ALONE, adapter(every("lm_head", lambda v: v / 0))),
    "factors of 1e38": ("llama", ALONE, adapter(every("lora_", lambda v: v.sign() * 1e38))),
    "vismt's factors of 1e38": (
        "vismt lora llama",
        ALONE,
        lambda folders: edit_tensors(
            next(folders.adapter.glob("*.safetensors")), every("lora_", lambda v: v.sign() * 1e38)
        ),
    ),
    "alpha of 1e30": ("llama", ALONE, setting(lora_alpha=1e30)),
    "rank_pattern lost": ("patterns", ALONE, setting(rank_pattern={})),
    "alpha null": ("llama", ALONE, setting(lora_alpha=None)),
    "alpha NaN": ("llama", ALONE, setting(lora_alpha=float("nan"))),
    "alpha 0": ("llama", ALONE, setting(lora_alpha=0)),
    "another r": ("llama", ALONE, setting(r=8)),
    "rank 0": ("llama", ALONE, adapter(pairs(lambda A, B: (A[:0], B[:, :0])))),
    "a target less": ("llama", ALONE, setting(target_modules=["q_proj"])),
    "layers_to_transform too short": ("deep", ALONE, setting(layers_to_transform=[0, 1])),
    "flattened factors": ("llama", ALONE, adapter(every("lora_", lambda v: v.flatten()))),
    "A and B exchanged": ("llama", ALONE, adapter(exchanged("lora_A", "lora_B"))),
    "transposed": ("llama", ALONE, adapter(every("lora_", lambda v: v.T))),
    "embedding factors transposed": ("llama embedding", ALONE, adapter(every("lora_embedding", lambda v: v.T))),
    "embedding factors exchanged": (
        "llama embedding",
        ALONE,
        adapter(exchanged("lora_embedding_A", "lora_embedding_B")),
    ),
    "no settings": ("llama", ALONE, lambda folders: (folders.adapter / CONFIG).unlink()),
    "settings are a list": ("llama", ALONE, lambda folders: (folders.adapter / CONFIG).write_text("[]")),
    "no tensors": ("llama", ALONE, lambda folders: (folders.adapter / TENSORS).unlink()),
    "lora_b": ("llama", ALONE, adapter(renamed("lora_B", "lora_b"))),
    "a factor less": ("llama", ALONE, adapter(without(r"0\.self_attn\.q_proj\.lora_B"))),
    "names with default": ("llama", ALONE, adapter(renamed(r"\.weight", ".default.weight"))),
    "default beside plain names": (
        "llama",
        ALONE,
        adapter(lambda t: t.update({n.replace(".weight", ".default.weight"): 1 * t[n] for n in list(t)})),
    ),
    "the name of an adapter": ("llama", ALONE, adapter(renamed(r"\.weight", ".mine.weight"))),
    "no prefix": ("llama", ALONE, adapter(renamed(f"^{PREFIX}", ""))),
    "names of an old peft": ("llama", ALONE, adapter(renamed(r"\.lora_", ".model.lora_"))),
    "magnitudes missing": ("llama DoRA", ALONE, adapter(without("magnitude"))),
    "a magnitude missing": ("llama DoRA", ALONE, adapter(without(r"0\..*q_proj.*magnitude"))),
    "use_dora off": ("llama DoRA", ALONE, setting(use_dora=False)),
    "use_dora on": ("llama", ALONE, setting(use_dora=True)),
    "lora_bias off": ("biases of B", ALONE, setting(lora_bias=False)),
    "head lost": ("llama head", ALONE, adapter(without("lm_head"))),
    "head not named": ("llama norm", ALONE, setting(modules_to_save=None)),
    **{
        f"{kind}: no head": (kind, ALONE, adapter(without("classifier|score")))
        for kind in ("bert classes", "bert tokens", "roberta tokens", "llama classes")
    },
    "biases missing": ("qwen2 biases", BASE, adapter(without(r"bias$"))),
    "own biases missing": ("qwen2 own biases", BASE, adapter(without(r"bias$"))),
    "token rows missing": ("llama tokens trained", ALONE, adapter(without("token_adapter"))),
    "B is zero": ("deep", ALONE, adapter(every("lora_B", torch.zeros_like))),
    "A is zero": ("deep", ALONE, adapter(every("lora_A", torch.zeros_like))),
    "B is zero in every k_proj": ("deep", ALONE, adapter(every("k_proj.lora_B", torch.zeros_like))),
    "A is zero in every v_proj": ("deep", ALONE, adapter(every("v_proj.lora_A", torch.zeros_like))),
    "whole numbers": ("llama", ALONE, adapter(every("lora_", lambda v: (100 * v).to(torch.int8)))),
    "complex factors": ("llama", ALONE, adapter(every("lora_", lambda v: v.to(torch.complex64)))),
    "factors of 4 bits": ("llama", ALONE, header("F4")),
    "the same factors twice": ("llama", ALONE, adapter(twin)),
    "another tuner": ("llama", ALONE, setting(peft_type="NEWTUNER")),
    "bias: x": ("llama", ALONE, setting(bias="x")),
    "init_lora_weights: x": ("llama", ALONE, setting(init_lora_weights="x")),
    "task_type: x": ("llama", ALONE, setting(task_type="x")),
    "rank_pattern: null": ("llama", ALONE, setting(rank_pattern=None)),
    "alpha_pattern: null": ("llama", ALONE, setting(alpha_pattern=None)),
    "a saved head of zeros": ("llama head", ALONE, adapter(every("lm_head", torch.zeros_like))),
    # ---- with the base
    "a square lora_B transposed": (
        "llama",
        BASE,
        adapter(every(r"0\.self_attn\.q_proj\.lora_B", lambda v: v.T.contiguous())),
    ),
    "a bias of the head less": ("bert classes", BASE, adapter(without(r"classifier\.bias"))),
    "a head of other labels": ("bert classes", BASE, adapter(every("classifier", lambda v: torch.cat([v, v, v])))),
    "a token outside the vocabulary": ("llama tokens trained", BASE, setting(trainable_token_indices=[3, 4, 500])),
    "more rows than tokens": ("llama tokens trained", BASE, setting(trainable_token_indices=[3, 4])),
    "targets that the base lacks": ("llama", BASE, setting(target_modules=["query"])),
    "a target without factors": ("llama", BASE, setting(target_modules=["q_proj", "v_proj", "k_proj"])),
    **{f"base: {name}": ("llama", BASE, file("base", junk)) for name, junk in JUNK.items()},
    **{f"base of {name}": ("deep", BASE, base(renamed(*words))) for name, words in WRAPPED.items()},
    "layers beyond the end": ("deep", BASE, adapter(renamed(r"layers\.3", "layers.9"))),
    "names of a multimodal class": ("llama", BASE, adapter(renamed(r"model\.layers", "model.language_model.layers"))),
    "a module less": ("deep", BASE, adapter(without(r"layers\.2\.mlp\.up_proj"))),
    "half of B": ("llama", BASE, adapter(every("lora_B", lambda v: v[: len(v) // 2]))),
    "narrow A": ("llama", BASE, adapter(every("lora_A", lambda v: v[:, :16]))),
    "factors of four dimensions": ("llama", BASE, adapter(every("lora_", lambda v: v[..., None, None]))),
    "factors of five dimensions": ("llama", BASE, adapter(every("lora_", lambda v: v[..., None, None, None]))),
    "PiSSA inside": ("llama", BASE, principal),
    "an adapted shard of the base less": ("shards", BASE, sharded("base", "_proj", Path.unlink)),
    "another shard of the base less": ("shards", BASE, sharded("base", "embed|lm_head", Path.unlink)),
    "base without norms": ("llama", BASE, base(without("norm"))),
    "base without its table": ("llama", BASE, base(without("embed_tokens"))),
    "base without its head": ("llama", BASE, base(without("lm_head"))),
    "base of another width": ("llama", BASE, other_model("gpt2")),
    "vismt's on other values": ("vismt lora llama", BASE, other_model("llama")),
    "a base of another name": ("llama", BASE, setting(base_model_name_or_path="meta-llama/Llama-2-7b-hf")),
    "a base of another family by name": ("llama", BASE, setting(base_model_name_or_path="openai-community/gpt2")),
    "update of 10^4 times the weight": ("llama", BASE, adapter(every("lora_B", lambda v: 1e4 * v))),
    "update of 5 times the weight": ("deep", BASE, adapter(every("lora_B", lambda v: 60 * v))),
    "bert classes: a head of nothing": ("bert classes", BASE, adapter(without("classifier"))),
    # ---- with base and merged checkpoint
    "a zero factor beside a whole merge": (
        "deep",
        MERGED,
        adapter(every(r"1\.self_attn\.q_proj\.lora_B", torch.zeros_like)),
    ),
    **{f"merged: {name}": ("llama", MERGED, file("merged", junk)) for name, junk in JUNK.items()},
    **{f"merged under {name}": ("deep", MERGED, merged(renamed(*words))) for name, words in WRAPPED.items()},
    "merged without norms": ("llama", MERGED, merged(without("layernorm"))),
    "merged without its last norm": ("llama", MERGED, merged(without(r"model\.norm"))),
    "merged without its head": ("llama", MERGED, merged(without("lm_head"))),
    "merged without its table": ("llama", MERGED, merged(without("embed_tokens"))),
    "merged without biases": ("qwen2", MERGED, merged(without("bias"))),
    "merged without an adapted weight": ("llama", MERGED, merged(without(r"0\.self_attn\.q_proj"))),
    "merged ViT without norms": ("vit", MERGED, merged(without("layernorm"))),
    "merged ViT without its head": ("vit", MERGED, merged(without("classifier"))),
    "merged Swin without biases": ("swin", MERGED, merged(without("dense.bias"))),
    "merged LLaVA without its projector": ("llava", MERGED, merged(without("projector"))),
    "merged tied model without its table": ("tied", MERGED, merged(without("embed_tokens"))),
    "a shard less": ("shards", MERGED, sharded("merged", "embed|lm_head", Path.unlink)),
    "half of a shard": ("shards", MERGED, sharded("merged", ".", lambda p: p.write_bytes(p.read_bytes()[:300]))),
    "shards without an index": ("shards", MERGED, lambda folders: (folders.merged / INDEX).unlink()),
    "a stale file beside the shards": ("shards", MERGED, stale),
    "a layer more in config.json": ("deep", MERGED, model_config(num_hidden_layers=5)),
    "a layer less in config.json": ("deep", MERGED, model_config(num_hidden_layers=3)),
    "another rope": (
        "deep",
        MERGED,
        model_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rope_theta=5e5),
    ),
    "another eps": ("deep", MERGED, model_config(rms_norm_eps=1e-3)),
    "another activation": ("deep", MERGED, model_config(hidden_act="gelu")),
    "other heads": ("square", MERGED, model_config(num_attention_heads=8, num_key_value_heads=8, head_dim=4)),
    "the names of peft": (
        "llama",
        MERGED,
        both(
            lambda folders: shutil.copy(folders.base / WEIGHTS, folders.merged / WEIGHTS),
            merged(renamed(r"(q|v)_proj\.weight", r"\1_proj.base_layer.weight")),
        ),
    ),
    "A is B transposed": ("square", MERGED, adapter(pairs(lambda A, B: (B.T.contiguous(), A.T.contiguous())))),
    "A of two layers exchanged": (
        "llama",
        MERGED,
        adapter(exchanged("0.self_attn.q_proj.lora_A", "1.self_attn.q_proj.lora_A")),
    ),
    "B of two layers exchanged": (
        "llama",
        MERGED,
        adapter(exchanged("0.self_attn.q_proj.lora_B", "1.self_attn.q_proj.lora_B")),
    ),
    "k with v": ("deep", MERGED, adapter(exchanged("k_proj", "v_proj"))),
    "q with o": ("deep", MERGED, adapter(exchanged("q_proj", "o_proj"))),
    "gate with up": ("deep", MERGED, adapter(exchanged("gate_proj", "up_proj"))),
    "layers reversed": ("deep", MERGED, adapter(layers(lambda number: 3 - number))),
    "layers rotated": ("deep", MERGED, adapter(layers(lambda number: (number + 1) % 4))),
    "other base": ("llama", MERGED, other_model("llama")),
    "a base nearby": ("deep", MERGED, base(every("weight", lambda v: noise(v, 0.02) if v.ndim == 2 else v))),
    "rslora on": ("deep", MERGED, setting(use_rslora=True)),
    "rslora off": ("rslora", MERGED, setting(use_rslora=False)),
    "alpha_pattern lost": ("patterns", MERGED, setting(alpha_pattern={})),
    "alpha_pattern misspelt": ("patterns", MERGED, setting(alpha_pattern={"v_porj": 32})),
    "alpha_pattern with a prefix": ("patterns", MERGED, setting(alpha_pattern={f"{PREFIX}.*v_proj": 32})),
    "alpha negative": ("llama", MERGED, setting(lora_alpha=-8)),
    "alpha halved": ("llama", MERGED, setting(lora_alpha=4)),
    "merged twice": ("llama", MERGED, updates(lambda name, W, D: 2 * D)),
    "half of the update": ("llama", MERGED, updates(lambda name, W, D: 0.5 * D)),
    "a third more": ("deep", MERGED, updates(lambda name, W, D: 1.3 * D)),
    "subtracted": ("llama", MERGED, updates(lambda name, W, D: -D)),
    "nothing merged": ("llama", MERGED, updates(lambda name, W, D: 0 * D)),
    "two of four layers": ("deep", MERGED, updates(lambda name, W, D: D * ("layers.0" in name or "layers.2" in name))),
    "attention only": ("deep", MERGED, updates(lambda name, W, D: D * ("self_attn" in name))),
    "a module unmerged": ("deep", MERGED, updates(lambda name, W, D: D * ("layers.1.mlp.up_proj" not in name))),
    "average of 0.95": ("deep", MERGED, adapter(every("lora_B", lambda v: 0.95 * v))),
    "average of 0.8": ("deep", MERGED, adapter(every("lora_B", lambda v: 0.8 * v))),
    "an earlier step": ("deep", MERGED, adapter(every("lora_", lambda v: noise(v, 0.1)))),
    "a second adapter inside": ("deep", MERGED, updates(lambda name, W, D: D + D.flip(0))),
    "a second adapter, smaller": ("deep", MERGED, updates(lambda name, W, D: D + 0.2 * D.flip(0))),
    "half of the rows": ("deep", MERGED, updates(lambda name, W, D: half_rows(D))),
    "half of the rows of B": ("deep", MERGED, adapter(every("lora_B", half_rows))),
    "a permuted rank": ("deep", MERGED, adapter(every("lora_A", lambda v: v.roll(1, 0)))),
    "Meta's rotary order": ("square", MERGED, merged(every("q_proj", meta_order))),
    "weights times 0.98": ("deep", MERGED, stock_weights(lambda W: 0.98 * W)),
    "base of 4 bits": ("deep", MERGED, stock_weights(lambda W: grid(W, 4))),
    "base of 4 bits, bf16": ("llama bf16", MERGED, stock_weights(lambda W: grid(W, 4))),
    "base of 8 bits": ("deep", MERGED, stock_weights(lambda W: grid(W, 8))),
    "base of 8 bits, bf16": ("llama bf16", MERGED, stock_weights(lambda W: grid(W, 8))),
    "base of NF4": ("deep", MERGED, stock_weights(nf4)),
    "base of NF4, bf16": ("llama bf16", MERGED, stock_weights(nf4)),
    "8 bits after the merge": ("deep", MERGED, updates(lambda name, W, D: grid(W + D, 8) - W)),
    "DoRA merged as LoRA": ("llama DoRA", MERGED, without_magnitudes),
    "magnitudes exchanged": (
        "deep DoRA",
        MERGED,
        adapter(exchanged("layers.0.self_attn.q_proj.lora_mag", "layers.1.self_attn.q_proj.lora_mag")),
    ),
    "GPT-2: a projection transposed": (
        "gpt2",
        MERGED,
        updates(lambda name, W, D: D.T if D.shape[0] == D.shape[1] else D),
    ),
    "GPT-2: only the rows of q": (
        "gpt2",
        MERGED,
        updates(lambda name, W, D: torch.cat([D[:, :32], 0 * D[:, 32:]], 1) if "c_attn" in name else D),
    ),
    "infinite weight": ("llama", MERGED, merged(every(r"0\.self_attn\.q_proj", lambda v: v / 0))),
    "NaN in a norm": ("llama", MERGED, merged(every(r"model\.norm", lambda v: v * float("nan")))),
    "another norm": ("llama", MERGED, merged(every(r"model\.norm", lambda v: 2 * v))),
    "another table": ("llama", MERGED, merged(every("embed_tokens", lambda v: v.flip(0)))),
    "another head": ("llama", MERGED, merged(every("lm_head", lambda v: v.flip(0)))),
    "biases of zero": ("qwen2 biases", MERGED, merged(every("bias", torch.zeros_like))),
    "biases of the base": ("qwen2 biases", MERGED, updates(lambda name, W, D: D * ("bias" not in name))),
    "head not merged": ("llama head", MERGED, updates(lambda name, W, D: D * ("lm_head" not in name))),
    "an untrained head in the file": ("llama head", MERGED, adapter(every("lm_head", lambda v: v.flip(0)))),
    "bert classes: head not merged": (
        "bert classes",
        MERGED,
        updates(lambda name, W, D: D * ("classifier" not in name)),
    ),
    "ViT: half of the update": ("vit", MERGED, updates(lambda name, W, D: 0.5 * D)),
    "Swin: nothing merged": ("swin", MERGED, updates(lambda name, W, D: 0 * D)),
    "LLaVA: text only": ("llava", MERGED, updates(lambda name, W, D: D * ("language_model" in name))),
    "Gemma 3: images only": ("gemma3", MERGED, updates(lambda name, W, D: D * ("language_model" not in name))),
    "ViT: q with v": ("vit", MERGED, adapter(exchanged("q_proj", "v_proj"))),
    **{
        f"{kind}: experts not merged": (
            f"{kind} experts",
            MERGED,
            updates(lambda name, W, D: D * ("experts" not in name)),
        )
        for kind in ("mixtral", "qwen3_moe", "gpt_oss")
    },
    **{
        f"{kind}: only experts, not merged": (f"{kind} only experts", MERGED, updates(lambda name, W, D: 0 * D))
        for kind in ("mixtral", "qwen3_moe", "gpt_oss")
    },
    "mixtral: experts twice": ("mixtral experts", MERGED, updates(lambda name, W, D: D * (1 + ("experts" in name)))),
    "mixtral: an expert not merged": (
        "mixtral experts",
        MERGED,
        updates(lambda name, W, D: D * ("experts.2" not in name)),
    ),
    "qwen3_moe: gate with up": ("qwen3_moe experts", MERGED, merged(exchanged("gate_proj", "up_proj"))),
    "gpt_oss: experts of the other layer": (
        "gpt_oss experts",
        MERGED,
        adapter(exchanged("layers.0.mlp.experts", "layers.1.mlp.experts")),
    ),
    "mixtral: router not merged": (
        "mixtral router",
        MERGED,
        updates(lambda name, W, D: D * ("gate.weight" not in name)),
    ),
    "mixtral: adapted router not merged": (
        "mixtral gate",
        MERGED,
        updates(lambda name, W, D: D * ("gate.weight" not in name)),
    ),
    "vismt's experts not merged": (
        "vismt lora experts",
        MERGED,
        updates(lambda name, W, D: D * ("experts" not in name)),
    ),
    "token rows not merged": ("llama tokens trained", MERGED, updates(lambda name, W, D: D * ("embed" not in name))),
    "other token rows": (
        "llama tokens trained",
        MERGED,
        updates(lambda name, W, D: D.roll(1, 0) if "embed" in name else D),
    ),
    "more token rows": (
        "llama tokens trained",
        MERGED,
        merged(every("embed_tokens", lambda v: v.index_fill(0, torch.tensor([20]), 0.5))),
    ),
}
