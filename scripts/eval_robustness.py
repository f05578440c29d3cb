"""Clean and attacked accuracy of any timm classifier, with intervals and one record per image.

    python scripts/eval_robustness.py --model CHECKPOINT_OR_TIMM_NAME --data cifar10:test --images 200 --attack pgd apgd_ce

Runs `vismt attack --model ... --data ...` and passes other options on to it. Pixels are in [0, 1]; the model's normalisation
is applied to them.
"""

from __future__ import annotations

import argparse
import sys

from vismt.cli import main


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a timm name or a checkpoint file")
    parser.add_argument("--data", required=True, help="card or card:split")
    parser.add_argument("--attack", nargs="+", default=["pgd"], help="names of attacks (pgd)")
    return parser.parse_known_args()


if __name__ == "__main__":
    options, rest = arguments()
    attacks = [word for name in options.attack for word in ("--attack", name)]
    sys.exit(main(["attack", "--model", options.model, "--data", options.data, *attacks, *rest]))
