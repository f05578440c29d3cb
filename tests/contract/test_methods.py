"""What every registered method promises, by the checks of vismt.testing. A new method is covered by being registered."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.tiny import images, shake, tiny_vit
from torch import nn

import vismt
from vismt.llm import collect_covariance, instance_gates
from vismt.llm.s2ft.layer import SliceLinear
from vismt.lowrank.layers.base import adapter_layers
from vismt.methods import METHODS as DECLARED
from vismt.testing.method_contract import (
    CHECKS,
    CONTRACT_LAYOUTS,
    Case,
    _Check,
    applies,
    check_adapter_files,
    check_checkpointing,
    check_export,
    check_merge,
    check_start,
)

METHODS = [name for name, method in DECLARED.items() if method.exports]
LAYERS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "patch_embed.proj"]
# What a method needs on the tiny ViT to start at the original function, and its trainable parameters beside pairs of
# factors on the ViT-S of the meta test (a router: 12 x 16 x 384; a core for each of q, k, v, proj, fc1, fc2; a gate).
OWN = {
    "emtal": {"n_experts": 4, "init": "zero"},
    "s2ft": {"ratio": 0.25},
    "ilora": {"n_experts": 2, "gate": None},
    "corda": {"mode": "kpm", "covariances": collect_covariance(tiny_vit(), [images()], LAYERS)},
}
BESIDE = {"emtal": 12 * 16 * 384, "ilora": 64 * 4 + 4, "polar": 12 * 6 * 8 * 8}
VARIANTS = dict(CONTRACT_LAYOUTS)
# A method that trains no factors has layouts of its own.
SLICES = {
    "columns": {},
    "every_part": {"parts": ["v", "o", "u", "d"]},
    "rows": {"parts": ["v", "u"]},
    "slices_with_head": {"also_train": ["head"]},
}
VARIANTS_OF = {name: list(SLICES) for name in METHODS if SliceLinear in DECLARED[name].layers}
CASES = [(method, variant) for method in METHODS for variant in VARIANTS_OF.get(method, list(VARIANTS))]
# What tracing can tell apart, which is slow: everything at once of every method, and the layers of one as they are.
VARIANTS |= SLICES | {
    "together": {**VARIANTS["rslora"], **VARIANTS["split_qkv"], **VARIANTS["with_head"], **VARIANTS["conv"]}
}
GRAPHS = [(method, variant) for method in METHODS for variant in VARIANTS_OF.get(method, ["together"])]
GRAPHS += [("lora", "plain")]
FACTOR_METHODS = [method for method in METHODS if method not in VARIANTS_OF]


@pytest.fixture(autouse=True)
def gates() -> Iterator[None]:
    """One user's gates, which a method with gates needs in every call; the others do not look at them."""
    with instance_gates(torch.tensor([0.3, 0.7])):
        yield


def case_of(method: str, variant: str) -> Case:
    return Case(method, {**OWN.get(method, {}), **VARIANTS[variant]}, tiny_vit)


def adapted(method: str, variant: str, seed: int = 0, depth: int = 2) -> nn.Module:
    return case_of(method, variant).adapted(seed=seed, depth=depth)


def shows(check: _Check, variant: str) -> bool:
    """Return whether a variant can break a check where the others keep it."""
    if variant in ("alpha", "rslora"):  # another scale, no other tensors
        return check in (check_start, check_merge, check_adapter_files, check_export)
    return check is not check_checkpointing or variant in ("split_qkv", *SLICES)


PROMISES = [
    (method, variant, check)
    for method, variant in CASES
    for check in CHECKS
    if applies(check, DECLARED[method], variant) and shows(check, variant)
]


@pytest.mark.parametrize("method,variant,check", PROMISES)
def test_contract(method: str, variant: str, check: _Check) -> None:
    check(case_of(method, variant))


@pytest.mark.parametrize("method", [name for name, method in DECLARED.items() if not method.layers])
def test_contract_of_methods_that_train_the_weights_themselves(method: str) -> None:
    checks = [check for check in CHECKS if applies(check, DECLARED[method], "plain")]
    assert check_merge in checks and check_adapter_files in checks and check_export not in checks
    for check in checks:
        check(Case(method, {"active": 1} if method == "lisa" else {}, tiny_vit))


@pytest.mark.slow
@pytest.mark.parametrize("method,variant", GRAPHS)
def test_one_graph_without_branches(method: str, variant: str) -> None:
    torch.compiler.reset()
    model = shake(adapted(method, variant, depth=1))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(images()), model(images()), atol=1e-5)
    compiled(images()).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", FACTOR_METHODS)
def test_meta_device_counts_parameters_without_memory(method: str) -> None:
    with torch.device("meta"):
        import timm

        model = timm.create_model("vit_small_patch16_224", num_classes=0)
    report = vismt.adapt(model, method, rank=8, split_qkv=True)
    # Per block and d = 384: q, k, v 3 (r d + r d) = 6 r d; proj 2 r d; fc1 r d + 4 r d = 5 r d; fc2 5 r d: 18 r d; 12 blocks.
    assert report.trainable - BESIDE.get(method, 0) == 216 * 8 * 384 == 663_552
    assert all(layer.lora_A.is_meta for layer in adapter_layers(model).values())
