"""Classifiers of pixels: normalisation and size inside, checkpoints by file, users' functions, one error each."""

import json
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

from vismt.base.errors import UserError
from vismt.robustness.attacks.attacks import AttackSpec, attack
from vismt.robustness.classifier import classifier_from_function, classifier_of, load_classifier

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
    # The weights do not contain the normalisation.
    assert set(net.state_dict()) == {f"net.{key}" for key in net.net.state_dict()}


def test_attack_runs_at_the_images_own_size():
    net = load_classifier(NAME, 5, pretrained=False)
    images = torch.rand(2, 3, 20, 20)
    labels = net(images).argmax(1)
    attacked = attack(net, images, labels, AttackSpec(epsilon=0.02, steps=2), num_classes=5)
    assert attacked.shape == images.shape and (attacked - images).abs().max() > 0.005


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


def test_a_checkpoint_of_a_module_of_ones_own(user_module, tmp_path):
    with open(tmp_path / "user_classifiers.py", "a") as file:
        file.write(OWN_NET)
    torch.manual_seed(0)
    own = torch.nn.Linear(3, 5)
    torch.save({"state_dict": {f"head.{name}": value for name, value in own.state_dict().items()}}, "own.pt")
    net = load_classifier("own.pt", architecture=f"{user_module}:Own", img_size=8)
    images = torch.rand(2, 3, 8, 8)
    assert net.num_classes == 5 and torch.allclose(net(images), own(images.mean((2, 3))), atol=1e-6)
    assert classifier_from_function(f"{user_module}:Own", 8)[1] == 5
    with pytest.raises(UserError, match=r"or the size of its images \(img_size\)"):
        load_classifier("own.pt", architecture=f"{user_module}:Own")
    with pytest.raises(UserError, match=f"does not fit {user_module}:Net"):
        load_classifier("own.pt", architecture=f"{user_module}:Net", img_size=8)


def test_folder_with_config(tmp_path):
    save_file(fresh().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="which model is it"):
        load_classifier(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"architecture": NAME}))
    assert load_classifier(tmp_path, 7).net.num_classes == 7
    with pytest.raises(UserError, match="its head has 7 classes, not 10"):
        load_classifier(tmp_path, 10)


def test_errors(tmp_path):
    with pytest.raises(
        UserError, match=r"'vit_smal_patch16_224' is neither a timm name.*Near: 'vit_small_patch16_224'"
    ):
        load_classifier("vit_smal_patch16_224")
    with pytest.raises(UserError, match="timm cannot build it"):
        load_classifier("test_vit.no_such_tag", pretrained=False)
    with pytest.raises(UserError, match="no such file"):
        load_classifier(tmp_path / "no.pth", architecture=NAME)
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    with pytest.raises(UserError, match="is damaged"):
        load_classifier(broken, architecture=NAME)
    torn = tmp_path / "torn.pth"
    torch.save({"state_dict": fresh().state_dict()}, torn)
    torn.write_bytes(torn.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"is damaged|not a torch file"):
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
    with pytest.raises(UserError, match="its weights have 1000 classes, not 10"):
        load_classifier(NAME, 10)


def test_a_size_that_does_not_fit_names_those_that_do():
    for make, message in (
        (lambda: classifier_of(timm.create_model("test_maxvit"), 80), "MaxxVit: use 160 x 160"),
        (lambda: classifier_of(timm.create_model("test_convnext"), 16), "ConvNeXt: use 32 x 32"),
        (lambda: classifier_of(fresh(), 40), "VisionTransformer: use 32 x 32 or 64 x 64"),
        (lambda: load_classifier("test_maxvit", pretrained=False, img_size=80), "test_maxvit: use 64 x 64 or 96 x 96"),
    ):
        with pytest.raises(UserError, match=rf"does not fit the stages of {message}\.$"):
            make()


FUNCTIONS = """
import torch
from torch import nn

threshold = 0.5


class Net(nn.Module):
    num_classes = 4

    def forward(self, images):
        return images.mean((2, 3)).repeat(1, 2)[:, :4]


def load_pair():
    return nn.Flatten(), 12


def load_module():
    return Net()


def load_nothing():
    pass


def load_triple():
    return Net(), 4, "more"


def load_without_number():
    return nn.Flatten()


def load_text_number():
    return Net(), "4"


def load_boolean():
    return Net(), True


def load_single_class():
    return Net(), 1


def load_with_error():
    raise RuntimeError("no weights here\\nsecond line")


def load_with_exit():
    raise SystemExit(3)


def load_with_argument(path):
    return Net()
"""


