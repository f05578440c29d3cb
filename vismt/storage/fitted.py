"""Values that are fitted on validation examples for the weights of a model. A JSON file keeps them until the weights change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar, get_type_hints

from vismt.base import console, ranks
from vismt.storage.files import atomic_write, read_sealed, sealed

Fitted = TypeVar("Fitted")


def fitted_once(
    path: Path,
    kind: type[Fitted],
    fingerprint: str,
    fit: Callable[[], Fitted],
    *,
    examples: str = "",
    shared: bool = False,
) -> Fitted:
    """Return the values of a JSON file for this fingerprint (weights, and what else the values need), or fit and write them.

    Values that were fitted to other examples are kept, like the records that were made with them, and a message names the file.
    examples: Text that tells the validation examples from others of the same names, "" if it is not known. shared: Whether the
    processes of an evaluation share the work of `fit`. By default only the first process fits.
    """
    types = get_type_hints(kind)

    def known() -> Fitted | None:
        found = (
            read_sealed(path, f"'{path}'", {"fingerprint": str, **types}, {"examples": str}) if path.exists() else {}
        )
        if found.get("fingerprint") != fingerprint:
            return None
        begun = found.get("examples", "")
        if begun and examples not in ("", begun):
            what = "is of other validation images than are there now"
            console.stage("eval", f"'{path}' {what}; move it and the records of the model away to fit it to these")
        return kind(**{name: found[name] for name in types})

    values = ranks.on_first(known)
    if values is None:
        values = fit() if shared else ranks.on_first(fit)
        content = {"fingerprint": fingerprint, "examples": examples, **asdict(values)}  # type: ignore[call-overload]  # a dataclass
        ranks.on_first(lambda: atomic_write(path, sealed(content)))
    return values
