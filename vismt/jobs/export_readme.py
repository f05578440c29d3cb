"""The README.md of an exported folder: the lines that load it without vismt, and what its numbers are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vismt.jobs.graphs import NAMES, PREPROCESSING, SQUARE
from vismt.storage.files import JsonObject, read_json

PHOTO = 'image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")'
TIMM = f"""\
import timm, torch
from PIL import Image, ImageOps

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
{PHOTO}
with torch.no_grad():
    outputs = model(transform(image)[None])[0]
"""
OF_CLASSES = """\
probabilities = outputs.softmax(0)
print(model.pretrained_cfg["label_names"][int(probabilities.argmax())], float(probabilities.max()))
"""
WRAPPED = f"""\
import torch
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained(".").eval()
{PHOTO}
with torch.no_grad():
    outputs = model(**AutoImageProcessor.from_pretrained(".")(image, return_tensors="pt")).logits[0]
probabilities = outputs.softmax(0)
print(model.config.id2label[int(probabilities.argmax())], float(probabilities.max()))
"""
_TEXT = 'inputs = AutoTokenizer.from_pretrained(".")("Once upon a time", return_tensors="pt")'
TRANSFORMERS = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".").eval()
{_TEXT}
print(AutoTokenizer.from_pretrained(".").decode(model.generate(**inputs, max_new_tokens=20, do_sample=False)[0]))
"""
_TOKENS = f"""\
import torch
from transformers import AutoTokenizer

{_TEXT}
(outputs,) = torch.export.load("model.pt2").module()(inputs["input_ids"], inputs["attention_mask"])
print(outputs.shape)
"""
# A graph takes an image of its own size, which these lines make.
CROPPED = """\
width, height = ({width} * side // min(image.size) for side in image.size)
left, top = round((width - {width}) / 2), round((height - {height}) / 2)
image = image.resize((width, height), Image.BILINEAR).crop((left, top, left + {width}, top + {height}))
pixels = numpy.asarray(image, "float32").transpose(2, 0, 1)[None] / 255
"""
PADDED = """\
factor = min({width} / image.width, {height} / image.height)
width, height = (max(1, min(most, round(side * factor))) for side, most in zip(image.size, ({width}, {height})))
pixels = numpy.full((1, 3, {height}, {width}), 0.5, "float32")
image = image.resize((width, height), Image.BILINEAR)
pixels[0, :, :height, :width] = numpy.asarray(image, "float32").transpose(2, 0, 1) / 255
"""
_RUN = {
    "onnx": 'outputs = onnxruntime.InferenceSession("model.onnx").run(None, {"images": pixels})\n',
    "torch": 'outputs = torch.export.load("model.pt2").module()(torch.from_numpy(pixels))\n',
}
OF_LABELS = """\
labels = json.load(open("preprocessing.json", encoding="utf8"))["outputs"]["{output}"]["label_names"]
print(labels[int(outputs[0].argmax())])
"""
PEFT = """\
import {library}
from peft import PeftModel

base = {base}
model = PeftModel.from_pretrained(base, ".").eval()
"""


def readme(folder: Path, form: str, title: str, base: str, adapted: str) -> str:
    """Return the README.md of an export.

    Args:
        folder: The written export.
        form: One of the formats of `vismt export`.
        title: What was exported, for the heading.
        base: Expression that builds the model below a peft adapter.
        adapted: Name of the model that was adapted.
    """
    if form == "peft":
        code = PEFT.format(library=base.partition(".")[0], base=base)
        note = f"\n`base` needs the weights of the model that was adapted, `{adapted}`.\n"
        return _text(folder, title, {"peft": code}, {}) + note
    about = read_json(folder / (PREPROCESSING if form in NAMES else "config.json"), f"export '{folder}'")
    if form in NAMES:
        return _text(folder, title, {form: _graph(form, about)}, next(iter(about["outputs"].values())))
    if "architecture" not in about:
        return _text(folder, title, {"transformers": TRANSFORMERS}, {})
    if about["num_classes"]:
        return _text(folder, title, {"timm": TIMM + OF_CLASSES, "transformers": WRAPPED}, about)
    return _text(folder, title, {"timm": f"{TIMM}print(outputs.shape)\n"}, about)


def _graph(form: str, about: JsonObject) -> str:
    if "input_ids" in about["input"]:
        return _TOKENS
    height, width = about["input"]["shape"][-2:]
    prepare = (CROPPED if about["resize"] == SQUARE else PADDED).format(width=width, height=height)
    output, known = next(iter(about["outputs"].items()))
    labels = len(about["outputs"]) == 1 and "label_names" in known
    answer = OF_LABELS.format(output=output) if labels else "print([output.shape for output in outputs])\n"
    libraries = ["json"] * labels + ["numpy", "onnxruntime" if form == "onnx" else "torch"]
    head = f"import {', '.join(libraries)}\nfrom PIL import Image, ImageOps\n\n{PHOTO}\n"
    return f"{head}{prepare}{_RUN[form]}{answer}"


def _text(folder: Path, title: str, code: Mapping[str, str], about: JsonObject) -> str:
    """Return the page. about: what is known of the outputs."""
    blocks = "\n".join(f"With {library}:\n\n```python\n{lines}```\n" for library, lines in code.items())
    notes = []
    if about.get("label_space") == "separate":
        notes.append("Each task has its own softmax, over the outputs whose names begin with the task's name.")
    if "features" in about:
        block, pool = about["features"].get("block"), about["features"].get("pool")
        which = f"block {'last' if block is None else block}, pool {pool or 'of the model'}"
        notes.append(f"The model has no classes. The run classified by its features ({which}).")
    if (folder / "temperature.json").exists():
        notes.append("`temperature.json` has a temperature that was fitted on validation images, and how to apply it.")
    if (folder / "heads.safetensors").exists():
        notes.append(
            "`heads.safetensors` has the heads of the tasks. The formats onnx and torch have them in the graph."
        )
    return f"# {title}\n\nRun the lines in this folder.\n\n{blocks}" + "".join(f"\n{note}\n" for note in notes)
