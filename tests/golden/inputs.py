"""Models and data of the golden files, rebuilt from scratch. Frozen: changed values make the golden files unreadable.

Every weight is a multiple of a power of two drawn by NumPy's legacy generator, which has a frozen stream: the bits are the same
on every machine and with every version of torch, timm and transformers. All paths in the run folders are relative to the
current folder.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import Tensor, nn

SIDE = 32  # of the classified images
ROOM = (32, 48)  # height and width of the images with maps
TEXT = (
    "a bad good film plot was very dull bright and the of it Review : Sentiment negative positive Answer one two "
    "three four five six seven eight sky blue"
)
WORDS = TEXT.split()
LM_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
}


# ---- models ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fill_exactly(model: nn.Module, seed: int) -> nn.Module:
    """Overwrite every parameter: weights of norms near 1, other vectors near 0, matrices within +-1.7 / sqrt(inputs)."""
    draws = np.random.RandomState(seed)
    for _, parameter in sorted(model.named_parameters()):
        values = torch.from_numpy(draws.randint(-128, 129, tuple(parameter.shape)) / 128.0)
        if parameter.ndim > 1:
            inputs = parameter[0].numel() if parameter.shape[0] > 1 else parameter.shape[-1]
            values = values * 2.0 ** round(math.log2(1.7 / math.sqrt(inputs)))
        else:
            values = values / 8 + float((parameter == 1).all())
        parameter.copy_(values)
    return model.eval()


def golden_vit() -> nn.Module:
    """Return a timm ViT of 2 blocks and width 32 for images of 16 px, with 5 classes."""
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    return fill_exactly(timm.create_model("vit_tiny_patch16_224", **shape), 1)


def golden_lm(kind: str, vocabulary: int = 40) -> nn.Module:
    """Return a causal LM of 2 blocks and width 32: "llama" (grouped queries) or "gpt2" (Conv1D, tied embeddings)."""
    import transformers

    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if kind == "gpt2" else {}
    shape = {**LM_SHAPE, "vocab_size": vocabulary, "max_position_embeddings": 128, **dropout}
    config = transformers.AutoConfig.for_model(kind, **shape)
    return fill_exactly(transformers.AutoModelForCausalLM.from_config(config), 2)


def golden_model(kind: str) -> nn.Module:
    """Return the model that a golden adapter was made for: "vit", "llama" or "gpt2"."""
    return golden_vit() if kind == "vit" else golden_lm(kind)


def golden_input(kind: str) -> Tensor:
    """Return two images float32 (2, 3, 16, 16) in [0, 1], or two rows of 7 tokens int64 (2, 7)."""
    draws = np.random.RandomState(3)
    if kind == "vit":
        return torch.from_numpy(draws.randint(0, 257, (2, 3, 16, 16)) / 256.0).float()
    return torch.from_numpy(draws.randint(0, 40, (2, 7)).astype(np.int64))


@torch.no_grad()
def logits_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """Return the logits of a ViT or an LM in evaluation mode."""
    output = model.eval()(inputs)
    return output if isinstance(output, Tensor) else output.logits


# ---- data ------------------------------------------------------------------------------------------------------------


def write_world(folder: Path) -> Path:
    """Write weights/ and sets/ below `folder`: all files that a golden run reads with `folder` as the current folder."""
    write_vit(folder / "weights" / "vit.safetensors")
    write_lm(folder / "weights" / "lm")
    write_images(folder / "sets" / "shapes", classes=6, train=8, test=8, seed=11)
    write_images(folder / "sets" / "tones", classes=4, train=8, test=6, seed=12)
    write_rooms(folder / "sets" / "rooms")
    write_texts(folder / "sets")
    write_walks(folder / "sets" / "walks")
    return folder


def write_vit(path: Path) -> None:
    """Write a checkpoint of timm's test_vit at 32 px without a head."""
    model = fill_exactly(timm.create_model("test_vit", img_size=SIDE, num_classes=0), 4)
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(model.state_dict(), path)


def write_lm(folder: Path) -> None:
    """Write a tiny Llama and its tokenizer; a word with the space before it is a single token."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = [chr(i) for i in range(33, 127)]
    tokens = ["<unk>", "<s>", "</s>", *WORDS, *(f"Ġ{word}" for word in WORDS), *letters, "Ġ", "Ċ"]
    known = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    words = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    golden_lm("llama", len(known)).save_pretrained(folder)


def write_card(folder: Path, classes: int, source: dict[str, Any]) -> None:
    """Write the card of a set with its files in the same folder."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {"name": folder.name, "title": folder.name, "source": "own", "licence": "own", "classes": classes}
    (folder / "card.yaml").write_text(json.dumps({**about, "sources": [source]}, indent=1))


