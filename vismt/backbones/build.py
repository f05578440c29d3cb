"""timm models by name: the architecture that a name stands for, and its construction with errors that give the fix."""

from __future__ import annotations

import timm
from torch import nn

from vismt.backbones.assets import list_assets
from vismt.backbones.cards import AssetCard
from vismt.backbones.sources import quiet_logger
from vismt.base.errors import UserError, WeightsUnavailable, near
from vismt.storage.wheels import one_line

ADVICE = " Take one of timm.list_models('vit_*')."


def architecture_of(name: str, card: AssetCard | None) -> str:
    """Return the timm name, with its tag, that a backbone's `name` stands for. Raises UserError, with near names, for others."""
    if card is not None:
        if card.architecture is None:
            raise UserError(f"asset '{name}' is a language model, not a ViT: use vismt.backbones.lm.create_lm.")
        return card.architecture
    base, _, tag = name.partition(".")
    if not timm.is_model(base):
        hint = near(base, [*list_assets(), *timm.list_models()])
        raise UserError(f"backbone '{name}' is neither an asset nor a timm model.{hint}")
    tagged = timm.list_pretrained(f"{base}.*")
    if tag and name not in tagged:
        raise UserError(f"backbone '{name}': timm's {base} has no weights tagged '{tag}'.{near(name, tagged)}")
    return name


def build(architecture: str, *, pretrained: bool = False, **options: int | tuple[int, int]) -> nn.Module:
    """Return timm's model. Raises UserError for a model without img_size and a size that timm cannot build."""
    try:
        return timm.create_model(architecture, pretrained=pretrained, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        raise UserError(
            f"'{architecture}' is not a plain vision transformer: timm gives it no img_size.{ADVICE}"
        ) from error
    except OSError:  # the hub cannot be reached; in some versions such an error is a ValueError as well
        raise
    except (RuntimeError, AssertionError, ValueError) as error:
        if "img_size" not in options:
            raise
        reason = one_line(str(error), 160)
        raise UserError(
            f"timm cannot build '{architecture}' at img_size {options['img_size']} ({reason}): "
            "try another multiple of its patch size."
        ) from error


def from_hub(architecture: str, **options: int | tuple[int, int]) -> nn.Module:
    """Return timm's pretrained model, through timm's downloader and cache."""
    if not timm.models.is_model_pretrained(architecture.partition(".")[0]):
        hint = near(architecture, timm.list_pretrained())
        raise UserError(
            f"timm has no weights for '{architecture}'.{hint} Or pass the path of a checkpoint as pretrained."
        )
    try:
        with quiet_logger("huggingface_hub"):
            return build(architecture, pretrained=True, **options)
    except OSError as error:
        reason = one_line(str(error), 160)
        raise WeightsUnavailable(
            f"the weights of '{architecture}' could not be downloaded by timm ({reason}). Download them on a machine that "
            "reaches the hub and pass the path as pretrained, or use an asset of `vismt assets list` that comes from a wheel."
        ) from error
