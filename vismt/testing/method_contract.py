"""What `vismt.adapt` promises of every method, as checks on a small ViT.

The same checks test vismt's own methods (tests/contract/test_methods.py). A check that fails raises AssertionError and says
what it saw.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vismt
from vismt.base.registry import import_own
from vismt.lowrank.layers.base import AdapterLayer, adapter_layers
from vismt.lowrank.layers.low_rank import LowRankLayer
from vismt.lowrank.model.record import count_parameters, need_record
from vismt.methods import METHODS, Method, known_method

# Options that change the layout of factors; a method with low-rank layers keeps the contract under each.
CONTRACT_LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha": {"alpha": 12.0},
    "rslora": {"alpha": 3.0, "rslora": True},
    "split_qkv": {"split_qkv": True},
    "with_head": {"also_train": ["head"]},
    "conv": {"targets": ["attn.qkv", "patch_embed.proj"]},
}


def check_method(method: str, *, module: str | None = None, **options: object) -> None:
    """Check what `vismt.adapt` promises of every method, on a ViT with random weights.

    Call it in a test of a method that you write. It checks these promises:

    - The model starts as the original function.
    - A gradient reaches the parameters of the method, without those in `Method.frozen`, and no other parameters.
    - Merging keeps the function. Removing the adapter gives the weights back bit for bit.
    - Adapter files, peft, copies, pickles, bf16 and gradient checkpointing keep the function.
    - The start values follow from the seed.

    A method with low-rank layers is checked for several layouts of the factors (alpha, rslora, split_qkv, also_train,
    convolutions). Merging and the export are checked if the method declares them. A method without layers trains the weights
    themselves, and merging must then change nothing.

    Args:
        method: Registered name of the method.
        module: Python module that registers the method. It is imported first.
        options: Options of the method with which the model starts as the original function.

    Raises:
        AssertionError: A promise does not hold. The message names every such promise and what was seen.
        UserError: The method or an option is unknown.

    Example:
        >>> def test_orthogonal():
        ...     vismt.testing.check_method("orthogonal", module="mine")
    """
    if module is not None:
        import_own(module, "check_method")
    declared = known_method(method, options)
    low_rank = any(issubclass(layer, LowRankLayer) for layer in declared.layers)
    broken: dict[str, list[str]] = {}
    for layout, more in CONTRACT_LAYOUTS.items() if low_rank else [("plain", CONTRACT_LAYOUTS["plain"])]:
        case = Case(method, {**more, **options})
        for check in CHECKS:
            if not applies(check, declared, layout):
                continue
            try:
                check(case)
            except Exception as error:  # of any kind: the method's code is not known
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                broken.setdefault(f"{check.__name__}: {kind}{error}", []).append(layout)
    if broken:
        lines = [f"  {reason} [{', '.join(layouts)}]" for reason, layouts in broken.items()]
        raise AssertionError("\n".join([f"'{method}' breaks the contract of vismt.adapt:", *lines]))


def small_vit(seed: int = 0, num_classes: int = 5, **options: Any) -> nn.Module:
    """Return a timm ViT of random weights with 2 blocks of width 32, for images of 16 x 16 pixels in 4 x 4 patches."""
    import timm

    torch.manual_seed(seed)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": num_classes}
    return timm.create_model("vit_tiny_patch16_224", **{**shape, **options}).eval()


def images(count: int = 3, size: int = 16, seed: int = 1) -> Tensor:
    """Return random images, float32 (count, 3, size, size) in [0, 1]."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def shake(model: nn.Module, scale: float = 0.05, seed: int = 2) -> nn.Module:
    """Add noise to every trainable parameter, as training would, and return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_(scale * noise.to(parameter))
    return model


def faded(model: nn.Module) -> nn.Module:
    """Return the model as the schedule of its method leaves it, which is the state that merges and exports."""
    for module in model.modules():
        if hasattr(module, "fade"):
            setattr(module, "fade", 1.0)  # noqa: B010  # a plain attribute, which nn.Module types as a Tensor
    return model


@dataclass(frozen=True)
class Case:
    """A method with options.

    Attributes:
        make: Function that returns the stock model, given options of `small_vit`.
        inputs: Function that returns a batch for the model.
    """

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[..., nn.Module] = small_vit
    inputs: Callable[[], Tensor] = images

    def adapted(self, seed: int = 0, dtype: torch.dtype = torch.float32, **shape: object) -> nn.Module:
        """Return the stock model adapted by the method."""
        model = self.make(**shape).to(dtype)
        rank = {} if "rank" in METHODS[self.method].unread else {"rank": 2}
        vismt.adapt(model, self.method, **{**rank, "seed": seed, **self.options})
        return model

    def trained(self, **more: Any) -> nn.Module:
        """Return the adapted model with other values in every trained parameter."""
        return shake(self.adapted(**more))


_Check = Callable[[Case], None]


def check_start(case: Case) -> None:
    """The adapted model is the original function at its start."""
    wanted = case.make()(case.inputs())
    tolerance = 5e-6 * max(1.0, float(wanted.detach().abs().max()))
    _need_near("the adapted model starts", faded(case.adapted())(case.inputs()), wanted, tolerance)


def check_gradient(case: Case) -> None:
    """A gradient reaches the parameters that the method added and does not freeze, also_train, and no other parameters."""
    model = case.trained()
    model(case.inputs()).square().sum().backward()
    stock = set(case.make().state_dict())
    trained = set(need_record(model, "check_method").also_train)
    for name, parameter in model.named_parameters():
        frozen = name.rpartition(".")[2] in METHODS[case.method].frozen
        expected = name in trained or (name not in stock and not frozen)
        _need(parameter.requires_grad == expected, f"{name} has requires_grad = {parameter.requires_grad}")
        reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        _need(reached == expected, f"{name} {'gets no' if expected else 'gets a'} gradient")


def check_merge(case: Case) -> None:
    """Merging keeps the function, in the classes and names of the stock model."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        model = faded(case.trained(dtype=dtype))
        x = case.inputs().to(dtype)
        before, values = model(x), {name: value.clone() for name, value in model.state_dict().items()}
        vismt.merge(model)
        if not METHODS[case.method].layers:  # all is in the weights
            changed = [name for name, value in model.state_dict().items() if not torch.equal(value, values[name])]
            _need(not changed, f"merging changes {', '.join(changed)}")
        _need_near(f"merged in {dtype}", model(x), before, tolerance * float(before.detach().abs().max()))
        fresh = case.make().to(dtype)
        fresh.load_state_dict(model.state_dict(), strict=True)
        _need([type(m) for m in fresh.modules()] == [type(m) for m in model.modules()], "merged classes are not stock")
        _need(all(p.requires_grad for p in model.parameters()), "merged parameters do not require a gradient again")


