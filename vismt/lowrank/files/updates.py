"""Low-rank updates apart from a model: read from a folder or an adapted model, and put on a stock model as method "lora".

An update is the difference to the stock weight, scale B A. It includes a start that is kept (PiSSA, CorDA: rank 2r, [A; A0] and
[B, -B0]), cores (PoLAR), blocks (split_qkv) and the gates of one user (iLoRA, inside `instance_gates`). Updates without such a
form are refused: a router that still routes (EMTAL), slices and whole layers (S2FT, LISA).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor, nn

from vismt.base.errors import UserError
from vismt.lowrank.factors import LowRank
from vismt.lowrank.files.description import DESCRIPTION, check_tensors, layer_shapes, read_adapter
from vismt.lowrank.files.peft_adapter import PeftAdapter, read_peft, stacks_on
from vismt.lowrank.files.peft_settings import PEFT_CONFIG
from vismt.lowrank.files.save_load import base_samples, fill_adapter, other_base, same_base
from vismt.lowrank.layers.base import LayerSpec, adapter_layers, spec_of
from vismt.lowrank.layers.low_rank import LowRankLayer, LowRankSettings
from vismt.lowrank.layers.stock_modules import matrix_shape
from vismt.lowrank.model.inject import install, undone_on_error
from vismt.lowrank.model.modules import check_mergeable
from vismt.lowrank.model.named import new_adapter
from vismt.lowrank.model.record import need_record, refuse_adapted, refuse_offloaded
from vismt.lowrank.model.targets import candidates, target_refusals
from vismt.lowrank.tensors import check_parameter


@dataclass(frozen=True)
class Updates:
    """The updates of one adapter, on the CPU.

    low_rank: Updates by module path. The update of a convolution has the shape of its weight as a matrix (o, c*kh*kw).
    also_train: Parameters that were trained whole, by name. base: Some values of the base weights (`save_load.base_samples`).
    Empty if they are not known. peft: Folders that peft wrote, if the updates come from such folders. Their settings have to be
    compared with a model. name: Name of the adapter in messages.
    """

    low_rank: dict[str, LowRank]
    also_train: dict[str, Tensor] = field(default_factory=dict)
    base: dict[str, list[float]] = field(default_factory=dict)
    peft: tuple[PeftAdapter, ...] = ()
    name: str = "updates"

    def put_on(self, model: nn.Module, *, name: str = "default", on_other_base: str = "error") -> nn.Module:
        """Adapt a model with these factors, as method "lora". They become the active adapter.

        Args:
            model: Stock model, changed in place. The factors get the weight's dtype, or fp32 if the weight is bf16 or fp16.
            name: Name of the adapter on this model.
            on_other_base: What to do if the base differs, see `load_adapter`.

        Returns:
            The model.

        Raises:
            UserError: If a path, a shape or the base does not fit the model. Nothing is changed then.
        """
        with new_adapter(model, name, self.name):
            return put_on(model, self, on_other_base=on_other_base)


def of_peft(adapter: PeftAdapter) -> Updates:
    """Return the updates of a folder that peft wrote."""
    return Updates(adapter.low_rank, adapter.extras, peft=(adapter,), name=adapter.what)


def put_on(
    model: nn.Module,
    updates: Updates,
    options: Mapping[str, object] | None = None,
    starts: Mapping[str, Tensor] | None = None,
    *,
    on_other_base: str = "error",
) -> nn.Module:
    """Put updates on a model, see `Updates.put_on`.

    options: Options of the record. starts: Factors that are subtracted, by adapter key.
    """
    what = updates.name
    specs: list[LayerSpec] = []
    tensors: dict[str, Tensor] = {}
    refuse_adapted(model, what)
    also_train = updates.also_train
    for adapter in updates.peft:
        adapter.need_the_same_modules(model)
        parameters_of_file = adapter.kept(model)  # its checks are made in any case
        also_train = parameters_of_file if also_train else {}
    modules = candidates(model)
    for path, update in updates.low_rank.items():
        if path not in modules:
            raise UserError(f"{what}: {type(model).__name__} has no linear or convolution '{path}'.")
        shape = matrix_shape(modules[path])
        if update.shape != shape:
            raise UserError(f"{what}: '{path}': the update is for a {update.shape} weight, here it is {shape}.")
        plain = update.plain()
        settings = LowRankSettings(plain.rank, plain.scale, (shape[0],))
        specs.append(spec_of(path, modules[path], LowRankLayer, settings))
        tensors |= {f"{path}.lora_A": plain.A, f"{path}.lora_B": plain.B}
    for adapter in updates.peft:
        for path, (settings, A, B) in stacks_on(adapter, model).items():
            specs.append(spec_of(path, modules[path], LowRankLayer, settings))
            tensors |= {f"{path}.lora_A": A, f"{path}.lora_B": B}
    # As in peft, the dropout of a file does not reach weights that are read without a call of their layer.
    for reason in target_refusals(model, [spec.path for spec in specs], prequantized=True, readable=True).values():
        raise UserError(f"{what}: {reason}.")
    _check_parameters(what, model, also_train)
    samples = base_samples(model, [path for path in updates.base if path in modules])
    if not same_base(samples, updates.base):
        other_base(f"{what}: made for other weights than this {type(model).__name__} has", on_other_base)
    refuse_offloaded(model, what, whole=True)
    install(model, "lora", specs, dict(options or {}), list(also_train))
    with undone_on_error(model):
        fill_adapter(model, {**tensors, **also_train, **(starts or {})}, what)
    return model


def _check_parameters(what: str, model: nn.Module, values: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for name, value in values.items():
        if name not in parameters:
            raise UserError(f"{what}: {type(model).__name__} has no parameter '{name}'.")
        if value.shape != parameters[name].shape:
            raise UserError(f"{what}: {name}: saved {tuple(value.shape)}, needed {tuple(parameters[name].shape)}.")
        check_parameter(f"{what}: {name}", value, parameters[name])


def read_updates(
    source: Updates | nn.Module | str | Path, *, also_train: bool = True, what: str = "updates"
) -> Updates:
    """Return copies of the updates of an adapted model, or of a folder that save_adapter, export_peft or peft wrote.

    also_train: Whether to include parameters that were trained whole (a head). what: Start of error messages.

    Raise UserError if an update is not of low rank (see the header), or a file is damaged.
    """
    if isinstance(source, Updates):
        updates = source
    elif isinstance(source, nn.Module):
        updates = _of_model(source, what)
    elif isinstance(source, str | Path):
        updates = _of_folder(Path(source), what)
    else:
        raise UserError(f"{what}: {type(source).__name__} is not an adapter; give a folder or an adapted model.")
    return updates if also_train else replace(updates, also_train={})


def _of_model(model: nn.Module, what: str) -> Updates:
    record = need_record(model, what)
    name = f"{what}: '{record.method}' of {type(model).__name__}"
    check_combinable(name, record.method, record.layers)
    check_mergeable(model, what)
    layers = adapter_layers(model)
    if any(layer.weight.is_meta for layer in layers.values()):
        raise UserError(f"{name}: the model is on the meta device, which holds no values.")
    moved = {path: layer.low_rank().to(device="cpu") for path, layer in layers.items()}
    updates = {path: replace(update, B=update.B.clone(), A=update.A.clone()) for path, update in moved.items()}
    samples = base_samples(model, updates)
    also_train = {key: model.get_parameter(key).detach().cpu().clone() for key in record.also_train}
    return Updates(updates, also_train, samples, name=name)


def _of_folder(folder: Path, what: str) -> Updates:
    if (folder / PEFT_CONFIG).exists() and not (folder / DESCRIPTION).exists():
        adapter = read_peft(folder)
        if adapter.replay:
            raise UserError(
                f"{what}: {adapter.what}: init_lora_weights 'pissa' changed the base it was trained on; import_peft it on "
                "that base and give the model."
            )
        if adapter.stacks:
            raise UserError(
                f"{what}: {adapter.what}: it adapts experts in one parameter, whose number the file does not hold; import_peft "
                "it on its base and give the model."
            )
        return of_peft(adapter)
    if not (folder / DESCRIPTION).exists():
        raise UserError(f"{what}: '{folder}' is not an adapter folder; it has neither {DESCRIPTION} nor {PEFT_CONFIG}.")
    description, specs, tensors = read_adapter(folder)
    name = f"{what}: adapter '{folder}'"
    layers, others = ([spec for spec in specs if spec.has_weight is has] for has in (True, False))
    check_combinable(name, description.method, layers)
    for spec in others:
        prefix = f"{spec.path}."
        values = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        spec.layer.check_mergeable_saved(name, spec.path, values)
    needed = layer_shapes(layers, tensors)
    also_train = {key: value for key, value in tensors.items() if key in description.also_train}
    wrapped = tuple(f"{spec.path}." for spec in others)
    rest = {key: value for key, value in tensors.items() if key not in also_train}
    factors = {key: value for key, value in rest.items() if key in needed or not key.startswith(wrapped)}
    check_tensors(name, needed, factors)
    below: dict[str, dict[str, Tensor]] = {}  # by module, then by name
    for key, value in factors.items():
        path, _, leaf = key.rpartition(".")
        below.setdefault(path, {})[leaf] = value
    updates = {spec.path: spec.layer.low_rank_of(what, spec, below.get(spec.path, {})) for spec in layers}
    return Updates(updates, also_train, description.base_samples, name=name)


def check_combinable(what: str, method: str, specs: Iterable[LayerSpec]) -> None:
    """Raise UserError for updates that are not pairs of factors against the original weights."""
    specs = list(specs)
    if not specs:
        raise UserError(f"{what}: '{method}' has no low-rank factors; merge the model and save it whole.")
    for spec in specs:
        if spec.layer.combine_refusal:
            raise UserError(f"{what}: '{method}' {spec.layer.combine_refusal}.")
