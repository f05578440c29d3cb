"""The `vismt` command. Each command imports what it needs when it runs, so that `vismt list` is quick."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from vismt import console
from vismt.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 1 a check failed, 2 a user error, 130 interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse does not take positionals after an option: `run CONFIG --out runs train.steps=2` leaves the last one over.
    late = [word for word in rest if "=" in word and not word.startswith("-")]
    if late != rest or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognised arguments: {' '.join(word for word in rest if word not in late) or ' '.join(rest)}")
    if late:
        options.overrides = [*options.overrides, *late]
    console.set_quiet(options.quiet or int(os.environ.get("RANK", "0")) > 0)
    if not options.verbose:
        # What dependencies warn of is for developers; the user can act on none of it.
        warnings.filterwarnings("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return int(options.call(options) or 0)
    except UserError as error:
        if options.debug:
            raise
        console.error(str(error))
        return 2
    except KeyboardInterrupt:
        console.error("interrupted; the same command goes on from here.")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vismt", description="Low-rank adaptation methods with numbers that can be trusted."
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--quiet", action="store_true", help="print errors only")
    common.add_argument("--verbose", action="store_true", help="let the dependencies' warnings through")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def add(name: str, call: object, text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, parents=[common])
        made.set_defaults(call=call)
        return made

    for name, call, text in (
        ("run", _run, "train, merge, evaluate and report; resumes an interrupted run folder"),
        ("train", _train, "train only; resumes"),
    ):
        made = add(name, call, text)
        made.add_argument("config", type=Path, help="a YAML file, see configs/")
        made.add_argument(
            "overrides", nargs="*", metavar="key=value", help="dotted overrides, for example train.steps=20"
        )
        made.add_argument("--out", type=Path, default=Path("runs"), help="where run folders are made (runs)")
    add("evaluate", _evaluate, "evaluate a run folder and write its report").add_argument("run", type=Path)
    _attack_options(add("attack", _attack, "attack a run folder, or any timm classifier with --model and --data"))
    made = add("merge", _merge, "write the merged stock model of a run folder")
    made.add_argument("run", type=Path)
    made.add_argument(
        "--expert", help="of a pool: the label of one expert, or average; of several arms: arm or arm:seed"
    )
    made = add("predict", _predict, "draw a dense run's predictions on your own images")
    made.add_argument("run", type=Path)
    made.add_argument("images", type=Path, nargs="+", help="image files of any size")
    made.add_argument("--to", type=Path, default=None, help="target folder (RUN/predictions)")
    made.add_argument("--expert", help="of several arms: arm or arm:seed")
    made.add_argument(
        "--own-size", action="store_true", help="by windows at the image's own size, not fitted into the run's"
    )
    made.add_argument(
        "--flip", action="store_true", help="mean with the mirrored image's prediction, as evaluate.flip does"
    )
    made.add_argument("--maps", action="store_true", help="also write what is predicted, as arrays in an .npz")
    made = add("pool", _pool, "assemble experts that were trained apart into one pool folder")
    made.add_argument("action", choices=("assemble",))
    made.add_argument("experts", type=Path, nargs="+", help="run folders, adapter folders or pools")
    made.add_argument("--to", type=Path, required=True, help="the pool folder to write")
    made = add("export", _export, "export a run's model: timm, transformers or peft")
    made.add_argument("run", type=Path)
    made.add_argument("--format", default="timm", help="timm, transformers or peft (timm)")
    made.add_argument("--to", type=Path, default=None, help="target folder (RUN/export-FORMAT)")
    made.add_argument("--expert", help="of a pool: one expert's label, or average; of several arms: arm or arm:seed")
    made = add("data", _data, "list the data cards, check a set's counts and hashes, or fetch it")
    made.add_argument("action", choices=("list", "check", "prepare"))
    made.add_argument("name", nargs="*", help="card names or paths")
    made = add("assets", _assets, "list the weights that have a card, or get them")
    made.add_argument("action", choices=("list", "get"))
    made.add_argument("name", nargs="*", help="asset names")
    made = add("bench", _bench, "time the core, its starts, AMT and EMTAL against their peers, or account for memory")
    made.add_argument("what", choices=("core", "lowrank", "amt", "emtal", "memory"))
    made.add_argument("--rounds", type=int, default=9)
    made.add_argument("--device", default="cpu")
    made.add_argument("--model", help="of memory: a language model by its name (a random Llama)")
    add("list", _list, "list methods, jobs, data cards and assets")
    return parser


def _attack_options(made: argparse.ArgumentParser) -> None:
    made.add_argument("run", type=Path, nargs="?", help="a run folder")
    made.add_argument("--model", help="a timm name or a checkpoint file instead of a run")
    made.add_argument("--architecture", help="timm architecture of a checkpoint without config.json")
    made.add_argument("--random-weights", action="store_true", help="a timm name without its weights")
    made.add_argument("--data", help="card or card:split for --model")
    made.add_argument("--images", type=int, help="how many images (all)")
    made.add_argument("--batch", type=int, default=32)
    made.add_argument(
        "--attack", action="append", help="pgd, pgd_l2, fgsm, apgd_ce, apgd_t, fab, square, autoattack, ... (pgd)"
    )
    made.add_argument("--epsilon", default="4.5/255", help="radius in pixels of [0, 1], also as a fraction (4.5/255)")
    made.add_argument("--step-size", default=None, help="step (epsilon / 10)")
    made.add_argument("--steps", type=int, default=None, help="steps (the attack's own number)")
    made.add_argument("--norm", default="linf", help="linf or l2")
    made.add_argument("--seed", type=int, default=0, help="of the drawn images and the attack, with --model")
    made.add_argument("--masking", action="store_true", help="also check the accuracy at growing radii")
    made.add_argument("--out", type=Path, default=None, help="where records are written with --model (runs/attack-...)")


def _run(options: argparse.Namespace) -> None:
    from vismt.engine.run import start

    run = start(options.config, options.overrides, options.out)
    run.train()
    run.on_main(run.evaluate)
    run.on_main(run.report)


def _train(options: argparse.Namespace) -> None:
    from vismt.engine.run import start

    run = start(options.config, options.overrides, options.out)
    run.train()
    console.stage("run", str(run.folder))


def _evaluate(options: argparse.Namespace) -> None:
    from vismt.engine.run import open_run

    run = open_run(options.run)
    run.on_main(run.evaluate)
    run.on_main(run.report)


def _attack(options: argparse.Namespace) -> None:
    from vismt.engine.run import open_run
    from vismt.jobs.fewshot.config import AttackConfig

    if (options.run is None) == (options.model is None):
        raise UserError("attack: give either a run folder or --model (with --data).")
    attacks = [
        AttackConfig(name, options.epsilon, options.step_size, options.steps, options.norm)
        for name in options.attack or ["pgd"]
    ]
    if options.run is not None:
        alone = {
            "data": None,
            "images": None,
            "architecture": None,
            "out": None,
            "random_weights": False,
            "masking": False,
        }
        for name, unset in alone.items():
            if getattr(options, name) != unset:
                raise UserError(
                    f"attack: --{name.replace('_', '-')} goes with --model; a run has its own in its configuration."
                )
        run = open_run(options.run)
        run.on_main(lambda: run.evaluate(attacks))
        run.on_main(run.report)
        return
    from vismt.robustness.audit import audit

    if not options.data:
        raise UserError("attack: --model needs --data, a card such as cifar10:test; `vismt data list` shows them.")
    specs = [attack.spec(options.seed) for attack in attacks]
    how = "-".join(str(spec) for spec in specs)
    stem = re.sub(r"[^\w.]+", "-", f"attack-{Path(options.model).stem}-{options.data}-{how}-{options.images or 'all'}")
    folder = options.out or Path("runs") / stem
    rows = audit(
        options.model,
        options.data,
        specs,
        folder=folder,
        architecture=options.architecture,
        pretrained=not options.random_weights,
        images=options.images,
        batch=options.batch,
        seed=options.seed,
        masking=options.masking,
    )
    for row in rows:
        interval = f"[{100 * row.low:.1f}, {100 * row.high:.1f}]"
        console.stage(
            "attack", f"{row.condition:<28}{100 * row.value:5.1f} %  95 % CI {interval}  n = {row.n} {row.unit}"
        )
    console.stage("records", str(folder))


def _merge(options: argparse.Namespace) -> None:
    from vismt.engine.run import open_run

    console.stage("merged", str(open_run(options.run).merge(options.expert)))


def _export(options: argparse.Namespace) -> None:
    from vismt.engine.run import open_run

    console.stage("export", str(open_run(options.run).export(options.format, options.to, options.expert)))


def _predict(options: argparse.Namespace) -> None:
    from vismt.engine.run import open_run

    written = open_run(options.run).predict(
        options.images, options.to, options.expert, own_size=options.own_size, flip=options.flip, maps=options.maps
    )
    for path in written:
        console.stage("picture", str(path))


def _pool(options: argparse.Namespace) -> None:
    from vismt.jobs.fewshot.pool_training import find_experts
    from vismt.metatune.pool import assemble

    experts = [expert for folder in options.experts for expert in find_experts(folder)]
    console.stage("pool", f"{assemble(experts, options.to)}   {', '.join(expert.label for expert in experts)}")


def _data(options: argparse.Namespace) -> int:
    from vismt.data import check

    if options.action == "list":
        console.table(("card", "kind", "images", "classes", "found"), check.listing())
        return 0
    if options.action == "check":
        reports = [check.check(name) for name in options.name or [row.name for row in check.listing()]]
        for report in reports:
            console.stage("check", str(report))
        return 0 if all(report.ok for report in reports) else 1
    if not options.name:
        raise UserError("data prepare: name a card; `vismt data list` shows them.")
    for name in options.name:
        console.stage("data", str(check.prepare(name)))
    return 0


def _assets(options: argparse.Namespace) -> None:
    from vismt.backbones import assets

    if options.action == "list":
        console.table(("asset", "kind", "MB", "licence", "cached", "about"), assets.describe())
        return
    if not options.name:
        raise UserError("assets get: name an asset; `vismt assets list` shows them.")
    for name in options.name:
        console.stage("asset", str(assets.get_asset(name)))


def _bench(options: argparse.Namespace) -> None:
    from vismt.bench import amt, core, emtal, lowrank, memory

    if options.rounds < 1:
        raise UserError(f"bench: --rounds {options.rounds}; it must be at least 1.")
    if options.model is not None and options.what != "memory":
        raise UserError(f"bench: --model is of 'memory', '{options.what}' has models of its own; leave it out.")
    named = () if options.model is None else (options.model,)
    benches = {"core": core, "lowrank": lowrank, "amt": amt, "emtal": emtal, "memory": memory}
    for result in benches[options.what].run(options.rounds, options.device, *named):
        console.block(str(result))


def _list(options: argparse.Namespace) -> None:
    from vismt.backbones.assets import list_assets
    from vismt.data.cards import list_cards
    from vismt.jobs import JOBS
    from vismt.registry import method_options, methods

    for name, method in methods().items():
        console.stage("method", f"{name:<10}{(method.__doc__ or '').strip().splitlines()[0]}")
        console.stage("", f"{'':<10}options: {', '.join(method_options(method))}")
    console.stage("jobs", ", ".join(JOBS))
    console.stage("data", ", ".join(list_cards()))
    console.stage("assets", ", ".join(list_assets()))


if __name__ == "__main__":
    sys.exit(main())
