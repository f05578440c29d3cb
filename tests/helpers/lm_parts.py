"""A tiny random LM, its tokenizer and small sets of texts for tests of the language-model job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

from helpers.language_models import random_lm
from vismt.data.texts.interactions import Catalogue
from vismt.llm.ilora.hybrid import Hybrid
from vismt.llm.ilora.recommenders import SASRec
from vismt.llm.tasks.base import Item, LmTask

TEXT = (
    "a bad good film plot was very dull bright and the of it Review : Sentiment negative positive Question Answer one two three "
    "four five six seven eight nine ten plus is #### what colour sky blue grass green"
)
WORDS = TEXT.split()


def tokenizer(bos: bool = False) -> Any:
    """Return a tokenizer: a word with the space before it is one token, as in byte-level BPE; "<s>" begins a text with `bos`."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *WORDS,
        *(f"Ġ{word}" for word in WORDS),
        *(chr(i) for i in range(33, 127)),
        "Ġ",
        "Ċ",
        "Ġyes",
        "Ġno",
    ]
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(dict.fromkeys(tokens))}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    if bos:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def tiny_lm(kind: str = "llama", seed: int = 0, vocabulary: int = 256) -> nn.Module:
    """Return a random llama (grouped heads), qwen2 (biases) or gpt2 (Conv1D, learned positions, tied) in eval mode."""
    lm = random_lm(kind, seed, vocab_size=vocabulary, num_hidden_layers=3, max_position_embeddings=128, pad_token_id=0)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # so that the logits of tokens differ
    return lm


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a configuration with the values at dotted keys replaced."""
    config = json.loads(json.dumps(config))
    for key, value in changes.items():
        *outer, last = key.split(".")
        place = config
        for name in outer:
            place = place[name]
        place[last] = value
    return config


def save_lm(folder: Path, kind: str = "llama") -> Path:
    """Write a folder that create_lm reads."""
    tiny_lm(kind).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_opt(folder: Path) -> Path:
    """Write a folder with an OPT whose blocks are wider than its embeddings, and with norms after the blocks, as OPT-350m."""
    sizes = {
        "hidden_size": 16,
        "word_embed_proj_dim": 8,
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    config = transformers.OPTConfig(vocab_size=256, max_position_embeddings=128, do_layer_norm_before=False, **sizes)
    transformers.OPTForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def save_texts(folder: Path) -> dict[str, Path]:
    """Write cards and return them by name: films (train 24, dev 8, test 10), other (all 6), sums (all 12), stories (all 4)."""
    adjectives = {"0": ["bad", "dull"], "1": ["good", "bright"]}
    films = [
        {"text": f"the {noun} was {'very ' * (i % 3)}{adjectives[label][i % 2]}", "label": label}
        for i in range(7)
        for noun in ("film", "plot", "sky")
        for label in ("0", "1")
    ]
    numbers = WORDS[WORDS.index("one") :][:10]
    sums = [
        {"question": f"what is {numbers[i]} plus {numbers[j]}", "answer": numbers[i + j + 1]}
        for i in range(4)
        for j in range(3)
    ]
    stories = [{"text": " ".join(WORDS[(start + 3 * i) % len(WORDS)] for i in range(30))} for start in range(4)]
    choices = [
        {"question": f"what colour is the {thing}", "one": "blue", "two": "green", **extra, "answer": right}
        for thing, right in (("sky", "one"), ("grass", "two"))
        for extra in ({}, {"three": "very bright"})
    ]
    parts = {
        "films": ({"train": films[:24], "dev": films[24:32], "test": films[32:]}, ["text", "label"]),
        "other": (
            {"all": [{"text": f"a {row['text']}", "label": row["label"]} for row in films[:6]]},
            ["text", "label"],
        ),
        "sums": ({"all": sums}, ["question", "answer"]),
        "stories": ({"all": stories}, ["text"]),
        "colours": ({"all": choices * 2}, ["question", "one", "two", "three", "answer"]),
    }
    cards = {}
    for name, (splits, fields) in parts.items():
        base = folder / name / "rows"
        base.mkdir(parents=True)
        for split, rows in splits.items():
            (base / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        common = [key for key in fields if all(key in row for rows in splits.values() for row in rows)]
        (folder / name / "card.yaml").write_text(
            json.dumps(
                {
                    "name": name,
                    "title": name,
                    "source": "own",
                    "licence": "own",
                    "classes": 0,
                    "sources": [
                        {
                            "kind": "text",
                            "root": "rows",
                            "files": {split: f"{split}.jsonl" for split in splits},
                            "splits": {split: len(rows) for split, rows in splits.items()},
                            "fields": common,
                        }
                    ],
                }
            )
        )
        cards[name] = folder / name
    return cards


def save_interactions(folder: Path) -> Path:
    """Write a card of 30 users who take items in the order of a catalogue of 24, by time."""
    numbers = WORDS[WORDS.index("one") :][:8]
    titles = [f"{adjective} {number}" for adjective in ("bright", "dull", "blue") for number in numbers]
    base = folder / "walks" / "rows"
    base.mkdir(parents=True)
    (base / "items.csv").write_text("item,title\n" + "".join(f"i{i},{title}\n" for i, title in enumerate(titles)))
    events = [
        f"u{user},i{(5 * user + step) % 24},{1000 * user + step}\n"
        for user in range(30)
        for step in range(7 + user % 3)
    ]
    (base / "events.csv").write_text("user,item,timestamp\n" + "".join(events))
    (folder / "walks" / "card.yaml").write_text(
        json.dumps(
            {
                "name": "walks",
                "title": "walks",
                "source": "own",
                "licence": "own",
                "classes": 0,
                "sources": [
                    {
                        "kind": "interactions",
                        "root": "rows",
                        "items": "items.csv",
                        "item_columns": ["item", "title"],
                        "events": "events.csv",
                        "shortest": 2,
                        "splits": {"train": 120, "validation": 30, "test": 30},
                    }
                ],
            }
        )
    )
    return folder / "walks"


def sentiment_task(films: Path | str, **changes: Any) -> dict[str, Any]:
    """Return a task of two classes on the card `films` of `save_texts`."""
    return {
        "name": "sentiment",
        "kind": "classes",
        "prompt": "Review: {text}\nSentiment:",
        "options": {"answers": {"0": " negative", "1": " positive"}},
        "train": [f"{films}:train"],
        "test": [f"{films}:test"],
        **changes,
    }


def ranked_task(walks: Path | str, **changes: Any) -> dict[str, Any]:
    """Return a recommendation on the card of `save_interactions`."""
    return {
        "name": "ranked",
        "kind": "recommendation",
        "prompt": "the {history} : {candidates} Answer:",
        "limit": 12,
        "options": {"candidates": 4, "history": 3, "curriculum": 0, "length": 96},
        "train": [f"{walks}:train"],
        "test": [f"{walks}:test"],
        **changes,
    }


# Rows of a recommendation: (history, next item) of the items of a small catalogue.
TITLES = ["blue", "green", "bright", "dull", "one", "two three", "four", "five", "six", "seven", "eight", "nine"]
CATALOGUE = Catalogue(tuple(map(str, range(12))), tuple(TITLES))
ROWS = [([0, 1, 2], 5), ([3, 4], 6), ([7, 8, 9, 10], 0)]


def encoded(task: LmTask, rows: list = ROWS, users: list[str] | None = None) -> list[Item]:
    """Return rows as tokens of a recommendation; users "user 0", "user 1", ... where none are given."""
    words = tokenizer()
    names = users or [f"user {number}" for number in range(len(rows))]
    return [
        task.encode(f"row {i}", {"user": names[i], "history": h, "next": target, "catalogue": CATALOGUE}, words)
        for i, (h, target) in enumerate(rows)
    ]


def small_hybrid(seed: int = 0, **options: object) -> Hybrid:
    """Return item vectors and gates from an untrained SASRec, for an LM of width 32."""
    return Hybrid(SASRec(12, 3, width=8, dropout=0.3, seed=seed), 32, seed=seed, **options)
