"""`vismt verify`: check an adapter or a merged checkpoint. Exit codes: 0 ok, 3 suspicious, 4 broken."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vismt.base import console
from vismt.cli.commands import Commands

LABELS = {"broken": "broken", "suspicious": "suspect", "note": "note"}


def add_commands(commands: Commands) -> None:
    """Add the command of this file."""
    parser = commands.add(
        "verify", _verify, "check an adapter or a merged checkpoint; exit code 0 ok, 3 suspicious, 4 broken"
    )
    parser.add_argument("folder", type=Path, help="a folder that vismt or peft wrote, or a checkpoint")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the model it was trained on: a folder, file, asset, or a hub name, which is fetched",
    )
    parser.add_argument("--merged", metavar="CHECKPOINT", help="a checkpoint that holds base and adapter; needs --base")
    parser.add_argument(
        "--probe", metavar="DATA", help="a .txt file of examples, or a card or folder of images; needs --base"
    )
    parser.add_argument(
        "--reader",
        action="append",
        default=[],
        help="peft, transformers, vllm, llama.cpp or timm: let what it does decide, too; may be repeated",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdict with stable keys")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with a figure of the layers")


def _verify(options: argparse.Namespace) -> int:
    from vismt.storage.files import atomic_write
    from vismt.verification.page import write_page
    from vismt.verification.verify import verify

    verdict = verify(
        options.folder, base=options.base, merged=options.merged, probe=options.probe, readers=options.reader
    )
    console.stage("verdict", f"{verdict.status}: {verdict.folder}")
    if verdict.answer:
        console.stage("readers", verdict.answer)
    for row in verdict.readers:
        for remark in row["remarks"]:
            console.stage("", f"{row['line'].partition(':')[0]} ({row['source']}): {remark}")
    for name, text in verdict.about.items():
        console.stage("", f"{name}: {text}")
    for finding in verdict.findings:
        console.stage(LABELS[finding.level], finding.text)
        if finding.fix:
            console.stage("", f"fix: {finding.fix}")
    if verdict.probe:
        heads = ("model", "measure", "value", "low", "high", "n")
        console.table(heads, [[_number(row[head]) for head in heads] for row in verdict.probe])
    if options.json:
        atomic_write(options.json, json.dumps(verdict.as_json(), indent=1) + "\n")
    if options.html:
        console.stage("page", str(write_page(verdict, options.html)))
    return verdict.exit_code


def _number(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
