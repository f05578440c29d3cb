"""Tasks on language models, registered by kind, each in its own file: prompt, loss and measures."""

from __future__ import annotations

import inspect
from typing import Any

from vismt.base.errors import UserError, require_known
from vismt.base.registry import Registry
from vismt.config.typed import arguments

# The type of the values is vismt.llm.tasks.base.LmTask, which importing this package does not load.
TASKS: Registry[type] = Registry(
    "tasks: no kind",
    {
        **{
            name: f"vismt.llm.tasks.{name}"
            for name in ("answers", "causal", "chat", "classes", "generation", "recommendation")
        },
        "lm_eval:": "vismt.llm.tasks.harness",
    },
)


def make_task(kind: str, prompt: str, options: dict[str, Any], where: str = "tasks") -> Any:
    """Return the task of a kind.

    Args:
        kind: a key of TASKS.
        prompt: template of the prompt.
        options: further arguments of the task.
        where: start of error messages.

    Raises:
        UserError: unknown kind or option, a required option that is missing, or options of the wrong type.
    """
    if kind not in TASKS:  # which knows the members of a family
        require_known(f"{where}: no kind", [kind], TASKS)
    parameters = inspect.signature(TASKS[kind]).parameters
    require_known(f"{where}: '{kind}' has no option", options, [name for name in parameters if name != "prompt"])
    missing = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and name not in ("prompt", *options)
    ]
    if missing:
        raise UserError(f"{where}: '{kind}' needs the option '{missing[0]}'.")
    return TASKS[kind](prompt, **arguments(TASKS[kind], options, where, "options"))
