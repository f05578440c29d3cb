"""Tasks on language models by kind, each in a file of its own: prompt, loss and measures."""

from __future__ import annotations

import inspect
from typing import Any

from vismt.errors import UserError, require_known


def kinds() -> dict[str, type]:
    """The class of each kind."""
    from vismt.llm.tasks.answers import Answers
    from vismt.llm.tasks.causal import Causal
    from vismt.llm.tasks.classes import Classes
    from vismt.llm.tasks.generation import Generation
    from vismt.llm.tasks.recommendation import Recommendation

    return {
        "answers": Answers,
        "causal": Causal,
        "classes": Classes,
        "generation": Generation,
        "recommendation": Recommendation,
    }


def make_task(kind: str, prompt: str, options: dict[str, Any], where: str = "tasks") -> Any:
    """The task of a kind; UserError for an unknown kind or option, and for one that is missing."""
    known = kinds()
    require_known(f"{where}: no kind", [kind], known)
    parameters = inspect.signature(known[kind]).parameters
    require_known(f"{where}: '{kind}' has no option", options, [name for name in parameters if name != "prompt"])
    needed = [
        n for n, p in parameters.items() if p.default is inspect.Parameter.empty and n not in ("prompt", *options)
    ]
    if needed:
        raise UserError(f"{where}: '{kind}' needs the option '{needed[0]}'.")
    try:
        return known[kind](prompt, **options)
    except (TypeError, AttributeError) as error:
        raise UserError(f"{where}: options {options} of '{kind}' are of the wrong type ({error}).") from error
