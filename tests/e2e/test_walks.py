"""Five users begin with their own files: the commands of their pages as typed, with an installed wheel, outside the checkout."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.installed import served
from helpers.own_images import write_folder
from helpers.pages import ROOT, blocks, commands
from PIL import Image
from safetensors.torch import save_file

from vismt.report.results import read_results
from vismt.robustness.corruptions import CORRUPTIONS
from vismt.storage.lines import read_lines

pytestmark = pytest.mark.slow

SHORT = ["train.steps=2", "train.warmup=0"]
TINY = ["model.name=test_vit", "model.pretrained=false", "model.position=timm", *SHORT]
SMALL = [*TINY, "model.img_size=32"]
EPISODES = ["evaluate.episodes=2", "evaluate.queries=2", "evaluate.ways=3", "evaluate.shots=[1]"]

OWN_MODEL = """
import torch, vismt
from torch import nn

net = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
results = vismt.evaluate_fewshot({"mine": net}, "my_images", ways=3, shots=1, queries=3, episodes=20, img_size=16, folder="own")
assert {(row.arm, row.data) for row in results} == {("mine", "my_images")}, results
print(results.report())
"""

# Without vismt, as those do who get the model.
SERVE = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = (kind.from_pretrained(sys.argv[1]) for kind in (AutoModelForCausalLM, AutoTokenizer))
print(tokenizer.decode(model.generate(**tokenizer("what colour", return_tensors="pt"), max_new_tokens=4)[0]))
assert "vismt" not in sys.modules
"""


def walk(
    page: str, heading: str, vismt: Path, folder: Path, more: Mapping[str, Sequence[str]], **swaps: str
) -> list[list[str]]:
    """Run the commands `vismt` of the first block under a heading of a page in `folder`; return their words.

    more: words that follow a command whose words after `vismt` begin so. swaps: words in the place of others. A word with HASH
    stands for the folder that the command before it made.
    """
    (code, *_) = blocks(ROOT / "docs" / page, "bash", heading)
    done = []
    for words in commands(code.code):
        if words[0] != "vismt":
            continue
        words = [_newest(folder, word) if "HASH" in word else swaps.get(word, word) for word in words[1:]]
        for start, extra in more.items():
            words += extra if " ".join(words).startswith(start) else []
        served(vismt, *words, folder=folder)
        done.append(words)
    return done


def _newest(folder: Path, place: str) -> str:
    found = sorted(folder.glob(place.replace("HASH", "*")), key=lambda path: path.stat().st_mtime)
    return str(found[-1].relative_to(folder))


def rows_of(folder: Path, run: str) -> list:
    (path,) = folder.glob(f"runs/{run}-*/results.jsonl")
    return read_results(path)


def test_a_benchmarker_of_few_shot_models(program: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "my_images", 12)
    write_folder(tmp_path / "my_examples", 2)
    (tmp_path / "my_examples" / "red").rename(tmp_path / "my_examples" / "crimson")
    shutil.copytree(tmp_path / "my_images" / "blue", tmp_path / "new_images")
    source = ["source.data=[photo_crops]", "model.block=null", *SMALL, *EPISODES]
    more = {"run fewshot.yaml": [*SMALL, *EPISODES], "run configs": source}
    done = walk("guides/fewshot.md", "Your own images", program, tmp_path, more)
    assert [words[0] for words in done] == ["init", "run", "run", "predict"]
    for run in ("fewshot", "cross_domain"):
        assert {row.data for row in rows_of(tmp_path, run)} == {"my_images"}
        assert {row.arm.removesuffix("+ridge") for row in rows_of(tmp_path, run)} == {"frozen", "adapted"}
    (table,) = tmp_path.rglob("predictions.csv")
    assert "crimson" in table.read_text() and len(table.read_text().splitlines()) == 13
    (tmp_path / "own.py").write_text(OWN_MODEL)
    served(program.parent / "python", "own.py", folder=tmp_path)
    assert (tmp_path / "own" / "report.html").exists()


