"""Nothing foreign runs: code in model folders, pickles, programs that image formats start."""

from __future__ import annotations

import ast
import builtins
import os
from pathlib import Path

import pytest
import torch
from PIL import EpsImagePlugin, Image

import vismt
from vismt.backbones.lm import create_lm
from vismt.backbones.weights import read_checkpoint
from vismt.base.errors import UserError
from vismt.data.decode import decode_file
from vismt.data.images import open_images

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
# The argument without which a call may run or unpickle what it reads.
SAFE = {
    "from_pretrained": ("trust_remote_code", False),
    "load_dataset": ("trust_remote_code", False),
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "Image.open": ("formats", None),
}


def called(call: ast.Call) -> str | None:
    """Return the key of SAFE that a call stands for."""
    text = ast.unparse(call.func)
    if "PeftModel." in text or "PeftConfig." in text:  # reads settings and tensors of an adapter and no code
        return None
    methods = ("from_pretrained", "load_dataset")
    return next((name for name in SAFE if text == name or (name in methods and text.endswith(f".{name}"))), None)


def test_every_loader_has_its_safe_argument() -> None:
    found = set()
    for path in Path(vismt.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
            name = called(node) if isinstance(node, ast.Call) else None
            if name is None:
                continue
            found.add(name)
            argument, value = SAFE[name]
            given = next((word.value for word in node.keywords if word.arg == argument), None)
            assert given is not None, f"{path}:{node.lineno}: {name} without {argument}"
            assert value is None or ast.literal_eval(given) is value, f"{path}:{node.lineno}: {argument} is not {value}"
    assert {"from_pretrained", "torch.load", "np.load", "Image.open"} <= found


def test_code_in_a_model_folder_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    ran, folder = tmp_path / "ran", tmp_path / "lm"
    folder.mkdir()
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import PretrainedConfig\n"
    code += "class Foreign(PretrainedConfig):\n    model_type = 'foreign'\n"
    (folder / "foreign.py").write_text(code)
    classes = {name: "foreign.Foreign" for name in ("AutoConfig", "AutoModelForCausalLM")}
    (folder / "config.json").write_text(
        f'{{"model_type": "foreign", "auto_map": {str(classes).replace(chr(39), chr(34))}}}'
    )
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["foreign.Foreign", null]}}')
    monkeypatch.setattr(builtins, "input", lambda *_: "y")  # transformers asks where nothing is said
    with pytest.raises(UserError, match=r"language model .* cannot be loaded"):
        create_lm(folder)
    assert not ran.exists()
    # The folder is one whose code runs when it is asked to.
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert ran.exists()


class Runs:
    """Unpickling this calls os.mkdir."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "content", [[1, 2], torch.ones(2), {"a": 1}, {"a": {"b": [torch.ones(1)]}}, "text", None, Runs, b""], ids=str
)
def test_a_pytorch_file_without_a_state_dict_is_one_line(tmp_path: Path, content: object) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    path, ran = tmp_path / "pytorch_model.bin", tmp_path / "ran"
    if content == b"":
        path.write_bytes(b"")
    else:
        torch.save(Runs(ran) if content is Runs else content, path)
    for read in (create_lm, lambda folder: read_checkpoint(folder / "pytorch_model.bin")):
        with pytest.raises(UserError) as error:
            read(tmp_path)
        assert "\n" not in str(error.value)
    assert not ran.exists()


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file that a stand-in for Ghostscript makes when it is started."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho 10.0\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return tmp_path / "started"


def test_an_eps_called_png_starts_no_program(tmp_path: Path, ghostscript: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(EPS)
    with pytest.raises(UserError, match=r"x.png: cannot be decoded \(.*it is none of BMP, GIF, JPEG"):
        decode_file(path)
    assert not ghostscript.exists()
    with pytest.raises(Exception), Image.open(path) as image:  # noqa: B017 - Pillow's default runs it
        image.load()
    assert ghostscript.exists()


def test_nor_in_a_set_that_torchvision_opens(
    tmp_path: Path, ghostscript: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path))
    folder = tmp_path / "torchvision" / "e" / "eurosat" / "2750" / "Forest"
    folder.mkdir(parents=True)
    (folder / "1.jpg").write_bytes(EPS)
    card = tmp_path / "card.yaml"
    source = "{kind: torchvision, dataset: EuroSAT, root: e, splits: {all: 1}}"
    card.write_text(f"name: e\ntitle: e\nsource: e\nlicence: e\nclasses: 1\nsources: [{source}]\n")
    images = open_images(card)
    with pytest.raises(UserError, match="cannot be decoded"):
        images.read(0)
    assert not ghostscript.exists()
    assert EpsImagePlugin.gs_binary is None  # as it was: Pillow is the user's, too
