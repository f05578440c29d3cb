"""Write the table of docs/methods/backbones.md: what runs on each family of timm's models, found out on a tiny random one.

    python -m scripts.backbones            takes some minutes

A method is listed where the contract of vismt.testing holds: the function at the start, which parameters get a gradient, merged
equals unmerged. Methods of UNITS may refuse a family by a UserError; any other error is a defect. A job is listed where its net
runs with an adapter and learns; few-shot and dense runs build models without classes, as here.
"""

from __future__ import annotations

import argparse
import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import timm
import torch
from torch import Tensor, nn

import vismt
from vismt.backbones.pyramid import Pyramid
from vismt.backbones.timm_models import as_backbone
from vismt.backbones.vit import Backbone
from vismt.base import console
from vismt.base.errors import UserError
from vismt.llm import collect_covariance, instance_gates
from vismt.metatune.protonet import cosine_logits, prototypes
from vismt.methods import METHODS
from vismt.multitask import task_features
from vismt.multitask.heads import MAP_HEADS
from vismt.multitask.nets import default_blocks
from vismt.robustness import classifier_of
from vismt.storage.files import atomic_write
from vismt.storage.paths import CHECKOUT
from vismt.testing.method_contract import (
    Case,
    _Check,
    applies,
    check_adapter_files,
    check_gradient,
    check_merge,
    check_start,
    check_unadapt,
    shake,
)

PAGE = CHECKOUT / "docs/methods/backbones.md"
TABLE = re.compile(r"(?<=<!-- backbones -->\n).*?(?=<!-- end -->)", re.S)
COLUMNS = ("Family", "Class", "Linears", "Convolutions", "Methods", "`mtlora`", "Jobs", "Maps at strides")
TARGETS = "all-linear+conv"
UNITS = ("s2ft", "emtal", "lisa")  # methods that choose what they train, and may refuse a family
CHECKS: tuple[_Check, ...] = (check_start, check_gradient, check_merge)
OPTIONS: dict[str, dict[str, Any]] = {
    "ilora": {"n_experts": 2, "gate": None},
    "corda": {"balanced": True},  # of few images the raw factors differ in size, and fp32 rounds their product
    "s2ft": {"ratio": 0.25},
    "emtal": {"n_experts": 4, "init": "zero", "cluster": False},
}
NARROW = {"embed_dim": 32, "depth": 2, "num_heads": 2}
WINDOWED = {"window_size": 2, "embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4)}
STAGES: dict[str, Any] = {"depths": (1, 1, 1, 1)}


@dataclass(frozen=True)
class Family:
    """A model of timm, made small.

    size: of its square images. first: number of blocks that are kept of each stage, 0 for all. exclude: as in `adapt`.
    """

    name: str
    size: int = 32
    options: Mapping[str, Any] = field(default_factory=dict)
    first: int = 0
    exclude: tuple[str, ...] = ()


def sized(name: str, size: int, exclude: tuple[str, ...] = (), **options: Any) -> Family:
    """Return the family of a model that is built for a size of images."""
    return Family(name, size, {"img_size": size, **options}, exclude=exclude)


FAMILIES = {
    "ViT": Family("test_vit", 160),
    "DeiT": sized("deit_tiny_distilled_patch16_224", 32, **NARROW),
    "EVA-02": sized("eva02_tiny_patch14_224", 28, **NARROW),
    "DINOv3": sized("vit_small_patch16_dinov3", 32, **NARROW),
    "BEiT": sized("beit_base_patch16_224", 32, **NARROW),
    "CaiT": sized("cait_xxs24_224", 32, **NARROW),
    "Swin": sized("swin_tiny_patch4_window7_224", 64, **WINDOWED),
    "Swin v2": sized("swinv2_tiny_window8_256", 64, (".*cpb_mlp.*",), **WINDOWED),
    "Hiera": sized("hiera_tiny_224", 64, embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)),
    "MaxViT": Family("test_maxvit", 160),
    "PVT v2": Family("pvt_v2_b0", 64, STAGES | {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 2, 4)}),
    "DaViT": Family("davit_tiny", 64, STAGES | {"embed_dims": (16, 24, 32, 48), "num_heads": (1, 1, 2, 2)}),
    "LeViT": sized("levit_128s", 64, embed_dim=(32, 48, 64), num_heads=(2, 3, 4), depth=(1, 1, 1)),
    "MobileViT": Family("mobilevit_xxs", 64),
    "EfficientViT (MIT)": Family("efficientvit_b0"),
    "EfficientViT (MSRA)": Family("efficientvit_m0", 64),
    "CAFormer": Family("caformer_s18", first=1),
    "PoolFormer": Family("poolformer_s12", first=1),
    "MLP-Mixer": Family("mixer_s32_224", 96, {"img_size": 96}, first=2),
    "ConvNeXt": Family("test_convnext"),
    "ConvNeXt v2": Family("convnextv2_atto", 32, STAGES | {"dims": (8, 16, 24, 32)}),
    "FastViT": Family("fastvit_t8", 64, {"layers": (1, 1, 1, 1)}),
    "ResNet": Family("test_resnet", 32, {"zero_init_last": False}),
    "RegNet": Family("regnetx_002"),
    "DenseNet": Family("densenet121", 32, {"growth_rate": 8, "block_config": (1, 2, 3, 4)}),
    "EfficientNet": Family("test_efficientnet"),
    "MobileNet v3": Family("mobilenetv3_small_050"),
}