def test_a_trainer_of_maps(program: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("images", "label", "depth_m"):
        (tmp_path / "my_rooms" / name).mkdir(parents=True)
    (tmp_path / "new_rooms").mkdir()
    for number in range(10):
        image = Image.fromarray(random.integers(0, 255, (32, 32, 3)).astype(np.uint8))
        image.save(tmp_path / ("new_rooms" if number < 2 else "my_rooms/images") / f"{number}.png")
        labels = random.choice([0, 1, 2, 255], (32, 32)).astype(np.uint8)
        depth = random.uniform(1, 2, (32, 32)).astype(np.float32)
        if number >= 2:
            Image.fromarray(labels).save(tmp_path / "my_rooms" / "label" / f"{number}.png")
            np.save(tmp_path / "my_rooms" / "depth_m" / f"{number}.npy", depth)
    walk("guides/dense.md", "Your own images and maps", program, tmp_path, {"run": [*TINY, "size=[32, 32]"]})
    assert {row.task for row in rows_of(tmp_path, "dense")} == {"semseg", "depth"}
    maps = [np.load(path) for path in tmp_path.glob("runs/*/predictions/*.npz")]
    assert len(maps) == 2 and all(np.isfinite(arrays["depth"]).all() for arrays in maps)


def test_an_evaluator_of_robustness(program: Path, tmp_path: Path) -> None:
    write_folder(tmp_path / "my_images", 4)
    model = timm.create_model("test_vit", img_size=32, num_classes=3)
    save_file(model.state_dict(), tmp_path / "my_model.safetensors")
    code = "from torch.nn import AdaptiveAvgPool2d, Flatten, Linear, Sequential\n\n\ndef my_function():\n"
    (tmp_path / "my_module.py").write_text(
        f"{code}    return Sequential(AdaptiveAvgPool2d(1), Flatten(), Linear(3, 3))\n"
    )
    torch.save({"state_dict": {"2.weight": torch.eye(3), "2.bias": torch.zeros(3)}}, tmp_path / "my_weights.pt")
    less = ["evaluate.images=4", "evaluate.attacks=[{name: fgsm, epsilon: 4/255}]"]
    more = {"attack": ["--attack", "fgsm", "--img-size", "32"], "run": less}
    page = "guides/robustness.md"
    walk(page, "Your own model and images", program, tmp_path, more, vit_small_patch16_224="test_vit")
    attacked = [row for path in tmp_path.glob("runs/*/results.jsonl") for row in read_results(path)]
    assert {row.data for row in attacked} == {"my_images"} and {row.n for row in attacked} >= {12, 4}
    assert len([*tmp_path.glob("runs/*/report.html")]) == 4
    corrupted = {row.family for row in attacked if row.kind == "corruption" and row.level == 3}
    assert corrupted == set(CORRUPTIONS)
    (kept,) = tmp_path.glob("runs/*my_weights*/adversarial/*/my_images/*.npz")
    arrays = dict(np.load(kept))
    assert len(arrays["ids"]) == len(arrays["answers"]) == 12 and arrays["attacked"].dtype == np.float32
    change = np.abs(arrays["attacked"] - arrays["clean"]).reshape(12, -1).max(1)
    assert (change <= 4.5 / 255 + 1e-6).all() and change.max() > 4 / 255
    (rows,) = tmp_path.glob("runs/*my_weights*/classifiers/*/records/*.jsonl")
    answers = {row["id"]: row["FGSM linf 4.5/255"] for row in read_lines(rows) if "id" in row}
    assert dict(zip(arrays["ids"].tolist(), arrays["answers"].tolist())) == answers


def test_a_fine_tuner_of_language_models(program: Path, tmp_path: Path) -> None:
    from helpers.lm_parts import save_lm

    rows = [{"prompt": f"what is {one}", "answer": two} for one in ("one", "two", "three") for two in ("sky", "grass")]
    (tmp_path / "my_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "what is one"}\n{"prompt": "what is two"}\n')
    model = f"model={{name: {save_lm(tmp_path / 'lm')}}}"
    more = {"run": [model, "tasks.own.chat=false", *SHORT], "predict": ["--new-tokens", "4"]}
    walk("guides/lm.md", "Fine-tune on your own rows", program, tmp_path, more)
    (answers,) = tmp_path.rglob("predictions.jsonl")
    assert len(answers.read_text().splitlines()) == 2
    (exported,) = {path.parent for path in tmp_path.rglob("config.json")} - {tmp_path / "lm"}
    assert served(program.parent / "python", "-c", SERVE, exported, folder=tmp_path).startswith("what colour")


def test_an_author_of_recommenders_and_methods(program: Path, tmp_path: Path) -> None:
    from helpers.lm_parts import save_interactions, save_lm

    shop = save_interactions(tmp_path).rename(tmp_path / "my_shop")
    for path in (shop / "rows").iterdir():
        path.rename(shop / path.name)
    page = ROOT / "docs" / "guides" / "lm.md"
    card, study = (blocks(page, "yaml", name)[0].code for name in ("Your own users and items", "Recommendation"))
    (shop / "card.yaml").write_text(card)
    study = study.replace("lastfm", "my_shop").replace("test_share: 0.2", 'test: ["my_shop:test"]')
    (tmp_path / "shop.yaml").write_text(study)
    fitted = ["recommender.steps=5", "recommender.width=8", "recommender.batch=32", *SHORT, "batch=4"]
    options = (
        "answer: judge, candidates: 4, negatives: 3, history: 3, length: 96, titles: false, question: '{candidate}?'"
    )
    model = f"model={{name: {save_lm(tmp_path / 'lm')}, first_block: 1}}"
    walk(
        "guides/lm.md",
        "Your own users and items",
        program,
        tmp_path,
        {"run": [model, f"tasks.held-out.options={{{options}}}", *fitted]},
    )
    assert {"frozen", "sasrec", "gru4rec", "adapted"} <= {row.arm for row in rows_of(tmp_path, "shop")}

    # a method of one's own, checked and run
    page = ROOT / "docs" / "extending.md"
    (code, check) = (blocks(page, "python", name)[0].code for name in ("A method", "Check it"))
    (tmp_path / "mine.py").write_text(re.sub(r"^model = .*", "", code, flags=re.S | re.M))
    served(program.parent / "python", "-c", f"import mine\n{check}", folder=tmp_path)
    write_folder(tmp_path / "my_images", 12)
    own = ["module=mine", "adapt={method: orthogonal, rank: 4}", "arms={lora: {}}"]
    swaps = {"new_images": "my_images/red"}
    walk("guides/multitask.md", "Your own images", program, tmp_path, {"run": [*SMALL, *own]}, **swaps)
    adapters = [json.loads(path.read_text()) for path in tmp_path.rglob("classification-*/**/adapter.json")]
    assert {about["method"] for about in adapters} == {"orthogonal"}
    assert len([*tmp_path.rglob("predictions.png")]) == 1
