"""Any timm classifier as a function of pixels: normalisation and size inside, checkpoints by file, one error each."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from vismt.errors import UserError
from vismt.robustness.attacks import AttackSpec, attack
from vismt.robustness.classifier import load_classifier

NAME = "test_vit"


def fresh(classes=7):
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=classes).eval()


def test_normalises_and_resizes_inside():
    net = load_classifier(NAME, 5, pretrained=False)
    images = torch.rand(2, 3, *net.size)
    config = net.net.pretrained_cfg
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
    assert torch.allclose(net(images), net.net((images - mean) / std), atol=1e-6)
    assert net(images).shape == (2, 5) and not net.training
    small = torch.rand(2, 3, 20, 30)
    big = torch.nn.functional.interpolate(small, size=net.size, mode="bilinear", antialias=True)
    assert torch.allclose(net(small), net(big), atol=1e-5)
    # Normalisation is no part of the weights.
    assert set(net.state_dict()) == {f"net.{key}" for key in net.net.state_dict()}


def test_attack_runs_at_the_images_own_size():
    net = load_classifier(NAME, 5, pretrained=False)
    images = torch.rand(2, 3, 20, 20)
    found = attack(net, images, torch.tensor([0, 1]), AttackSpec(epsilon=0.02, steps=2), num_classes=5)
    assert found.shape == images.shape and (found - images).abs().max() > 0.005


@pytest.mark.parametrize("wrap", ["safetensors", "plain", "state_dict", "module"])
def test_checkpoint_files(tmp_path, wrap):
    source = fresh()
    path = tmp_path / ("model.safetensors" if wrap == "safetensors" else "weights.pth")
    state = source.state_dict()
    if wrap == "safetensors":
        save_file(state, path)
    elif wrap == "module":
        torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path)
    else:
        torch.save({"state_dict": state, "epoch": 3} if wrap == "state_dict" else state, path)
    net = load_classifier(path, architecture=NAME)
    assert net.net.num_classes == 7
    assert all(torch.equal(state[key], value) for key, value in net.net.state_dict().items())


def test_folder_with_config(tmp_path):
    save_file(fresh().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="which timm model is it"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": NAME}))
    assert load_classifier(tmp_path, 7).net.num_classes == 7
    with pytest.raises(UserError, match="its head has 7 classes, 10 are asked for"):
        load_classifier(tmp_path, 10)


def test_errors(tmp_path):
    with pytest.raises(
        UserError, match=r"'vit_smal_patch16_224' is neither a timm name.*Near: 'vit_small_patch16_224'"
    ):
        load_classifier("vit_smal_patch16_224")
    with pytest.raises(UserError, match="timm cannot build it"):
        load_classifier("test_vit.no_such_tag", pretrained=False)
    with pytest.raises(UserError, match="is not there"):
        load_classifier(tmp_path / "no.pth", architecture=NAME)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        load_classifier(broken, architecture=NAME)
    torn = tmp_path / "torn.pth"
    torch.save({"state_dict": fresh().state_dict()}, torn)
    torn.write_bytes(torn.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        load_classifier(torn, architecture=NAME)
    other = tmp_path / "other.safetensors"
    save_file({"weight": torch.ones(2)}, other)
    with pytest.raises(UserError, match=f"does not fit {NAME}"):
        load_classifier(other, architecture=NAME)
    numbers = tmp_path / "numbers.pth"
    torch.save({"a": 1}, numbers)
    with pytest.raises(UserError, match="holds no state dict"):
        load_classifier(numbers, architecture=NAME)


def test_weights_out_of_reach_are_one_line(monkeypatch):
    def unreachable(name, **options):
        raise OSError("no route to the hub\nlong tail")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(UserError, match=r"cannot build it or get its weights \(no route to the hub\)\.$"):
        load_classifier(NAME)


def test_a_head_of_another_size_is_refused(monkeypatch):
    real = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: real(name, **options))
    with pytest.raises(UserError, match="weights know 1000 classes, 10 are asked for"):
        load_classifier(NAME, 10)
