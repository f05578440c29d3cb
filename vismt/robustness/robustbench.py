"""Models of RobustBench (Croce et al., arXiv 2010.09670) by name, `robustbench:MODEL[:DATASET[:THREAT]]`.

The package is not a dependency. Its models take pixels in [0, 1] and normalise them themselves; their outputs are the classes
of their data set in its order. Weights are kept under the cache folder.
"""

from __future__ import annotations

from torch import nn

from vismt.base.errors import UserError, near
from vismt.storage.paths import cache_root

PREFIX = "robustbench:"
DATASETS = {"cifar10": (10, 32), "cifar100": (100, 32), "imagenet": (1000, 224)}  # classes, pixels


def load_robustbench(name: str) -> tuple[nn.Module, int, int]:
    """Load a model, by default of cifar10 and the threat Linf.

    Returns:
        The classifier in eval mode, its number of classes, and the size of its images in pixels.

    Raises:
        UserError: No package robustbench, an unknown model, data set or threat, or weights that cannot be fetched.
    """
    model, dataset, threat = _split(name)
    try:
        from robustbench.model_zoo import model_dicts
        from robustbench.utils import load_model
    except ImportError as error:
        raise UserError(
            f"model '{name}': the package robustbench is not installed: pip install "
            "git+https://github.com/RobustBench/robustbench.git"
        ) from error
    zoo = {
        _text(key): {_text(kind): list(models) for kind, models in kinds.items()} for key, kinds in model_dicts.items()
    }
    for what, value, known in (
        ("data set", dataset, zoo),
        ("threat", threat, zoo.get(dataset, {})),
        ("model", model, zoo.get(dataset, {}).get(threat, ())),
    ):
        if value not in known:
            raise UserError(f"model '{name}': RobustBench has no {what} '{value}'.{near(value, known)}")
    if dataset not in DATASETS:
        raise UserError(f"model '{name}': data set '{dataset}' is not supported.{near(dataset, DATASETS)}")
    try:
        net = load_model(model, model_dir=str(cache_root() / "robustbench"), dataset=dataset, threat_model=threat)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model '{name}': RobustBench cannot get its weights ({reason}).") from error
    return net.eval(), *DATASETS[dataset]


def _split(name: str) -> tuple[str, str, str]:
    parts = name.removeprefix(PREFIX).split(":")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise UserError(
            f"model '{name}': need robustbench:MODEL[:DATASET[:THREAT]], as in robustbench:Standard:cifar10:L2."
        )
    model, dataset, threat = (*parts, *("", "cifar10", "Linf")[len(parts) :])
    return model, dataset, threat


def _text(key: object) -> str:
    """Return the text of a key of the model zoo, which is an enumeration."""
    return str(getattr(key, "value", key))