def write_images(folder: Path, *, classes: int, train: int, test: int, seed: int) -> None:
    """Write a set of classified images: each class is a pattern with noise added."""
    draws = np.random.RandomState(seed)
    patterns = draws.randint(60, 196, (classes, 3, 4, 4))
    for split, count in (("train", train), ("test", test)):
        for number in range(classes):
            place = folder / "images" / split / f"class{number}"
            place.mkdir(parents=True, exist_ok=True)
            for image in range(count):
                noise = draws.randint(-55, 56, (3, 4, 4))
                coarse = np.clip(patterns[number] + noise, 0, 255).repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)
                pixels = np.clip(coarse + draws.randint(-20, 21, coarse.shape), 0, 255).astype(np.uint8)
                Image.fromarray(pixels.transpose(1, 2, 0)).save(place / f"{image}.png")
    write_card(
        folder,
        classes,
        {
            "kind": "folder",
            "root": "images",
            "layout": "{split}/{class}",
            "splits": {"train": classes * train, "test": classes * test},
        },
    )


def write_rooms(folder: Path) -> None:
    """Write a set of images with labels of 3 classes and depth; edges and normals are derived from them."""
    draws = np.random.RandomState(13)
    height, width = ROOM
    for split, count in (("train", 6), ("test", 5)):
        for name in ("rgb", "label", "depth"):
            (folder / "maps" / split / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            columns = np.arange(width)[None] + draws.randint(-3, 4, (height, 1))
            label = np.clip(columns // draws.randint(14, 19), 0, 2).astype(np.uint8)
            slope = 12 * np.arange(height)[:, None]
            depth = 1000 + 700 * label.astype(np.int64) + slope + draws.randint(0, 30, label.shape)
            image = 50 + 70 * label[..., None] + draws.randint(0, 70, (height, width, 3))
            for name, values in (("rgb", image.astype(np.uint8)), ("label", label), ("depth", depth.astype(np.uint16))):
                Image.fromarray(values).save(folder / "maps" / split / name / f"{number}.png")
    write_card(
        folder,
        3,
        {
            "kind": "dense",
            "root": "maps",
            "image": "{split}/rgb",
            "maps": {"label": "{split}/label", "depth_mm": "{split}/depth"},
            "splits": {"train": 6, "test": 5},
            "void": 255,
            "derive": {"edge": "semseg", "normals": "depth"},
            "camera": {"fx": 40.0, "fy": 40.0, "cx": 24.0, "cy": 16.0},
        },
    )


def write_texts(folder: Path) -> None:
    """Write the sets films (train 24, dev 8, test 10) with a label, wrong in every fifth row, and stories (all 4)."""
    adjectives = ["bad", "dull", "good", "bright"]
    films = []
    for i in range(42):
        word = adjectives[2 * (i % 2) + i // 6 % 2]
        subject = ("film", "plot", "sky")[i // 2 % 3]
        emphasis = ("", "very ", "very very ")[i // 6 % 3]
        label = i % 2 if i % 5 else 1 - i % 2
        films.append({"text": f"the {subject} was {emphasis}{word}", "label": str(label)})
    stories = [{"text": " ".join(WORDS[(start + 3 * i) % len(WORDS)] for i in range(24))} for start in range(4)]
    sets = {
        "films": ({"train": films[:24], "dev": films[24:32], "test": films[32:]}, ["text", "label"]),
        "stories": ({"all": stories}, ["text"]),
    }
    for name, (splits, fields) in sets.items():
        rows = folder / name / "rows"
        rows.mkdir(parents=True, exist_ok=True)
        for split, lines in splits.items():
            (rows / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_card(
            folder / name,
            0,
            {
                "kind": "text",
                "root": "rows",
                "files": {split: f"{split}.jsonl" for split in splits},
                "splits": {split: len(lines) for split, lines in splits.items()},
                "fields": fields,
            },
        )


def write_walks(folder: Path) -> None:
    """Write a set of 20 users who each take items in the order of the catalogue of 24."""
    numbers = WORDS[WORDS.index("one") :][:8]
    titles = [f"{adjective} {number}" for adjective in ("bright", "dull", "blue") for number in numbers]
    rows = folder / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    (rows / "items.csv").write_text("item,title\n" + "".join(f"i{i},{title}\n" for i, title in enumerate(titles)))
    events = [
        f"u{user},i{(5 * user + step) % 24},{1000 * user + step}\n"
        for user in range(20)
        for step in range(7 + user % 3)
    ]
    (rows / "events.csv").write_text("user,item,timestamp\n" + "".join(events))
    write_card(
        folder,
        0,
        {
            "kind": "interactions",
            "root": "rows",
            "items": "items.csv",
            "item_columns": ["item", "title"],
            "events": "events.csv",
            "shortest": 2,
            "splits": {"train": 79, "validation": 20, "test": 20},
        },
    )
