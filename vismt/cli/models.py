"""`vismt merge`, `predict`, `pool` and `export`: the models of a run folder."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from vismt.base import console
from vismt.base.errors import UserError
from vismt.cli.commands import Commands, answer

if TYPE_CHECKING:
    from vismt.jobs.run import Run

ADAPTERS = ("adapter.json", "adapter_config.json")  # files in folders of vismt and peft


def add_commands(commands: Commands) -> None:
    """Add the commands of this file."""
    merge = commands.add(
        "merge", _merge, "write the merged stock model of a run folder, or of an adapter folder and --base"
    )
    merge.add_argument("run", type=Path, help="a run folder, or an adapter folder that vismt or peft wrote")
    merge.add_argument(
        "--base",
        metavar="MODEL",
        help="of an adapter folder: the model it was trained on, a folder, file, asset, or a name of timm or of the hub",
    )
    merge.add_argument("--to", type=Path, metavar="OUT", help="of an adapter folder: the folder of the merged model")
    _add_arm(merge)
    predict = commands.add(
        "predict",
        _predict,
        "predict the classes or maps of your own images, or what a language model writes",
        answers=True,
    )
    predict.add_argument(
        "run", type=Path, help="a run folder, a merged or exported one, or a checkpoint of a timm model"
    )
    predict.add_argument(
        "inputs",
        type=Path,
        nargs="+",
        help="image files of any size, folders of them, or a .jsonl, .json or .csv of rows of text",
    )
    predict.add_argument("--to", type=Path, help="target folder (RUN/predictions)")
    _add_arm(predict)
    predict.add_argument(
        "--support", type=Path, metavar="FOLDER", help="of a few-shot run: a folder of example images for each class"
    )
    predict.add_argument("--top", type=int, default=5, metavar="K", help="classes in a row (5)")
    predict.add_argument("--sheet", action="store_true", help="also draw the images with their classes")
    predict.add_argument(
        "--own-size",
        action="store_true",
        help="of a dense run: slide windows over the image at its original size instead of fitting the image into the run's size",
    )
    predict.add_argument(
        "--flip",
        action="store_true",
        help="of a dense run: average with the mirrored image's prediction, as evaluate.flip does",
    )
    predict.add_argument(
        "--maps",
        action="store_true",
        help="also write arrays (.npz): the probabilities of all classes, or each map, with a picture and an overlay (.png)",
    )
    predict.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="of written text: sample at T; 0 takes the likeliest (0)",
    )
    predict.add_argument("--new-tokens", type=int, default=128, metavar="N", help="of written text: its longest (128)")
    predict.add_argument("--seed", type=int, default=0, help="of sampled text (0)")
    pool = commands.add("pool", _pool, "assemble separately trained experts into one pool folder")
    pool.add_argument("action", choices=("assemble",))
    pool.add_argument("experts", type=Path, nargs="+", help="run folders, adapter folders or pools")
    pool.add_argument("--to", type=Path, required=True, help="the pool folder to write")
    export = commands.add("export", _export, "export a run's model: timm, transformers, peft, ONNX or torch.export")
    export.add_argument("run", type=Path, help="a run folder")
    export.add_argument("--format", default="timm", help="timm, transformers, peft, onnx or torch (timm)")
    export.add_argument("--to", type=Path, help="target folder (RUN/export-FORMAT-ARM-seed-SEED)")
    export.add_argument(
        "--uniform", action="store_true", help="of peft: pad to one rank, for servers that read one (llama.cpp)"
    )
    _add_arm(export)


def _add_arm(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--arm",
        metavar="NAME[:SEED]",
        help="the arm of a study and its training seed, best for the arm that is best on validation (best); of a pool, the label "
        "of one expert, or average",
    )


def _open(options: argparse.Namespace) -> Run:
    from vismt.jobs import open_run

    return open_run(options.run)


def _merge(options: argparse.Namespace) -> None:
    if any((options.run / name).is_file() for name in ADAPTERS):
        if options.base is None or options.to is None or options.arm is not None:
            raise UserError(
                f"merge: '{options.run}' is an adapter folder; give the model that it was trained on with --base MODEL and the "
                "folder to write with --to OUT, and no --arm."
            )
        from vismt.verification.merging import merge_adapter

        verdict = merge_adapter(options.run, options.base, options.to)
        for check in verdict.checks:
            if check.done:
                console.stage("verify", f"{check.name}: {check.text}")
        for finding in verdict.findings:
            console.stage("verify", f"{finding.level}: {finding.text}")
        console.stage("verify", verdict.status)
        console.stage("merged", str(options.to))
        return
    if options.base is not None or options.to is not None:
        raise UserError(
            f"merge: --base and --to are for adapter folders, and '{options.run}' has neither {' nor '.join(ADAPTERS)}; "
            "for a run folder leave both out."
        )
    with _open(options).owned() as run:
        console.stage("merged", str(run.merge(options.arm)))


def _export(options: argparse.Namespace) -> None:
    with _open(options).owned() as run:
        console.stage("export", str(run.export(options.format, options.to, options.arm, uniform=options.uniform)))


def _predict(options: argparse.Namespace) -> None:
    from vismt.jobs import resolved_path

    if not options.run.is_file() and not (options.run / "model.safetensors").is_file():
        resolved_path(options.run)  # before the imports, so that a wrong folder is answered at once
    from vismt.jobs.predict import predict_inputs
    from vismt.jobs.predictions import Options

    settings = Options(**{item.name: getattr(options, item.name) for item in fields(Options)})
    found = predict_inputs(options.run, options.inputs, options.to, settings)
    for path in found.files:
        console.stage("predict", str(path))
    answer(options, asdict(found))
    if found.failed:
        raise UserError(
            f"predict: {len(found.failed):,} without an answer, whose rows have the errors: {found.failed[0]}"
        )


def _pool(options: argparse.Namespace) -> None:
    from vismt.jobs.fewshot.models import find_experts
    from vismt.metatune.amt.pool import POOL_FILE, assemble, check_experts
    from vismt.storage.outputs import check_folder, note_outputs

    experts = [expert for folder in options.experts for expert in find_experts(folder)]
    check_experts(experts)
    if not (options.to / POOL_FILE).exists():
        check_folder("pool", options.to)
        note_outputs("pool", options.to)
    folder = assemble(experts, options.to)
    console.stage("pool", f"{folder}   {', '.join(expert.label for expert in experts)}")
