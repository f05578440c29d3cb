"""Random damage to files that a model is loaded from: values of JSON, tensors, and bytes."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

DEEP: list[Any] = []
for _ in range(60):
    DEEP = [DEEP]
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 5, 10**6, 2**40, 10**30, 10**400, -0.5, 1.5, 1e308, float("nan"), float("-inf"),
    "", "x", "..", "blocks.0.attn.qkv", "head.weight", "os:system", "(a+)+$", "(.*)*x", "(", "(?P<a>.)(?P=a)", "a{99999}",
    [], [0], [1, 2], ["x"], [None], [[1, 2]], {}, {"a": 1}, {"a": {"b": []}}, DEEP,
]  # fmt: skip


def damage_json(content: Any, random: Random) -> Any:
    """Return JSON content with one value replaced, left out, moved, doubled or added somewhere."""
    content = copy.deepcopy(content)
    places: list[tuple[Any, Any]] = []
    todo = [content]
    while todo:
        node = todo.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        places += [(node, key) for key in keys]
        todo += [node[key] for key in keys if isinstance(node[key], (dict, list))]
    if not places or random.random() < 0.02:
        return random.choice(VALUES)
    # The values at the top as often as all those inside.
    shallow = [place for place in places if place[0] is content]
    node, key = random.choice(random.choice([places, shallow]))
    action = random.choice(["replace", "replace", "replace", "delete", "add", "swap"])
    if action == "delete":
        del node[key]
    elif action == "add" and isinstance(node, dict):
        node[random.choice(["use_x", "layer", "grid", "core", "experts", "dim", "x", "sha256"])] = random.choice(VALUES)
    elif action == "add":
        node.append(copy.deepcopy(node[key]))
    elif action == "swap":
        other, place = random.choice(places)
        node[key] = copy.deepcopy(other[place])
    else:
        node[key] = random.choice(VALUES)
    return content


DTYPES = [torch.int64, torch.bool, torch.complex64, torch.float16, torch.float64, torch.uint8, torch.float8_e4m3fn]


def damage_tensors(tensors: dict[str, Tensor], random: Random) -> None:
    """Change one of the tensors: its values, dtype, shape or name; or leave it out, or add another."""
    name = random.choice(sorted(tensors))
    value = tensors[name].clone()
    action = random.choice(["value", "value", "dtype", "shape", "delete", "rename", "add"])
    if action == "value" and value.numel():
        wrong = [float("nan"), float("inf"), -1.0, 1e38, 1e6, 0.0]
        if value.is_floating_point():
            value.view(-1)[random.randrange(value.numel())] = random.choice(wrong)
        else:
            value.view(-1)[random.randrange(value.numel())] = random.choice([-1, 10**6, 0, 2**40])
        tensors[name] = value
    elif action == "dtype":
        tensors[name] = value.to(random.choice(DTYPES))
    elif action == "shape":
        tensors[name] = (
            random.choice([value.flatten(), value[None], value[:0], torch.tensor(1.0), torch.zeros(3, 5)])
            if (value.ndim)
            else torch.zeros(2)
        )
    elif action == "rename":
        tensors[random.choice(["x", f"{name}.x", name.replace("0", "7")])] = tensors.pop(name)
    elif action == "add":
        tensors[random.choice(["x", "head.weight", "blocks.0.attn.qkv.weight"])] = torch.zeros(2)
    else:
        del tensors[name]


def damage_bytes(path: Path, random: Random) -> None:
    """Cut a file, turn one of its bits, replace it by other bytes or by a folder, or remove it."""
    data = bytearray(path.read_bytes())
    action = random.choice(["cut", "bit", "bit", "bit", "noise", "folder", "remove"])
    if action == "cut":
        path.write_bytes(data[: random.randrange(len(data))])
    elif action == "bit":
        data[random.randrange(len(data))] ^= 1 << random.randrange(8)
        path.write_bytes(data)
    elif action == "noise":
        path.write_bytes(random.randbytes(random.choice([0, 7, 64])))
    else:
        path.unlink()
        if action == "folder":
            path.mkdir()


def copied(folder: Path, target: Path) -> Path:
    """Return a copy of a folder in the place of an earlier one."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    return target
