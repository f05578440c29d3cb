"""Write the golden files; no test runs this file.

Commit 1ff998e wrote the adapters but mtlora, full and head, commit 74a8bd4 the run folders.

    PYTHONPATH=<that vismt>:tests python tests/golden/make.py TARGET

It uses only the public interface and the command line. TARGET then has the files that are committed beside this one:

adapters/NAME/      files of `vismt.save_adapter` after a seeded random update, and expected.safetensors: the input,
                    the logits of the adapted model ("logits") and of the merged one ("merged"; of moe_lora after its
                    router faded; none of mtlora, whose pairs of tasks cannot merge), the gates of ilora, and in the
                    metadata the method and the base model.
runs/NAME/          the run folder of `vismt run` without checkpoints, reports, figures and panels. A later version wrote
                    configuration, facts and results anew from the same weights, and records and logs were left out.
merged.safetensors  "NAME/arm": logits of the merged models of those runs on the golden input of their kind.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from golden.inputs import golden_input, golden_model, logits_of, write_world
from golden.merged import ARMS, merged_logits
from torch import Tensor, nn

import vismt
from vismt.llm import collect_covariance, gate_of, instance_gates
from vismt.multitask import set_fade

BULKY = ("checkpoint*", ".lock*", "report.*", "figures", "panels", "routers", "*.npz", "merged")

# name: (base model, method, options)
ADAPTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("vit", "lora", {"rank": 2, "alpha": 3.0, "also_train": ["head"]}),
    "lora_split_qkv": ("vit", "lora", {"rank": 2, "targets": ["attn.qkv"], "split_qkv": True, "rslora": True}),
    "lora_conv1d": ("gpt2", "lora", {"rank": 2}),
    "amt": ("vit", "amt", {"rank": 2}),
    "moe_lora": ("vit", "moe_lora", {"rank": 2, "n_experts": 4}),
    "pissa": ("llama", "pissa", {"rank": 2}),
    "qpissa": ("llama", "pissa", {"rank": 2, "quantize": "nf4", "iterations": 1}),
    "corda": ("llama", "corda", {"rank": 2, "mode": "kpm", "targets": ["q_proj", "v_proj", "up_proj"]}),
    "polar": ("llama", "polar", {"rank": 2}),
    "ilora": ("llama", "ilora", {"rank": 4, "n_experts": 2, "user_width": 8, "targets": ["q_proj", "v_proj"]}),
    "s2ft": ("llama", "s2ft", {"ratio": 0.25, "parts": ["o", "d"]}),
    "s2ft_index": ("llama", "s2ft", {"ratio": 0.25, "parts": ["v", "o", "u", "d"], "mode": "index"}),
    "s2ft_delta": ("vit", "s2ft", {"ratio": 0.25, "parts": ["o", "d"], "mode": "delta"}),
    "lisa": ("vit", "lisa", {"active": 1}),
    "full": ("vit", "full", {"exclude": ["blocks.0"]}),
    "head": ("vit", "head", {}),
    "mtlora": ("vit", "mtlora", {"rank": 2, "tasks": ["depth", "normals"]}),
}

VIT = {"name": "test_vit", "img_size": 32, "pretrained": "weights/vit.safetensors"}
PGD = {"name": "pgd", "epsilon": "2/255", "steps": 2}
SHAPES = {"data": ["sets/shapes:train"], "ways": 3, "shots": 1, "queries": 2, "augment": False}
EPISODES = {"data": ["sets/tones:test"], "ways": 3, "shots": [1], "queries": 3, "episodes": 5}
TWO_LAYERS = ["attn.qkv", "mlp.fc1"]

RUNS: dict[str, dict[str, Any]] = {
    "fewshot_single": {
        "model": {**VIT, "block": 3},
        "adapt": {"method": "lora", "rank": 2, "targets": TWO_LAYERS},
        "source": {**SHAPES, "augment": True},
        "train": {"steps": 8, "lr": 4.0e-2, "checkpoint_every": 8},
        "evaluate": {**EPISODES, "data": ["sets/tones:test", "sets/shapes:test"], "shots": [1, 2], "attacks": [PGD]},
    },
    "fewshot_pool": {
        "model": {**VIT, "block": 2},
        "adapt": {"method": "amt", "rank": 2, "targets": ["attn.qkv"]},
        "source": SHAPES,
        "train": {"steps": 6, "lr": 3.0e-2, "checkpoint_every": 6},
        "pool": {"levels": [0.5, 4], "clean": True, "warmup": 2, "gamma": 1.0e-2},
        "evaluate": {
            **EPISODES,
            "attacks": [PGD],
            "models": ["frozen", "clean", "merged", "average", "logits", "min_ce", "expert:4", "merged+finetune"],
        },
        "finetune": {"steps": 2},
    },
    "fewshot_maml": {
        "model": {**VIT, "block": 2},
        "adapt": {"method": "lora", "rank": 2, "targets": ["attn.qkv"]},
        "source": SHAPES,
        "meta": {"algorithm": "metasgd", "inner_steps": 2, "inner_lr": 0.3},
        "train": {"steps": 2, "lr": 1.0e-2, "checkpoint_every": 2},
        "evaluate": EPISODES,
    },
    "multitask": {
        "task": "multitask",
        "model": VIT,
        "adapt": {"method": "moe_lora", "rank": 1, "options": {"n_experts": 4}},
        "fade": {"start": 0.0, "end": 0.5},
        "retain": {},
        "tasks": [
            {"name": "shapes", "train": ["sets/shapes:train"], "validation_share": 0.25, "test": ["sets/shapes:test"]},
            {"name": "tones", "train": ["sets/tones:train"], "validation_share": 0.25, "test_share": 0.25},
        ],
        "batch": 16,
        "seeds": [0, 1],
        "arms": {
            "lora": {"adapt": {"method": "lora", "rank": 1, "targets": TWO_LAYERS}, "fade": None, "retain": None},
            "emtal": {},
        },
        "train": {"steps": 12, "lr": 2.0e-2, "weight_decay": 0.05, "checkpoint_every": 12},
        "evaluate": {"batch": 64, "attacks": [PGD]},
    },
    "multitask_tuned": {
        "task": "multitask",
        "model": VIT,
        "head": "separate",
        "adapt": {"method": "lora", "rank": 1, "targets": ["attn.qkv"]},
        "tasks": [
            {"name": "shapes", "train": ["sets/shapes:train"], "validation_share": 0.25, "test": ["sets/shapes:test"]},
            {"name": "tones", "train": ["sets/tones:train"], "validation_share": 0.25, "test": ["sets/tones:test"]},
        ],
        "batch": 16,
        "tune": {"rates": [3.0e-3, 2.0e-2]},
        "balancing": {"method": "uncertainty"},
        "train": {"steps": 10, "checkpoint_every": 10},
        "evaluate": {"batch": 64},
    },
    "dense": {
        "task": "dense",
        "model": {"name": "test_vit", "pretrained": "weights/vit.safetensors"},
        "size": [32, 48],
        "adapt": {"method": "lora", "rank": 1, "targets": ["attn.qkv"]},
        "data": {"train": ["sets/rooms:train"], "test": ["sets/rooms:test"]},
        "tasks": [{"name": "semseg", "classes": 3}, "depth"],
        "head": {"name": "linear"},
        "augment": {"strength": 0.2, "scales": [0.8, 1.25]},
        "batch": 3,
        "seeds": [0, 1],
        "arms": {"lora": {}, "heads": {"adapt": None}},
        "baseline": "heads",
        "train": {"steps": 10, "lr": 1.0e-2, "checkpoint_every": 10},
    },
    "lm": {
        "task": "lm",
        "model": {"name": "weights/lm", "first_block": 1},
        "tasks": [
            {
                "name": "sentiment",
                "kind": "classes",
                "prompt": "Review: {text}\nSentiment:",
                "limit": 16,
                "options": {"answers": {"0": " negative", "1": " positive"}},
                "train": ["sets/films:train"],
                "validation": ["sets/films:dev"],
                "test": ["sets/films:test"],
            },
            {
                "name": "stories",
                "kind": "causal",
                "options": {"answer": "{text}", "length": 16, "end": False},
                "test": ["sets/stories"],
            },
        ],
        "adapt": {"method": "lora", "rank": 2, "targets": ["q_proj", "v_proj"]},
        "batch": 4,
        "seeds": [0, 1],
        "arms": {
            "lora": {},
            "polar-vbll": {"adapt.method": "polar", "head": {"name": "vbll", "alternate": {"steps": 1}}},
        },
        "train": {"steps": 8, "lr": 3.0e-2, "checkpoint_every": 8},
        "evaluate": {"batch": 4, "temperature": True, "laplace": True, "samples": 5},
    },
    "lm_recommendation": {
        "task": "lm",
        "model": {"name": "weights/lm"},
        "tasks": [
            {
                "name": "ranked",
                "kind": "recommendation",
                "prompt": "the {history} : {candidates} Answer:",
                "limit": 12,
                "options": {"candidates": 4, "history": 3, "curriculum": 0.5, "length": 96},
                "train": ["sets/walks:train"],
                "validation": ["sets/walks:validation"],
                "test": ["sets/walks:test"],
            }
        ],
        "adapt": {"method": "ilora", "rank": 4, "targets": ["q_proj", "v_proj"], "options": {"n_experts": 2}},
        "recommender": {"width": 8, "steps": 40, "batch": 20, "lr": 1.0e-2},
        "train": {"steps": 4, "lr": 1.0e-2, "checkpoint_every": 4},
        "batch": 4,
        "evaluate": {"batch": 4},
    },
}


def main() -> None:
    """Write all golden files below the folder given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--world", type=Path, help="where data and runs are made (TARGET/world, removed at the end)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = options.target.resolve()
    world = write_world((options.world or target / "world").resolve())
    for name in ADAPTERS:
        write_adapter(name, target / "adapters" / name)
    merged: dict[str, Tensor] = {}
    for name, config in RUNS.items():
        run = write_run(name, config, world)
        shutil.copytree(run, target / "runs" / name, ignore=shutil.ignore_patterns(*BULKY), dirs_exist_ok=True)
        with current(world):
            for arm in ARMS.get(name, []):
                merged[f"{name}/{arm or ''}"] = merged_logits(run, arm).contiguous()
    safetensors.torch.save_file(merged, target / "merged.safetensors")
    if options.world is None:
        shutil.rmtree(world)


