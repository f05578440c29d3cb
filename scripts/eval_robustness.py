"""How robust is a timm classifier that never saw vismt? Clean and attacked accuracy with intervals, one record an image.

    python scripts/eval_robustness.py --model CHECKPOINT_OR_TIMM_NAME --data cifar10:test --images 200 --attack pgd apgd_ce

The same as `vismt attack --model ... --data ...`; the model takes pixels in [0, 1] and its own normalisation is applied.
"""

from __future__ import annotations

import argparse
import sys

from vismt.cli import main


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--attack", nargs="+", default=["pgd"])
    return parser.parse_known_args()


if __name__ == "__main__":
    chosen, more = arguments()
    attacks = [word for name in chosen.attack for word in ("--attack", name)]
    sys.exit(main(["attack", "--model", chosen.model, "--data", chosen.data, *attacks, *more]))
