"""Pairs for each expert: the loop over experts, equal parameters, merging, files and errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from helpers.tiny import images, shake, tiny_vit
from torch import Tensor, nn

import vismt
from vismt import UserError
from vismt.lowrank.model.record import count_parameters
from vismt.multitask.emtal.expert_pairs import ExpertPairs


def adapted(**options: object) -> nn.Module:
    """Return a ViT with 16 clustered experts of 8 units with a pair of rank 1 each, in fp64."""
    model = tiny_vit().double()
    vismt.adapt(model, "emtal", rank=4, n_experts=16, pairs="expert", **options)
    return shake(model, 0.1)


def by_hand(mlp: nn.Module, x: Tensor) -> Tensor:
    """Compute equations 6, 7 and 9 as a sum over the experts, each with its own pairs."""
    fc1, fc2, experts = mlp.fc1, mlp.fc2, 16
    shares = (x @ mlp.lora_router.weight.T / mlp.temperature).softmax(-1)
    y = fc2.bias.expand(*x.shape[:-1], -1)
    for i in range(experts):
        units = mlp.labels == i
        omega = ((1 - mlp.fade_value) * experts * shares[..., i] + mlp.fade_value)[..., None]
        up = fc1.weight[units] + fc1.lora_B[units] @ fc1.lora_A[i : i + 1]
        down = fc2.weight[:, units] + fc2.lora_B[:, i : i + 1] @ fc2.lora_A[:, units]
        y = y + nn.functional.gelu((x @ up.T + fc1.bias[units]) * omega) @ down.T
    return y


@pytest.mark.parametrize("fade", [0.0, 0.5, 1.0])
def test_forward_and_gradients_are_the_loop_over_experts(fade: float) -> None:
    mlp = adapted(fade=fade).blocks[1].mlp
    assert not torch.equal(mlp.labels, mlp.labels.sort().values)
    assert torch.equal(mlp.fc1.expert, mlp.labels) and torch.equal(mlp.fc2.expert, mlp.labels)
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    trained = [x, *(parameter for parameter in mlp.parameters() if parameter.requires_grad)]
    ours, theirs = mlp(x), by_hand(mlp, x)
    assert (ours - theirs).abs().max() < 1e-12
    pull = torch.randn_like(ours)
    for got, wanted in zip(*(torch.autograd.grad(y, trained, pull, allow_unused=True) for y in (ours, theirs))):
        assert (got - (0 if wanted is None else wanted)).abs().max() < 1e-12


def test_parameters_are_those_of_the_shared_pair_and_of_the_paper_in_the_literal_form() -> None:
    shared, own = tiny_vit(), tiny_vit()
    for model, pairs in ((shared, "shared"), (own, "expert")):
        vismt.adapt(model, "emtal", rank=4, n_experts=16, pairs=pairs, cluster=False)
    assert count_parameters(shared)[0] == count_parameters(own)[0]
    with torch.device("meta"):
        base = timm.create_model("vit_base_patch16_224", num_classes=598)
    ranks = {"fc1": 16, "fc2": 16}  # of a shared pair; rank 4 for each of 16 experts
    report = vismt.adapt(base, "emtal", rank=4, rank_pattern=ranks, n_experts=16, pairs="expert")
    assert report.trainable + 598 * 769 == 2_303_062 and "16 x 4" in str(report)


def test_the_update_of_a_faded_router_merges_with_a_larger_rank() -> None:
    model, x = adapted(fade=1.0), images().double()
    before, stock = model(x), tiny_vit().double().blocks[0].mlp.fc1.weight
    vismt.merge(model)
    assert (model(x) - before).abs().max() < 1e-10 and type(model.blocks[0].mlp.fc1) is nn.Linear
    assert torch.linalg.matrix_rank(model.blocks[0].mlp.fc1.weight - stock, rtol=1e-9) == 16


@pytest.mark.slow
def test_a_saved_adapter_is_the_same_function_in_another_process(tmp_path) -> None:
    model, x = adapted(fade=1.0), images().double()
    vismt.save_adapter(model, tmp_path / "own")
    again = tiny_vit().double()
    vismt.load_adapter(again, tmp_path / "own")
    assert torch.equal(again(x), model(x))
    vismt.export_peft(model, tmp_path / "peft")
    imported = tiny_vit().double()
    vismt.import_peft(imported, tmp_path / "peft")
    assert (imported(x) - model(x)).abs().max() < 1e-8  # the file is fp32
    code = (
        "import sys; sys.path.insert(0, 'tests'); from helpers.tiny import tiny_vit; import vismt; "
        f"vismt.load_adapter(tiny_vit().double(), {str(tmp_path / 'own')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)  # where nothing has imported the layer


def test_what_is_refused(tmp_path) -> None:
    for options, words in (
        ({"rank": 3, "n_experts": 16}, "give each of 16 experts a rank of 0.75, needed a whole number"),
        ({"rank": 4, "n_experts": 16, "pairs": "experts"}, "pairs 'experts'. Near: 'expert'"),
    ):
        with pytest.raises(UserError) as caught:
            vismt.adapt(tiny_vit(), "emtal", **{"pairs": "expert", **options})
        assert words in str(caught.value)
    model = adapted()
    first = next(module for module in model.modules() if isinstance(module, ExpertPairs))
    first.expert[0] = first.expert[-1]
    vismt.save_adapter(model, tmp_path)
    with pytest.raises(UserError, match=r"expert: it must be int64 and give each of 16 experts as many units"):
        vismt.load_adapter(tiny_vit().double(), tmp_path)