def write_adapter(name: str, folder: Path) -> None:
    """Write an adapter after a seeded update, and the logits of the model with it."""
    kind, method, options = ADAPTERS[name]
    model = golden_model(kind)
    inputs = golden_input(kind)
    if method == "corda":
        options = {**options, "covariances": collect_covariance(model, [inputs], options["targets"])}
    vismt.adapt(model, method, seed=5, **options)
    move(model, "blocks.1" if method == "lisa" else "")
    vismt.save_adapter(model, folder)
    expected: dict[str, Tensor] = {"input": inputs}
    gates = nullcontext()
    if method == "ilora":
        expected["users"] = torch.linspace(-1, 1, 8)[None]
        expected["gates"] = gate_of(model)(expected["users"]).detach()[0].contiguous()
        gates = instance_gates(expected["gates"])
    with gates:
        expected["logits"] = logits_of(model, inputs)
        if method == "moe_lora":
            set_fade(model, 1.0)
        if method != "mtlora":
            expected["merged"] = logits_of(vismt.merge(model), inputs)
    about = {"model": kind, "method": method}
    tensors = {key: value.contiguous() for key, value in expected.items()}
    safetensors.torch.save_file(tensors, folder / "expected.safetensors", metadata=about)


@torch.no_grad()
def move(model: nn.Module, within: str) -> None:
    """Add seeded noise to every trainable parameter whose name contains `within`."""
    generator = torch.Generator().manual_seed(6)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and within in name:
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def write_run(name: str, config: dict[str, Any], world: Path) -> Path:
    """Run a configuration in `world`; return its run folder."""
    (world / f"{name}.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "vismt.cli", "run", f"{name}.yaml", "--out", f"runs/{name}", "--quiet"]
    subprocess.run(command, cwd=world, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    (run,) = (world / "runs" / name).iterdir()
    return run


@contextmanager
def current(folder: Path) -> Iterator[None]:
    """Within the block, make `folder` the current folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    main()