OWN_NET = """
class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 5)

    def forward(self, images):
        return self.head(images.mean((2, 3)))
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """A module in the current folder that is not on the path."""
    (tmp_path / "user_classifiers.py").write_text(FUNCTIONS)
    (tmp_path / "broken_classifiers.py").write_text("import no_such_package_at_all\n")
    (tmp_path / "unparsable_classifiers.py").write_text("def load(:\n")
    monkeypatch.chdir(tmp_path)
    yield "user_classifiers"
    sys.modules.pop("user_classifiers", None)


def test_a_function_returns_the_classifier_and_its_classes(user_module):
    path = list(sys.path)
    net, classes = classifier_from_function(f"{user_module}:load_pair")
    assert isinstance(net, torch.nn.Flatten) and classes == 12 and not net.training and sys.path == path
    net, classes = classifier_from_function(f"{user_module}:load_module")
    assert classes == 4 and net(torch.rand(2, 3, 5, 5)).shape == (2, 4)
    assert classifier_from_function(f"{user_module}:Net")[1] == 4  # a class is a function that returns a module


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("user_classifiers", "give 'module:function'"),
        (":load_pair", "give 'module:function'"),
        ("user_classifiers:", "give 'module:function'"),
        ("user_clasifiers:load_pair", "cannot import 'user_clasifiers' (ModuleNotFoundError: No module named"),
        ("user_clasifiers:load_pair", "add that folder to PYTHONPATH"),
        ("user_classifiers.part:load", "cannot import 'user_classifiers.part' (ModuleNotFoundError: "),
        ("..user_classifiers:load", "cannot import '..user_classifiers' (TypeError: "),
        ("broken_classifiers:load", "(ModuleNotFoundError: No module named 'no_such_package_at_all')."),
        ("unparsable_classifiers:load", "cannot import 'unparsable_classifiers' (SyntaxError: "),
        ("user_classifiers:load_pairs", "has no 'load_pairs'. Near: 'load_pair'"),
        ("user_classifiers:threshold", "'threshold' is float, not a function"),
        ("user_classifiers:load_with_error", "the function failed (RuntimeError: no weights here)."),
        ("user_classifiers:load_with_exit", "the function failed (SystemExit: 3)."),
        ("user_classifiers:load_with_argument", "the function failed (TypeError: load_with_argument() missing 1"),
        ("user_classifiers:load_nothing", "the function returned NoneType; need (nn.Module, number of classes)"),
        ("user_classifiers:load_triple", "the function returned Net, int, str; need"),
        ("user_classifiers:load_without_number", "Flatten came with None as its number of classes"),
        ("user_classifiers:load_text_number", "Net came with '4' as its number of classes"),
        ("user_classifiers:load_boolean", "Net came with True as its number of classes"),
        ("user_classifiers:load_single_class", "Net came with 1 as its number of classes"),
    ],
)
def test_every_failure_of_a_function_is_one_line(user_module, name, words):
    with pytest.raises(UserError) as caught:
        classifier_from_function(name)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"model '{name}': ")


def test_a_checkpoint_normalises_as_it_is_told_and_a_line_says_how(tmp_path, capsys):
    path = tmp_path / "own.pth"
    torch.save({"state_dict": {f"model.{key}": value for key, value in fresh().state_dict().items()}}, path)
    given = load_classifier(path, architecture=NAME, mean=[0.1, 0.2, 0.3], std=[1, 1, 2])
    assert given.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3]) and given.std.flatten().tolist() == [1, 1, 2]
    assert capsys.readouterr().out == "model   own.pth   normalises by mean 0.1 0.2 0.3, std 1 1 2\n"
    guessed = load_classifier(path, architecture=NAME)
    assert guessed.mean.flatten().tolist() == list(guessed.net.pretrained_cfg["mean"])
    assert "which timm's test_vit has. The checkpoint names none: set mean and std" in capsys.readouterr().out
    about = {"architecture": "test_vit", "pretrained_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    named = load_classifier(path)
    assert named.mean.flatten().tolist() == [0, 0, 0] and "names none" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"mean \[0.5\]; it needs 3 numbers"):
        load_classifier(path, mean=[0.5])