@cache
def _built(family: str, num_classes: int) -> nn.Module:
    made = FAMILIES[family]
    torch.manual_seed(0)
    model = timm.create_model(made.name, pretrained=False, num_classes=num_classes, **made.options).eval()
    for path, module in [*model.named_modules()] if made.first else ():
        if path.endswith("blocks") and isinstance(module, nn.Sequential):
            model.set_submodule(path, module[: made.first])
            if path == "blocks":
                model.feature_info = model.feature_info[: made.first]
    return shake(model)  # heads and layer scales that start near zero would hide what comes before


def stock(family: str, num_classes: int = 3, **_: Any) -> nn.Module:
    """Return the tiny model of a family with random weights, in eval mode."""
    return copy.deepcopy(_built(family, num_classes))


def images(family: str) -> Tensor:
    """Return two random images for the tiny model of a family."""
    size = FAMILIES[family].size
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def case_of(family: str, method: str) -> Case:
    """Return the method with its options on the tiny model of a family."""
    options = dict(OPTIONS.get(method, {}))
    if method not in UNITS and "targets" not in METHODS[method].unread:
        options |= {"targets": TARGETS, "exclude": FAMILIES[family].exclude}
    if method == "corda":
        options["covariances"] = collect_covariance(
            stock(family), [images(family)], TARGETS, exclude=FAMILIES[family].exclude
        )
    return Case(method, options, partial(stock, family), partial(images, family))


def check(family: str, method: str) -> None:
    """Raise UserError where the method refuses the family, and AssertionError where it breaks its contract there."""
    more = (check_unadapt, check_adapter_files) if method in ("lora", "lisa", "full") else ()
    # Weights that are trained themselves may include some that no output of a family depends on.
    checks = CHECKS if METHODS[method].layers else (check_start, check_merge)
    case = case_of(family, method)
    with instance_gates(torch.tensor([0.3, 0.7])):
        for function in (*checks, *more):
            if applies(function, METHODS[method], "plain"):
                function(case)


def refusing(family: str) -> list[str]:
    """Return the methods that refuse a family."""
    refused = []
    for method, declared in METHODS.items():
        if declared.layers and not declared.exports:  # mtlora, whose pairs belong to tasks: see `takes_tasks`
            continue
        try:
            check(family, method)
        except Exception as error:
            if method not in UNITS or not isinstance(error, UserError):
                raise RuntimeError(f"{method} on {family}: {error}") from error
            refused.append(method)
    return refused


def takes_tasks(family: str) -> bool:
    """Return whether `mtlora` takes a family; its tasks then start at the model's own features."""
    model, x = stock(family, 0), images(family)
    wanted = model(x)
    try:
        vismt.adapt(model, "mtlora", rank=1, tasks=["a", "b"])
    except UserError:
        return False
    with task_features(["b", "a"], per_sample=True):
        torch.testing.assert_close(model(x), wanted, atol=5e-6 * float(wanted.detach().abs().max()), rtol=0)
    return True