def check_unadapt(case: Case) -> None:
    """The update changes the function and writes into no frozen weight, and `unadapt` gives back every bit."""
    model, original = case.trained(), case.make()
    same = torch.equal(model(case.inputs()), original(case.inputs()))
    _need(not same, "the trained update does not change the function")
    frozen = {name: value for name, value in model.named_parameters() if not value.requires_grad}
    written = [n for n, value in original.named_parameters() if n in frozen and not torch.equal(frozen[n], value)]
    _need(not written, f"the update is written into {', '.join(written)}")
    vismt.unadapt(model)
    state, wanted = model.state_dict(), original.state_dict()
    _need(list(state) == list(wanted), "the state dict has other names after unadapt")
    changed = [name for name, value in wanted.items() if not torch.equal(state[name], value)]
    _need(not changed, f"unadapt does not restore {', '.join(changed)}")
    _need(not any(isinstance(module, AdapterLayer) for module in model.modules()), "unadapt leaves adapter layers")


def check_adapter_files(case: Case) -> None:
    """An adapter file gives the same outputs on a stock model and on a model that was adapted with another seed."""
    model = case.trained()
    with tempfile.TemporaryDirectory() as folder:
        vismt.save_adapter(model, folder)
        for fresh in (case.make(), case.adapted(seed=5)):
            vismt.load_adapter(fresh, folder)
            flags = [value.requires_grad for value in fresh.parameters()]
            _need(
                flags == [value.requires_grad for value in model.parameters()], "loaded, other parameters are trained"
            )
            _need_near("loaded from its file", fresh(case.inputs()), model(case.inputs()), 0)


def check_export(case: Case) -> None:
    """Peft, where it is installed, and `import_peft` read the export."""
    peft = importlib.import_module("peft") if importlib.util.find_spec("peft") else None
    model = faded(case.trained())
    expected = model(case.inputs())
    with tempfile.TemporaryDirectory() as folder:
        for compact in (False, True):
            place = Path(folder) / str(compact)
            vismt.export_peft(model, place, compact=compact)
            if peft is not None:
                theirs = peft.PeftModel.from_pretrained(case.make(), str(place)).eval()
                _need_near("loaded by peft", theirs(case.inputs()), expected, 1e-5)
            _need_near("import_peft", vismt.import_peft(case.make(), place)(case.inputs()), expected, 1e-5)


