"""Tasks on language models, registered by kind, each in its own file: prompt, loss and measures."""

from __future__ import annotations

import inspect
from typing import Any

from vismt.base.errors import UserError, require_known
from vismt.base.registry import Registry
from vismt.config.typed import arguments

# The type of the values is vismt.llm.tasks.base.LmTask. Importing this package does not load it.
TEXT_TASKS: Registry[type] = Registry(
    "tasks: no kind",
    {
        **{
            name: f"vismt.llm.tasks.{name}"
            for name in ("answers", "causal", "chat", "classes", "generation", "recommendation")
        },
        "lm_eval:": "vismt.llm.tasks.harness",
    },
)


def make_text_task(kind: str, prompt: str, options: dict[str, object], where: str = "tasks") -> Any:
    """Return the task of a kind.

    Args:
        kind: Name of the kind, a key of TEXT_TASKS.
        prompt: Template of the prompt.
        options: Further arguments of the task.
        where: Start of error messages.

    Raises:
        UserError: If the kind or an option is unknown, a required option is missing, or an option has a wrong type.
    """
    if kind not in TEXT_TASKS:  # TEXT_TASKS knows the members of a family
        require_known(f"{where}: no kind", [kind], TEXT_TASKS)
    parameters = inspect.signature(TEXT_TASKS[kind]).parameters
    require_known(f"{where}: '{kind}' has no option", options, [name for name in parameters if name != "prompt"])
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and name not in ("prompt", *options)
    ]
    if missing:
        raise UserError(f"{where}: '{kind}' needs the option '{missing[0]}'.")
    return TEXT_TASKS[kind](prompt, **arguments(TEXT_TASKS[kind], options, where, "options"))
