"""Convolutional backbones: the named sets of targets, what is left out, frozen statistics, and memory."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.tiny import shake, snapshot
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vismt
from vismt.base.errors import UserError
from vismt.llm import collect_covariance
from vismt.lowrank.layers.base import adapter_layers
from vismt.testing.method_contract import (
    Case,
    _Check,
    check_adapter_files,
    check_gradient,
    check_merge,
    check_start,
    check_unadapt,
)


class Net(nn.Module):
    """A linear, a convolution, one in groups and a depthwise one before a head; batch norms that see other statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.mixed = nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="circular")
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mlp = nn.Linear(8, 8)
        self.last = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depth(self.mixed(self.norm(self.stem(x)).relu()))
        x = x + self.mlp(x.movedim(1, -1)).movedim(-1, 1)
        return self.head(self.last(x).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def pixels(count: int = 4, seed: int = 1) -> Tensor:
    return 2 * torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(seed)) + 1


@pytest.mark.parametrize(
    "targets,paths",
    [
        (None, ["mlp"]),
        ("all-linear", ["mlp"]),
        ("all-conv", ["stem", "last"]),
        ("all-linear+conv", ["stem", "mlp", "last"]),
        (["mixed", "depth"], ["mixed", "depth"]),
    ],
)
def test_named_sets_take_what_they_name_without_the_head(targets: Any, paths: list[str]) -> None:
    model = net()
    report = vismt.adapt(model, "lora", targets, rank=2)
    assert list(adapter_layers(model)) == paths
    remarks = ["'mixed' and 1 more: convolutions in groups; to adapt them, name them in targets"]
    assert report.skipped == (remarks if isinstance(targets, str) and "conv" in targets else [])


def test_a_model_without_the_named_kind_names_the_other_set() -> None:
    for targets, model, line in (
        (
            "all-linear",
            timm.create_model("test_resnet"),
            "ResNet has no linear layers outside of its head; give adapt.targets=all-conv.",
        ),
        (
            "all-conv",
            nn.Sequential(nn.Linear(4, 4)),
            "Sequential has no nn.Conv2d without groups outside of its head; give adapt.targets=all-linear.",
        ),
    ):
        before = snapshot(model)
        with pytest.raises(UserError) as error:
            vismt.adapt(model, "lora", targets, rank=2)
        assert str(error.value) == f"adapt.targets: {line}" and list(model.state_dict()) == list(before)
    with pytest.raises(UserError, match=r"nothing to adapt for 'all-conv'\. Left out: '0': convolutions in groups"):
        vismt.adapt(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), "lora", "all-conv", rank=2)
    with pytest.raises(UserError, match="nothing to adapt for 'all-conv' after exclude"):
        vismt.adapt(net(), "lora", "all-conv", exclude=["stem", "last"])


@pytest.mark.parametrize("check", [check_start, check_gradient, check_merge, check_unadapt, check_adapter_files])
@pytest.mark.parametrize("method", ["lora", "pissa", "polar", "amt", "corda", "ilora"])
def test_contract(method: str, check: _Check) -> None:
    options: dict[str, Any] = {"ilora": {"n_experts": 2, "gate": None}}.get(method, {})
    if method == "corda":
        options["covariances"] = collect_covariance(net(), [pixels()], "all-linear+conv")
    with vismt.llm.instance_gates(torch.tensor([0.3, 0.7])):
        check(Case(method, {"targets": "all-linear+conv", **options}, net, pixels))


def test_covariances_need_inputs_that_they_can_unfold() -> None:
    for path, module in (("mixed", "Conv2d in groups;"), ("0", "Conv1d;")):
        model = net() if path == "mixed" else nn.Sequential(nn.Conv1d(3, 4, 3))
        with pytest.raises(UserError, match=f"covariance: '{path}' is a {module}"):
            collect_covariance(model, [pixels()], [path])


def test_the_statistics_of_batch_norms_are_frozen_with_the_base(tmp_path: Path) -> None:
    """With statistics that move, the file of an adapter would give another function on a copy of the base."""
    model, x = net(), pixels()
    vismt.adapt(model, "lora", "all-linear+conv", rank=2)
    for step in range(3):
        model.train()(pixels(seed=step))
    shake(model)
    clones = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for same in (model, *clones):
        same.train()(pixels(seed=7))
        assert all(torch.equal(value, dict(net().named_buffers())[name]) for name, value in same.named_buffers())
    trained = model.train()(x)
    assert torch.equal(trained, model.eval()(x)) and model.norm.training is False
    vismt.save_adapter(model, tmp_path)
    assert torch.equal(vismt.load_adapter(net(), tmp_path)(x), trained)
    with vismt.disabled(model.train()):
        assert torch.equal(model(x), net()(x))
    assert torch.allclose(vismt.merge(copy.deepcopy(model)).eval()(x), trained, atol=1e-5)
    vismt.unadapt(model)
    assert model.norm.training and "train" not in vars(model.norm)
    model(x)
    assert not torch.equal(model.norm.running_mean, net().norm.running_mean)


class Storages(TorchDispatchMode):
    """Counts the storages of at least `size` values that operations return."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.kept = size, dict[int, Tensor]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().nbytes() >= 4 * self.size:
            self.kept[out.untyped_storage().data_ptr()] = out
        return out


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_no_second_tensor_of_the_size_of_the_output(layout: torch.memory_format) -> None:
    model = nn.Sequential(nn.Conv2d(2, 32, 3, padding=1)).to(memory_format=layout)
    x = torch.randn(2, 2, 8, 8).to(memory_format=layout)
    vismt.adapt(model, "pissa", "all-conv", rank=2)
    shake(model)
    with Storages(2 * 32 * 8 * 8) as made:
        out = model(x)
    assert len(made.kept) == 1 and out.is_contiguous(memory_format=layout)
    assert torch.allclose(out, vismt.merge(model)(x), atol=1e-5)
    assert torch.allclose(model(x[0]), out[0], atol=1e-5)


def test_a_set_that_leaves_most_of_the_weights_out_says_so() -> None:
    """Weight standardisation has zero mean in each row, so no weight has the sum of a standardised one and an update."""
    model = timm.create_model("test_nfnet", num_classes=0)
    with pytest.warns(
        UserWarning, match=r"'all-linear\+conv' of NormFreeNet adapts only \d % .* ScaledStdConv2d .*more\)"
    ):
        report = vismt.adapt(model, "lora", "all-linear+conv", rank=2)
    assert {spec.path.rpartition(".")[2] for spec in report.specs} == {"fc1", "fc2"}  # of squeeze and excite
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vismt.adapt(timm.create_model("test_nfnet", num_classes=0), "lora", ["attn_last.fc1"], rank=2)
        vismt.adapt(timm.create_model("test_resnet", num_classes=0), "lora", "all-linear+conv", rank=2)