def check_copies(case: Case) -> None:
    """Copies, pickles, other types and state dicts have the same outputs, and copies share nothing."""
    model = case.trained()
    expected = model(case.inputs())
    clone = copy.deepcopy(model)
    _need_near("copied", clone(case.inputs()), expected, 0)
    _need_near("pickled", pickle.loads(pickle.dumps(model))(case.inputs()), expected, 0)
    shake(clone)
    _need_near("after a copy was changed", model(case.inputs()), expected, 0)
    double = copy.deepcopy(model).to(torch.float64)
    _need_near("in float64", double(case.inputs().double()).float(), expected, 1e-5)
    half = copy.deepcopy(model).to(torch.bfloat16)
    _need(bool(torch.isfinite(half(case.inputs().to(torch.bfloat16))).all()), "outputs in bfloat16 are not finite")
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    fresh = case.adapted(seed=7)
    fresh.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    _need_near("from its state dict", fresh(case.inputs()), expected, 0)


def check_autocast(case: Case) -> None:
    """Under autocast the model computes in bf16 and its gradients are fp32."""
    model = case.trained()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(case.inputs())
    _need(out.dtype == torch.bfloat16, f"outputs under autocast are {out.dtype}")
    wanted = model(case.inputs())
    _need_near("under autocast", out.float(), wanted, 0.1 * float(wanted.detach().abs().max()))
    out.float().square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            good = grad is not None and grad.dtype == torch.float32 and bool(torch.isfinite(grad).all())
            _need(good, f"{name} has no finite float32 gradient under autocast")


def check_checkpointing(case: Case) -> None:
    """Gradient checkpointing does not change gradients."""
    plain, saving = case.trained(), case.trained()
    enable: Any = saving.set_grad_checkpointing
    enable(True)
    for model in (plain, saving):
        model.train()
        model(case.inputs()).square().sum().backward()
    for (name, parameter), twin in zip(plain.named_parameters(), saving.parameters()):
        if parameter.grad is not None:
            _need(twin.grad is not None, f"{name} has no gradient under checkpointing")
            _need_near(f"the gradient of {name} under checkpointing", twin.grad, parameter.grad, 1e-6)


def check_seed(case: Case) -> None:
    """Start values follow from the seed and the module's path alone, and no global random state is used."""
    torch.manual_seed(11)
    first = _start_values(case.adapted(seed=3))
    torch.manual_seed(12)
    model = case.make()
    before = torch.get_rng_state()
    vismt.adapt(model, case.method, **{"rank": 2, "seed": 3, **case.options})
    _need(torch.equal(torch.get_rng_state(), before), "adapt changes torch's random state")
    again = _start_values(model)
    fewer = _start_values(Case(case.method, {**case.options, "targets": ["mlp.fc2"]}, case.make).adapted(seed=3))
    for name, value in again.items():
        _need(torch.equal(value, first[name]), f"{name} starts otherwise with the same seed")
        _need(name not in fewer or torch.equal(value, fewer[name]), f"{name} starts otherwise with fewer targets")


def check_meta(case: Case) -> None:
    """On the meta device the adaptation counts parameters without memory."""
    with torch.device("meta"):
        model = case.make()
    vismt.adapt(model, case.method, **{"rank": 2, **case.options})
    layers = adapter_layers(model).values()
    _need(all(value.is_meta for layer in layers for value in layer.tensors().values()), "values lie outside of meta")
    counted, wanted = count_parameters(model), count_parameters(case.adapted())
    _need(counted == wanted, f"(trainable, all) parameters are {counted} on meta and {wanted} elsewhere")


FACTORED: tuple[_Check, ...] = (check_seed, check_meta)  # of methods with low-rank layers, in the plain layout
CHECKS: tuple[_Check, ...] = (
    check_start,
    check_gradient,
    check_merge,
    check_unadapt,
    check_adapter_files,
    check_export,
    check_copies,
    check_autocast,
    check_checkpointing,
    *FACTORED,
)


def applies(check: _Check, method: Method, layout: str) -> bool:
    """Return whether a check applies to a method in a layout."""
    if check in FACTORED:
        return layout == "plain" and any(issubclass(layer, LowRankLayer) for layer in method.layers)
    if check is check_merge:
        return method.merges
    return method.exports if check is check_export else True


def _start_values(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the tensors of all adapter layers, by name."""
    layers = adapter_layers(model).items()
    return {f"{path}.{name}": v.detach().clone() for path, layer in layers for name, v in layer.tensors().items()}


def _need(holds: bool, text: str) -> None:
    if not holds:
        raise AssertionError(text)


def _need_near(what: str, seen: Any, wanted: Tensor, tolerance: float) -> None:
    difference = float((seen.detach() - wanted.detach()).abs().max())
    _need(difference <= tolerance, f"{what}: differs by {difference:.2g}; at most {tolerance:.2g} is allowed")
