"""Measure how robust a timm classifier is on a folder of images.

The script measures clean accuracy, accuracy under attacks and corruptions, and checks whether the attacks can be trusted.

python examples/audit_timm.py my_images resnet18.a1_in1k

`my_images` has a folder of images for each class, in the order of the outputs.
"""

import sys
from pathlib import Path

import torch

import vismt


def main(
    images: str | Path, model: str | torch.nn.Module, out: str | Path = "runs/audit", count: int = 200
) -> vismt.StudyResults:
    """Return the numbers. The report is in the folder."""
    results = vismt.audit(
        model,
        images,
        attacks=[{"name": "pgd", "epsilon": "1/255"}, {"name": "strong", "epsilon": "1/255"}],
        corruptions=[{"name": "gaussian_noise", "severities": [1, 3, 5]}],
        images=count,
        folder=out,
    )
    print(results)
    print(results.report())
    return results


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/audit_timm.py IMAGES MODEL")
    try:
        main(*sys.argv[1:])
    except (OSError, vismt.UserError) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
