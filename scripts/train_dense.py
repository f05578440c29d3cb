"""Train one ViT on several dense tasks, with one method and one seed, from flags instead of a configuration file.

    python scripts/train_dense.py --model vit_small_patch14_imgfocus --position onnx --data camvid --split train --test test \
        --tasks semseg:11 edge --size 168 224 --method emtal --rank 4 --steps 200

Runs the same job as `vismt run` on configs/dense/*.yaml, which also compare arms and seeds.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from vismt.cli import main


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="asset or timm name")
    parser.add_argument("--position", default="timm", help="how the position table is resampled: timm, dino or onnx")
    parser.add_argument("--data", nargs="+", required=True, help="dense data cards")
    parser.add_argument("--split", default="train", help="split of the cards to train on (train)")
    parser.add_argument("--test", default="test", help="split of the cards to test on (test)")
    tasks = "semseg:CLASSES, depth, normals, edge, saliency, parts, classify:CLASSES"
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help=tasks)
    parser.add_argument("--size", type=int, nargs=2, required=True, help="height and width, multiples of the patch")
    parser.add_argument("--head", default="segformer", help="linear, conv, segformer or dpt (segformer)")
    parser.add_argument("--method", default="lora", help="see `vismt list`; full: whole backbone, head: heads alone")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--balancing", help="balancing of the task losses, for example fairgrad (the weighted sum)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--out", default="runs")
    return parser.parse_args()


def config(options: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration that `vismt run` takes."""
    splits = {"train": options.split, "test": options.test}
    return {
        "task": "multitask",
        "title": f"{options.model}, {options.method}, {' '.join(options.tasks)}",
        "seed": options.seed,
        "model": {"name": options.model, "position": options.position, "pretrained": not options.random_weights},
        "adapt": {"method": options.method, "rank": options.rank},
        "fade": {} if options.method == "emtal" else None,
        "data": {part: [f"{name}:{split}" for name in options.data] for part, split in splits.items()},
        "tasks": [task(text) for text in options.tasks],
        "size": options.size,
        "head": {"name": options.head},
        "batch": options.batch,
        "balancing": {"method": options.balancing} if options.balancing else None,
        "train": {"steps": options.steps, "lr": options.lr, "warmup": options.steps // 10, "checkpoint_every": 100},
    }


def task(text: str) -> dict[str, Any]:
    """Return the configuration of one task, "depth" or "semseg:11"; what is not a number is left for the job to refuse."""
    name, _, classes = text.partition(":")
    count = int(classes) if classes.isdecimal() else classes
    return {"name": name, "classes": count} if classes else {"name": name}


if __name__ == "__main__":
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train_dense.yaml"
        path.write_text(yaml.safe_dump(config(options)))
        sys.exit(main(["run", str(path), "--out", options.out]))
