"""Few-shot benchmark of one frozen backbone on any data cards, clean and under PGD.

    python scripts/bench_fewshot.py --model vit_small_patch14_imgfocus --block 10 --position onnx --size 70 \
        --data flowers102-2843 dtd10 --shots 1 5 --episodes 200 --epsilon 4.5/255

Runs the same job as `vismt run` with `train: null`; records, tables and report are in the run folder.
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
    parser.add_argument("--size", type=int, help="image size in pixels (the model's)")
    parser.add_argument("--block", type=int, help="number of the block that gives the features (the last)")
    parser.add_argument("--position", default="timm", help="how the position table is resampled: timm, dino or onnx")
    parser.add_argument("--data", nargs="+", required=True, help="data cards; card:split for one split")
    parser.add_argument("--ways", type=int, default=5)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--queries", type=int, default=15)
    parser.add_argument("--episodes", type=int, default=600)
    parser.add_argument("--epsilon", help="PGD-10 radius, for example 4.5/255 (clean images only)")
    parser.add_argument("--random-weights", action="store_true")
    parser.add_argument("--out", default="runs")
    return parser.parse_args()


def config(options: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration that `vismt run` takes."""
    return {
        "title": f"{options.model}, frozen",
        "model": {
            "name": options.model,
            "img_size": options.size,
            "block": options.block,
            "position": options.position,
            "pretrained": not options.random_weights,
        },
        "adapt": None,
        "train": None,
        "evaluate": {
            "data": options.data,
            "models": ["frozen"],
            "ways": options.ways,
            "shots": options.shots,
            "queries": options.queries,
            "episodes": options.episodes,
            "attacks": [{"name": "pgd", "epsilon": options.epsilon}] if options.epsilon else [],
        },
    }


if __name__ == "__main__":
    options = arguments()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench_fewshot.yaml"
        path.write_text(yaml.safe_dump(config(options)))
        sys.exit(main(["run", str(path), "--out", options.out]))
