"""Checkpoints into a ViT: strict about everything but an unwanted head."""

import pytest
import torch
from safetensors.torch import save_file

from vismt.backbones.position import resample
from vismt.backbones.timm_models import create
from vismt.backbones.weights import read_checkpoint
from vismt.base.errors import UserError
from vismt.robustness.classifier import load_classifier

NAME = "test_vit"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in create(NAME, 112, num_classes=7, seed=3).vit.state_dict().items()}


def saved(tmp_path, state, name="weights.safetensors"):
    path = tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_round_trip(tmp_path, state, name) -> None:
    backbone = create(NAME, 112, pretrained=str(saved(tmp_path, state, name)), num_classes=7)
    assert all(torch.equal(value, state[key]) for key, value in backbone.vit.state_dict().items())


def test_a_head_that_is_not_asked_for_is_left_out(tmp_path, state) -> None:
    backbone = create(NAME, 112, pretrained=saved(tmp_path, state))
    assert not any(key.startswith("head") for key in backbone.vit.state_dict())
    assert torch.equal(backbone.vit.pos_embed, state["pos_embed"])


@pytest.mark.parametrize("position", ["timm", "dino", "onnx"])
def test_the_position_table_is_resampled_the_way_asked_for(tmp_path, state, position) -> None:
    backbone = create(NAME, 64, pretrained=saved(tmp_path, state), position=position)  # 7 x 7 -> 4 x 4
    prefix = state["pos_embed"].shape[1] - 49
    assert torch.equal(backbone.vit.pos_embed, resample(state["pos_embed"], (4, 4), position, prefix))
    others = {"timm", "dino", "onnx"} - {position}
    assert not any(
        torch.equal(backbone.vit.pos_embed, resample(state["pos_embed"], (4, 4), other, prefix)) for other in others
    )


def test_wrapped_and_prefixed_checkpoints(tmp_path, state) -> None:
    wrapped = {"epoch": 3, "model": {f"module.vit.{key}": value for key, value in state.items()}}
    tensors = read_checkpoint(saved(tmp_path, wrapped, "run.pt"))
    assert tensors.keys() == state.keys() and torch.equal(tensors["norm.weight"], state["norm.weight"])
    lightning = {"epoch": 3, "state_dict": {f"model.{key}": value for key, value in state.items()}}
    assert read_checkpoint(saved(tmp_path, lightning, "last.pt")).keys() == state.keys()


def test_a_classifier_of_the_users_checkpoint_that_is_left_out_is_said(tmp_path, state, capsys) -> None:
    create(NAME, 112, pretrained=saved(tmp_path, state), num_classes=7, new_head=True)
    assert "the classifier 'head' of 7 classes is left out; heads are trained anew" in capsys.readouterr().out
    create(NAME, 112, pretrained=saved(tmp_path, state), num_classes=7)
    assert "left out" not in capsys.readouterr().out


def test_a_missing_head_is_fresh_and_said(tmp_path, state, capsys) -> None:
    headless = {key: value for key, value in state.items() if not key.startswith("head.")}
    backbone = create(NAME, 112, pretrained=saved(tmp_path, headless), num_classes=4)
    assert backbone.vit.head.weight.shape[0] == 4
    assert "fresh head for 4 classes" in capsys.readouterr().out


def test_a_head_of_another_size_in_the_users_checkpoint_is_an_error(tmp_path, state) -> None:
    with pytest.raises(UserError, match=r"'head.weight' is \(7, 64\) \(num_classes 7\), needed \(4, 64\)"):
        create(NAME, 112, pretrained=saved(tmp_path, state), num_classes=4)


def test_missing_unexpected_and_wrong_keys_are_named(tmp_path, state) -> None:
    path = saved(tmp_path, {key.replace("0.attn.qkv.bias", "0.attn.qkw.bias"): value for key, value in state.items()})
    message = r"1 keys missing \(first 'blocks.0.attn.qkv.bias'\), 1 unexpected \(first 'blocks.0.attn.qkw.bias'\)"
    with pytest.raises(UserError, match=message):
        create(NAME, 112, pretrained=path)
    path = saved(tmp_path, {**state, "norm.weight": torch.ones(9)})
    with pytest.raises(UserError, match=r"'norm.weight' is \(9,\), needed \(64,\)"):
        create(NAME, 112, pretrained=path)


def test_a_model_without_a_table_takes_only_timms_way(tmp_path) -> None:
    path = saved(tmp_path, dict(create("test_vit_relpos", 32).vit.state_dict()))
    with pytest.raises(UserError, match="position 'dino' needs a learned position table of a ViT"):
        create("test_vit_relpos", 32, pretrained=path, position="dino")


class Payload:
    """Something that only pickle can carry."""


def test_files_that_are_no_checkpoint(tmp_path, state) -> None:
    path = saved(tmp_path, state)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="is damaged or not a checkpoint"):
        read_checkpoint(path)
    torch.save({"model": Payload()}, tmp_path / "object.pt")
    with pytest.raises(UserError, match="holds more than tensors"):
        read_checkpoint(tmp_path / "object.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(UserError, match=r"no torch file|damaged"):
        read_checkpoint(tmp_path / "text.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(tmp_path / "empty.pt")
    torch.save({"epoch": 1}, tmp_path / "numbers.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        read_checkpoint(tmp_path / "numbers.pt")


@pytest.mark.parametrize("classes", [7, 4])
def test_a_new_head_is_drawn_from_the_seed_whatever_the_weights_have(tmp_path, state, capsys, classes: int) -> None:
    path = saved(tmp_path, state)  # with a head of 7 classes
    first, other = (
        create(NAME, 112, pretrained=path, num_classes=classes, new_head=True, seed=seed) for seed in (1, 2)
    )
    untrained = create(NAME, 112, num_classes=classes, seed=1)
    assert torch.equal(first.vit.head.weight, untrained.vit.head.weight)
    assert not torch.equal(first.vit.head.weight, other.vit.head.weight)
    assert torch.equal(first.vit.norm.weight, state["norm.weight"]) and "fresh head" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_batch_counts_that_a_checkpoint_lacks_are_filled_in_and_said(tmp_path, capsys, name) -> None:
    state = {
        key: value.clone() for key, value in create("test_resnet", 64, num_classes=7, seed=3).vit.state_dict().items()
    }
    counts = [key for key in state if key.endswith("num_batches_tracked")]
    path = saved(tmp_path, {key: value for key, value in state.items() if key not in counts}, name)
    loaded = create("test_resnet", 64, pretrained=path, num_classes=7).vit.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(value, state[key]) for key, value in loaded.items())
    assert f"{len(counts)} batch norms have no num_batches_tracked, which is set to 0" in capsys.readouterr().out
    assert load_classifier(path, architecture="test_resnet").num_classes == 7
    del state["bn1.running_mean"], state["bn1.num_batches_tracked"]
    with pytest.raises(UserError, match=r"2 keys missing \(first 'bn1.running_mean'\)"):
        create("test_resnet", 64, pretrained=saved(tmp_path, state, name), num_classes=7)
