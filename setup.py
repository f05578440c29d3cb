"""Packaging: metadata, dependencies and the console script. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

REPORT = ["matplotlib>=3.8"]
QUICKSTART = ["scikit-image>=0.22", "scikit-learn>=1.3", "onnx>=1.15", *REPORT]
LLM = ["transformers>=4.46", "peft>=0.13", "gguf>=0.10", "tokenizers"]
LOG = ["tensorboard>=2.14", "wandb"]
METADATASET = ["h5py>=3.8"]
TEST = ["pytest>=8", "pytest-xdist>=3.5", "hypothesis>=6.100", "onnxruntime>=1.17", *QUICKSTART, *LLM, *METADATASET]
META = ["learn2learn==0.2.0"]


def shared_files(*folders: str) -> list[tuple[str, list[str]]]:
    """Cards, split lists and configs travel with a wheel under <prefix>/share/vismt."""
    found: dict[str, list[str]] = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".yaml", ".json", ".txt", ".py"}:
                relative = path.relative_to(ROOT)
                found.setdefault(f"share/vismt/{relative.parent.as_posix()}", []).append(str(relative))
    return sorted(found.items())


setup(
    name="vismt",
    version="0.1.0",
    description="Low-rank adaptation methods for vision transformers and language models that do what their papers say",
    long_description=(ROOT / "README.md").read_text(encoding="utf8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["vismt", "vismt.*"]),
    package_data={"vismt.backbones": ["cards/*.yaml"]},
    data_files=shared_files("datasets", "configs"),
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "timm>=1.0.9",
        "einops>=0.8",
        "numpy>=1.26",
        "scipy>=1.11",
        "threadpoolctl>=3.1",
        "safetensors>=0.4",
        "pyyaml>=6",
        "accelerate>=1.0",
        "jsonargparse[signatures]>=4.35",
        "rich>=13",
        "torchmetrics>=1.4",
        "torchattacks>=3.5.1",
        "pillow>=10",
        "filelock>=3.12",
    ],
    extras_require={
        "meta": META,
        "metadataset": METADATASET,
        "llm": LLM,
        "quickstart": QUICKSTART,
        "report": REPORT,
        "log": LOG,
        "test": TEST,
        "all": [*META, *LLM, *QUICKSTART, *LOG, *TEST],
    },
    entry_points={"console_scripts": ["vismt=vismt.cli:main"]},
)
