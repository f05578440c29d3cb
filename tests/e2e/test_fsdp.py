"""FSDP2 by two processes on CPUs: adapters and checkpoints are those of one process on both batches; what cannot is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from helpers.fsdp_ranks import REFUSED, RESUMED
from helpers.lm_parts import changed, ranked_task, save_interactions, save_lm, save_texts, sentiment_task
from helpers.ranks import of_two
from helpers.tiny import tiny_vit
from helpers.tiny_runs import CONFIGS
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.cli import main
from vismt.config.sections import TrainConfig
from vismt.engine import runtime
from vismt.engine.sharding import check_sharded
from vismt.metatune.protonet import ProtoNet
from vismt.multitask.balancing.base import make_balancer

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
# Adam divides a gradient by its own size, so that rounding is felt where a gradient is almost zero.
TOLERANCE = 1e-4
RATE = 1e-2
TRAIN = {"steps": 4, "lr": RATE, "checkpoint_every": 2}


def configurations(folder: Path) -> dict[str, dict]:
    """Return configurations with an arm for every method that runs under FSDP, all of four steps, by name."""
    films = save_texts(folder)["films"]
    walks = save_interactions(folder)
    lm = {
        "task": "lm",
        "model": {"name": str(save_lm(folder / "tiny"))},
        "tasks": [sentiment_task(films)],
        "adapt": {"method": "lora", "rank": 3, "targets": ["q_proj", "v_proj", "down_proj"]},
        "train": TRAIN,
        "batch": 4,
    }
    s2ft = {"method": "s2ft", "options": {"ratio": 0.2}}
    lisa = {"method": "lisa", "options": {"active": 1, "interval": 2, "exclude": ["lm_head", "embed_tokens"]}}
    polar = {"adapt.method": "polar", "adapt.rank": 2}
    arms = {
        "lora": {"train.checkpointing": True},
        "quantised": {"adapt.method": "pissa", "adapt.options": {"quantize": "nf4"}},
        "corda": {"adapt.method": "corda", "calibration": {"data": [f"{films}:train"], "rows": 8, "batch": 4}},
        "retracted": {**polar, "adapt.options": {"constraint": "qr"}},
    }
    drawn = {"polar": {**polar, "head": {"name": "vbll"}}, "s2ft": {"adapt": s2ft}, "lisa": {"adapt": lisa}}
    dense = {
        **CONFIGS["dense"],
        "adapt": {"method": "emtal", "rank": 3, "options": {"n_experts": 4, "cluster": False}},
        "fade": {"start": 0.0, "end": 0.5},
        "balancing": {"method": "uncertainty"},
        "batch": 3,
        "arms": {"emtal": {}, "full": {"adapt.method": "full", "adapt.options": {}, "fade": None}},
        "train": TRAIN,
    }
    return {
        "lm": {**lm, "arms": arms},
        "drawn": {**lm, "arms": drawn},
        "half": changed(lm, {"adapt.method": "pissa", "model.dtype": "bfloat16", "train.recompute": "cheap"}),
        "ilora": {
            **lm,
            "tasks": [ranked_task(walks)],
            "adapt": {"method": "ilora", "rank": 4, "targets": ["q_proj", "v_proj"], "options": {"n_experts": 2}},
            # Two processes would train it on twice the batches; it stays at its start.
            "recommender": {"width": 8, "steps": 3, "batch": 30, "lr": 1e-12},
        },
        "dense": dense,
        "multitask": {
            "task": "multitask",
            "model": {"name": "test_vit", "img_size": 32, "pretrained": False},
            "adapt": {"method": "lora", "rank": 3},
            "tasks": [{"name": "digits", "train": ["digits"], "test_share": 0.03, "limit": 40}],
            "batch": 8,
            "train": TRAIN,
        },
        "refused": {**lm, "adapt": s2ft},
    }


def trained(folder: Path) -> dict[str, Tensor]:
    """Return all tensors that the trainings of a run folder left, but those of checkpoints, by file and name."""
    (arms,) = folder.glob("*/arms")
    files = [path for path in arms.rglob("*.safetensors") if not path.name.startswith("checkpoint")]
    return {
        f"{path.relative_to(arms).parent}/{path.name.partition('-')[0]}/{name}": value
        for path in files
        for name, value in safetensors.torch.load_file(path).items()
    }


def different(first: dict[str, Tensor], second: dict[str, Tensor], tolerance: float) -> list[str]:
    """Return the names of tensors that differ by more than a tolerance."""
    assert first and first.keys() == second.keys()
    return [n for n in first if not torch.allclose(first[n].float(), second[n].float(), rtol=0, atol=tolerance)]


@pytest.mark.slow
def test_two_processes_train_the_adapters_of_one(tmp_path: Path) -> None:
    names = configurations(tmp_path)
    for name, config in names.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    codes = {name: codes.tolist() for name, codes in of_two("fsdp_ranks.py", tmp_path, **FSDP)[0].items()}
    assert codes.pop("refused") == [2] * len(REFUSED) and len(codes) == len(names) - 1
    for name, of_calls in codes.items():
        interruptions = len(names[name].get("arms", {"adapted": {}}))
        assert of_calls == [0, *([*[130] * interruptions, 0] if name in RESUMED else [])], name
        out = tmp_path / "one" / name
        assert main(["train", str(tmp_path / f"{name}.yaml"), "--out", str(out), "--quiet", "train.accumulate=2"]) == 0
        sharded = trained(tmp_path / "sharded" / name)
        assert different(sharded, trained(out), TOLERANCE) == []
        assert name not in RESUMED or different(sharded, trained(tmp_path / "resumed" / name), 0) == []
    # One process does not continue a checkpoint of the two, and could: on the first of the two batches of a step alone.
    out = tmp_path / "cut" / "half"
    assert main(["train", str(tmp_path / "half.yaml"), "--out", str(out), "--quiet"]) == 2
    next(out.glob("*/arms/processes.json")).unlink()
    assert main(["train", str(tmp_path / "half.yaml"), "--out", str(out), "--quiet"]) == 0
    continued, sharded = trained(out), trained(tmp_path / "sharded" / "half")
    assert different(continued, sharded, 4 * RATE) == [] and different(continued, sharded, 0) != []


class Holder(nn.Module):
    """An objective with one part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part


