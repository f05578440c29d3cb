"""`vismt attack`: attack a run folder, or any image classifier with --model and --data."""

from __future__ import annotations

import argparse
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from vismt.base.errors import UserError
from vismt.cli.commands import Commands
from vismt.storage.files import JsonObject

if TYPE_CHECKING:
    from vismt.robustness.conditions import AttackConfig

# Options that need --model, with their defaults.
MODEL_OPTIONS = {
    "data": None,
    "images": None,
    "architecture": None,
    "out": None,
    "img_size": None,
    "mean": None,
    "std": None,
    "batch": 32,
    "seed": 0,
    "random_weights": False,
    "corruption": None,
    "severity": None,
    "keep_images": False,
}


def add_commands(commands: Commands) -> None:
    """Add the command of this file."""
    parser = commands.add("attack", _attack, "attack a run folder, or any classifier of images with --model and --data")
    parser.add_argument("run", type=Path, nargs="?", help="a run folder")
    parser.add_argument("--model", help="a timm name, a checkpoint file or your own module:function instead of a run")
    parser.add_argument(
        "--architecture",
        help="of a checkpoint without config.json, its timm architecture or the module:function that builds your module",
    )
    parser.add_argument(
        "--img-size",
        type=int,
        help="size of the model's images in pixels (by default from its config.json, or timm's); needed for a module of yours",
    )
    parser.add_argument("--mean", type=float, nargs="+", help="of the channels, by which a checkpoint normalises")
    parser.add_argument("--std", type=float, nargs="+", help="of the channels, as --mean")
    parser.add_argument("--random-weights", action="store_true", help="a timm name without its weights")
    parser.add_argument("--data", help="card or card:split for --model")
    parser.add_argument("--images", type=int, help="number of images (all)")
    parser.add_argument("--batch", type=int, help="images in a batch, with --model (32)")
    parser.add_argument(
        "--attack",
        action="append",
        help="strong, autoattack, pgd, pgd_paper, fgsm, apgd_ce, apgd_dlr, apgd_t, fab, square or torchattacks:NAME; may be "
        "repeated, for a worst case over all (strong; pgd of dense runs)",
    )
    parser.add_argument("--epsilon", default="4.5/255", help="radius in pixels of [0, 1], also as a fraction (4.5/255)")
    parser.add_argument(
        "--corruption",
        action="append",
        help="also a corruption, such as gaussian_noise, or all, with --model; may be repeated",
    )
    parser.add_argument(
        "--severity", type=int, action="append", help="of the corruptions, 1 to 5 (all five); may be repeated"
    )
    parser.add_argument("--step-size", help="step of PGD (2.5 epsilon / steps)")
    parser.add_argument("--steps", type=int, help="number of steps (the attack's default)")
    parser.add_argument("--restarts", type=int, help="number of restarts (the attack's default)")
    parser.add_argument("--norm", default="linf", help="linf, l2 or l1")
    parser.add_argument("--task", action="append", help="of a dense run, whose loss is raised (all tasks)")
    parser.add_argument("--seed", type=int, help="of the drawn images and the attack, with --model")
    parser.add_argument(
        "--keep-images", action="store_true", help="also write the attacked images to adversarial/ of the run folder"
    )
    parser.add_argument("--out", type=Path, help="run folder to make with --model (runs/attack-...)")
    parser.set_defaults(**MODEL_OPTIONS)


def _attack(options: argparse.Namespace) -> None:
    from vismt.jobs import open_run

    if (options.run is None) == (options.model is None):
        raise UserError("attack: give either a run folder or --model (with --data).")
    run = None if options.run is None else open_run(options.run)
    from vismt.robustness.conditions import AttackConfig

    attacks = [
        AttackConfig(
            name,
            options.epsilon,
            options.step_size,
            options.steps,
            options.norm,
            restarts=options.restarts,
            tasks=options.task or [],
        )
        for name in options.attack or ["strong" if run is None else run.job.default_attack]
    ]
    if run is None:
        _attack_model(options, attacks)
        return
    for name, default in MODEL_OPTIONS.items():
        if getattr(options, name) != default:
            raise UserError(
                f"attack: --{name.replace('_', '-')} goes with --model; a run takes it from its configuration."
            )
    with run.owned():
        run.evaluate(attacks)
        run.on_main(run.report)


def _attack_model(options: argparse.Namespace, attacks: list[AttackConfig]) -> None:
    """Run the robustness job on one classifier. `task: robustness` in a configuration compares several."""
    from vismt.jobs import run_folder, started_config, typed_config
    from vismt.robustness.classifier import FUNCTION

    if options.severity and not options.corruption:
        raise UserError("attack: --severity is of corruptions; give --corruption, such as all.")
    if not options.data:
        raise UserError("attack: --model needs --data, a card such as cifar10:test; `vismt data list` shows them.")
    arm = re.sub(r"[^\w.+-]+", "-", Path(options.model).stem)
    classifier: JsonObject = {
        "name": options.model,
        "architecture": options.architecture,
        "pretrained": not options.random_weights,
        "img_size": options.img_size,
        "mean": options.mean,
        "std": options.std,
    }
    if FUNCTION.fullmatch(options.model) and not Path(options.model).exists():
        if options.architecture or options.random_weights or options.img_size is None:
            raise UserError(
                f"attack: --model {options.model} is a function: give --img-size, and no --architecture and --random-weights."
            )
        classifier = {"function": options.model, "size": options.img_size}
    raw = {
        "task": "robustness",
        "title": f"{options.model} on {options.data}",
        "seed": options.seed,
        "classifier": classifier,
        "arms": {arm: {}},
        "data": [options.data],
        "evaluate": {
            "images": options.images,
            "batch": options.batch,
            "attacks": [asdict(attack) for attack in attacks],
            "corruptions": [
                {"name": name, **({"severities": options.severity} if options.severity else {})}
                for name in options.corruption or ()
            ],
            "keep_images": options.keep_images,
        },
    }
    config = typed_config(raw, "attack")
    folder = options.out or run_folder(config, f"attack-{arm}", Path("runs"))
    with started_config(config, folder) as run, run.owned():
        run.evaluate()
        run.on_main(run.report)
