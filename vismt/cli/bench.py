"""`vismt bench`: time and memory against peers, measured in one process."""

from __future__ import annotations

import argparse

from vismt import console
from vismt.cli.commands import Commands
from vismt.errors import UserError


def add_commands(commands: Commands) -> None:
    """Add the command of this file."""
    parser = commands.add(
        "bench",
        _bench,
        "time the core, its starts, AMT, EMTAL, attacks and few-shot evaluation against their peers, or account for memory",
    )
    parser.add_argument("what", choices=("core", "lowrank", "amt", "emtal", "attacks", "memory", "fewshot"))
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds of each timing (9)")
    parser.add_argument("--device", default="cpu", help="torch device (cpu)")
    parser.add_argument("--model", help="for memory: the name of a language model (a random Llama)")


def _bench(options: argparse.Namespace) -> None:
    from vismt.bench import amt, attacks, core, emtal, fewshot, lowrank, memory

    if options.rounds < 1:
        raise UserError(f"bench: --rounds {options.rounds}; it must be at least 1.")
    if options.model is not None and options.what != "memory":
        raise UserError(
            f"bench: --model applies to 'memory' only, and '{options.what}' has fixed models; leave it out."
        )
    if options.what == "memory":
        results = memory.run(options.rounds, options.device, options.model)
    else:
        benches = {"core": core, "lowrank": lowrank, "amt": amt, "emtal": emtal, "attacks": attacks, "fewshot": fewshot}
        results = benches[options.what].run(options.rounds, options.device)
    for result in results:
        console.block(str(result))
