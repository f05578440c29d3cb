"""Logits of the weights that `vismt merge RUN` writes; the tests compare them with those of an earlier version."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
import timm
import torch
from golden.inputs import ROOM, SIDE, golden_input, logits_of
from torch import Tensor

from vismt.cli import main

# Values of `vismt merge --arm` by run; None leaves the option out. The other runs cannot be merged: gates of many users do not
# fit into a weight, and weights trained by MAML change for every task.
ARMS: dict[str, list[str | None]] = {
    "fewshot_single": [None],
    "fewshot_pool": ["4", "average"],
    "multitask": ["lora", "emtal:1"],
    "multitask_tuned": [None],
    "dense": ["lora:1"],
    "lm": ["lora", "polar-vbll:1"],
}


def merged_logits(run: Path, arm: str | None) -> Tensor:
    """Merge a model of a run through the command line; return its logits on a golden input."""
    options = [] if arm is None else ["--arm", arm]
    assert main(["merge", str(run), *options, "--quiet"]) == 0
    merged = next(run.glob(f"merged-{(arm or '*').partition(':')[0]}-seed-*"))
    state = safetensors.torch.load_file(merged / "model.safetensors")
    if "patch_embed.proj.weight" not in state:
        import transformers

        return logits_of(transformers.AutoModelForCausalLM.from_pretrained(merged), golden_input("llama"))
    patches = state["pos_embed"].shape[1] - len(state.get("cls_token", []))
    size = (SIDE, SIDE) if patches * 16**2 == SIDE**2 else ROOM
    classes = len(state.get("head.bias", []))
    model = timm.create_model("test_vit", img_size=size, num_classes=classes)
    model.load_state_dict(state, strict=True)
    return logits_of(model, torch.arange(6 * size[0] * size[1]).remainder(251).div(251).view(2, 3, *size))
