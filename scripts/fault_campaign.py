"""Damage everything that vismt reads, stop its runs anywhere, and print how each kind of trial ended.

    PYTHONPATH=tests:tests/faults python scripts/fault_campaign.py --configurations 1000 --adapters 700 --kills 40

A trial is sound where it is refused in one line or ends with the right numbers. The exit code is 1 where one is not.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import test_adapter_files
import test_checkpoints
import test_configs
import test_images
import test_kills
import test_run_folders
import test_stores
import torch
from helpers.adapter_folders import state_hash
from helpers.damage import copied
from helpers.every_method import adapted_vit, small_vit
from helpers.faults import SOUND, many, tried
from helpers.tiny_runs import CONFIGS
from helpers.yaml_mutations import damaged_texts, damaged_trees
from hypothesis import given
from hypothesis import strategies as st

import vismt
from vismt.base import console
from vismt.base.errors import UserError
from vismt.config.yaml_text import parse_yaml
from vismt.data.decode import decode_bytes
from vismt.jobs import load_config, make_job

OUTCOMES = (*SOUND, "traceback", "hang", "silent", "changed")
# Kind -> the number of trials of the full campaign; "kills" are of each job.
KINDS = {
    "configurations": 1000,
    "adapters": 700,
    "checkpoints": 150,
    "bit flips": 400,
    "run folders": 200,
    "images": 200,
    "stores": 200,
    "kills": 40,
    "pairs": 10,
}


def drawn(strategy: st.SearchStrategy[bytes], count: int) -> list[bytes]:
    """Return examples of a strategy, the same in every campaign."""
    examples: list[bytes] = []

    @many(max(1, count))
    @given(strategy)
    def draw(data: bytes) -> None:
        examples.append(data)

    draw()
    return examples[:count]


def configurations(count: int, place: Path) -> Iterator[str]:
    """Damage the shipped configurations of every job."""
    for name in test_configs.SMALL:
        text = (test_configs.CONFIGS / name).read_text(encoding="utf8")
        damaged = st.one_of(damaged_trees(parse_yaml(text)).map(str.encode), damaged_texts(text))
        for data in drawn(damaged, count // len(test_configs.SMALL)):
            path = place / "damaged.yaml"
            path.write_bytes(data)
            yield tried(lambda path=path: make_job(load_config(path, []), place) is not None)


def adapters(count: int, place: Path) -> Iterator[str]:
    """Damage an adapter folder of each method."""
    methods = vismt.list_methods()
    folders = {method: vismt.save_adapter(adapted_vit(method), place / method) for method in methods}
    stock = small_vit()
    before = state_hash(stock)
    for number in range(count):
        random = Random(number)
        folder = copied(folders[random.choice(methods)], place / "a")
        test_adapter_files.damage(folder, random.choice(["json", "resealed", "tensors", "bytes"]), random)

        def load(folder: Path = folder) -> bool:
            vismt.unadapt(vismt.load_adapter(stock, folder))
            return state_hash(stock) == before

        result = tried(load)
        yield "changed" if state_hash(stock) != before else result


def checkpoints(count: int, place: Path) -> Iterator[str]:
    """Damage the checkpoints and the log of an interrupted training."""
    yield from (test_checkpoints.trial(place / "run", Random(number)) for number in range(count))


def bit_flips(count: int, place: Path) -> Iterator[str]:
    """Flip a bit of the only checkpoint, which must be refused."""
    for number in range(count):
        result = test_checkpoints.trial(place / "run", Random(number), flip_only=True)
        yield "silent" if result == "harmless" else result


def run_folders(count: int, place: Path) -> Iterator[str]:
    """Damage a file of a finished run."""
    for number in range(count):
        result, name = test_run_folders.trial(place / "run", Random(number))
        if result not in SOUND:
            print(f"{result}: trial {number}, {name}", file=sys.stderr)
        yield result


def images(count: int, place: Path) -> Iterator[str]:
    """Damage images of every format."""
    for data in drawn(st.sampled_from(test_images.BASES).flatmap(test_images.damaged), count):
        yield tried(lambda data=data: decode_bytes(data, "x.png").dtype == torch.uint8)


def stores(count: int, place: Path) -> Iterator[str]:
    """Damage stores of every kind, shared evenly among them."""
    for number, store in enumerate(test_stores.STORES):
        yield from test_stores.trials(store, place / store, range(number, count, len(test_stores.STORES)))


def kills(count: int, place: Path) -> Iterator[str]:
    """Stop runs of every job and start them again. Runs that ended before are not counted."""
    for job in CONFIGS:
        left, number = count, 0
        while left:
            result, was_killed = test_kills.kill_trial(job, place / f"{job}-{number}", Random(number))
            number += 1
            if was_killed:
                left -= 1
                yield result


def pairs(count: int, place: Path) -> Iterator[str]:
    """Start two runs of one pool in the same folder."""
    yield from (test_kills.two_at_once(place / str(number)) for number in range(count))


def main() -> int:
    """Run the campaign, print its table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind, count in KINDS.items():
        parser.add_argument(f"--{kind.replace(' ', '-')}", type=int, default=count, help=f"trials ({count})")
    options = vars(parser.parse_args())
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    console.set_quiet(True)
    failed = False
    print("| " + " | ".join(["Kind", "trials", *OUTCOMES, "CPU s"]) + " |", flush=True)
    print("|" + "---|" * (len(OUTCOMES) + 3), flush=True)
    for kind in KINDS:
        name = kind.replace(" ", "_")
        trials: Callable[[int, Path], Iterator[str]] = globals()[name]
        with tempfile.TemporaryDirectory() as folder:
            begin = sum(os.times()[:4])
            results = Counter(trials(options[name], Path(folder)))
        cells = [kind, results.total(), *(results[outcome] for outcome in OUTCOMES), round(sum(os.times()[:4]) - begin)]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
        failed |= any(results[outcome] for outcome in OUTCOMES if outcome not in SOUND)
    return int(failed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(str(error))