def adapted(family: str, num_classes: int) -> Backbone | Pyramid:
    """Return the tiny model of a family with a LoRA away from its start, as a backbone."""
    made, model = FAMILIES[family], stock(family, num_classes)
    vismt.adapt(model, "lora", TARGETS, rank=1, exclude=made.exclude)
    return as_backbone(shake(model), made.size, block=None, pool=None, name=made.name)


def learn(outputs: Tensor, shape: tuple[int, ...], of: nn.Module) -> None:
    """Fail unless outputs have a shape, and a finite gradient that reaches the parameters of a net."""
    outputs.square().mean().backward()
    grads = [value.grad for value in of.parameters() if value.grad is not None]
    if outputs.shape != shape or not all(grad.isfinite().all() for grad in grads) or not any(map(torch.any, grads)):
        raise RuntimeError(f"outputs {tuple(outputs.shape)} for {shape}, or no gradient")


def _few_shot(family: str) -> None:
    backbone = adapted(family, 0)
    features = backbone(images(family))
    learn(cosine_logits(features, prototypes(features.flip(0), torch.tensor([0, 1]))), (2, 2), backbone)
    if features.shape != (2, backbone.width):
        raise RuntimeError(f"features {tuple(features.shape)}, width {backbone.width}")


def _classification(family: str) -> None:
    backbone = adapted(family, 3)
    learn(backbone.logits(images(family)), (2, 3), backbone)


def _dense(family: str) -> None:
    backbone = adapted(family, 0)
    if not backbone.depth:
        raise UserError("no maps of its stages")
    for name in MAP_HEADS:
        maps = backbone.maps(images(family), default_blocks(backbone.depth))
        logits = MAP_HEADS[name]([value.shape[1] for value in maps], 2)(maps)
        learn(logits, (2, 2, *logits.shape[2:]), backbone)


def _robustness(family: str) -> None:
    classifier, x = classifier_of(stock(family), FAMILIES[family].size), images(family).requires_grad_()
    learn(classifier(x), (2, 3), classifier)
    if x.grad is None or not x.grad.any():
        raise RuntimeError("no gradient at the pixels")


JOBS: dict[str, Callable[[str], None]] = {
    "few-shot": _few_shot,
    "classification": _classification,
    "dense": _dense,
    "robustness": _robustness,
}


def jobs(family: str) -> str:
    """Return the jobs that a family has; a job may refuse it by a UserError."""
    refused = []
    for job, function in JOBS.items():
        try:
            function(family)
        except UserError:
            refused.append(job)
        except Exception as error:
            raise RuntimeError(f"{job} on {family}: {error}") from error
    return "all" + (f" but {', '.join(refused)}" if refused else "")


def strides(family: str) -> list[int]:
    """Return the strides of the maps that dense heads read by default."""
    made = FAMILIES[family]
    backbone = as_backbone(stock(family, 0), made.size, block=None, pool=None, name=made.name)
    maps = backbone.maps(images(family), default_blocks(backbone.depth)) if backbone.depth else []
    return sorted({made.size // value.shape[-1] for value in maps})


def row(family: str) -> str:
    """Return the line of a family."""
    refused, model = refusing(family), stock(family)
    report = vismt.adapt(model, "lora", TARGETS, rank=1, exclude=FAMILIES[family].exclude)
    linears = "all" if any(spec.kind == "linear" for spec in report.specs) else "none"
    linears += " but `qkv`" * any("is never called" in text for text in report.skipped)
    convolutions = "all" + " without groups" * any("in groups" in text for text in report.skipped)
    methods = "all" + (f" but {', '.join(f'`{name}`' for name in refused)}" if refused else "")
    tasks, maps = "yes" if takes_tasks(family) else "no", ", ".join(map(str, strides(family)))
    cells = (family, type(model).__name__, linears, convolutions, methods, tasks, jobs(family), maps)
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Return the table of all families."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    return "\n".join(["", *lines, *map(row, FAMILIES), "", ""])


def main() -> None:
    """Write the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    atomic_write(PAGE, TABLE.sub(table(), PAGE.read_text(encoding="utf8")))
    console.stage("backbones", str(PAGE.relative_to(CHECKOUT)))


if __name__ == "__main__":
    main()
