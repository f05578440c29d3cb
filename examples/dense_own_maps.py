"""Segmentation and depth on your own images.

The folder has images/, label/ (PNG files of class numbers) and depth_m/ (npy files of metres).

python examples/dense_own_maps.py my_maps 21        (21 classes, 255 is void)
"""

import sys
from pathlib import Path

import yaml

import vismt


def main(
    maps: str | Path,
    classes: int,
    out: str | Path = "runs/dense_own_maps",
    name: str = "vit_small_patch14_imgfocus",
    size: int = 112,
    steps: int = 100,
    pretrained: bool = True,
) -> vismt.StudyResults:
    """Return the numbers. `results.model()` is the stock ViT with merged weights."""
    card = Path(out) / "card.yaml"
    card.parent.mkdir(parents=True, exist_ok=True)
    forms = {name: name for name in ("label", "depth_m") if (Path(maps) / name).is_dir()}
    source = {"kind": "dense", "root": str(Path(maps).resolve()), "image": "images", "maps": forms, "void": 255}
    card.write_text(yaml.safe_dump({"name": Path(maps).name, "classes": int(classes), "sources": [source]}))
    tasks = {"label": {"name": "semseg", "classes": int(classes)}, "depth_m": {"name": "depth"}}
    results = vismt.train(
        {
            "task": "multitask",
            "model": {"name": name, "pretrained": pretrained},
            "adapt": {"method": "lora", "rank": 8},
            "data": {"train": [card], "test_share": 0.2},
            "size": [size, size],
            "tasks": [tasks[form] for form in forms],
            "head": {"name": "linear"},
            "batch": 2,
            "train": {"steps": steps, "lr": 1.0e-3},
        },
        Path(out) / "run",
    )
    print(results)
    print(results.report())
    return results


if __name__ == "__main__":
    if len(sys.argv) != 3 or not sys.argv[2].isdigit():
        sys.exit("usage: python examples/dense_own_maps.py MAPS CLASSES")
    try:
        main(sys.argv[1], int(sys.argv[2]))
    except (OSError, vismt.UserError) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")