def sliced() -> nn.Module:
    model = tiny_vit()
    vismt.adapt(model, "s2ft", ratio=0.5)
    return model


@pytest.mark.parametrize(
    ("part", "settings", "words"),
    [
        (lambda: make_balancer("fairgrad", ["depth", "edge"]), {}, "balancing by the gradients of single tasks"),
        (lambda: make_balancer("famo", ["depth", "edge"]), {}, "'famo' computes losses again .* take 'uncertainty'"),
        (lambda: ProtoNet(tiny_vit(num_classes=0)), {}, "few-shot training .* take torchrun"),
        (tiny_vit, {"compile": True}, "train.compile"),
        (tiny_vit, {"precision": "fp16"}, "train.precision: .* take bf16"),
    ],
)
def test_what_cannot_be_sharded_is_named(part, settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=f"^FSDP: {words}.*; or launch without FSDP.$"):
        check_sharded(Holder(part()), TrainConfig(**settings))


def test_slices_and_loss_weighting_are_taken() -> None:
    for part in (sliced(), make_balancer("uncertainty", ["depth", "edge"])):
        check_sharded(Holder(part), TrainConfig(precision="bf16", checkpointing=True))


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"FSDP_VERSION": "1"}, "version 1; set fsdp_version to 2"),
        ({}, "version 1; set fsdp_version to 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "True"}, "fsdp_offload_params is not used"),
        ({"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "take train.checkpointing: true"),
    ],
)
def test_other_settings_of_the_launch_are_refused(monkeypatch, variables: dict[str, str], words: str) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", **variables}.items():
        monkeypatch.setenv(name, value)
    runtime.sharded.cache_clear()
    for _ in range(2):
        with pytest.raises(UserError, match=f"^FSDP: .*{words}"):
            runtime.processes()


def test_one_process_is_not_sharded(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    runtime.sharded.cache_clear()
    assert not runtime.sharded() and runtime.net_device() == runtime.processes().device
    monkeypatch.undo()
    runtime.sharded.cache_clear()
