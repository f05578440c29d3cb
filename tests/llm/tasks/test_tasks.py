"""Tasks on tiny random LMs: counted tokens, packing, padding, log-likelihoods against a loop, measures by hand."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from helpers.lm_parts import tiny_lm, tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from vismt.base.errors import UserError
from vismt.config.sections import TrainConfig
from vismt.data.texts.interactions import Catalogue
from vismt.engine import loop, runtime
from vismt.jobs.lm.config import LmTaskConfig, task_of
from vismt.llm import net as net_file
from vismt.llm.net import LmNet, check_logits, stored_lower_states
from vismt.llm.tasks import make_text_task
from vismt.llm.tasks.answers import right_answer
from vismt.llm.tasks.base import (
    Item,
    LmObjective,
    answer_tokens,
    choices,
    gather_items,
    in_form,
    probability_measures,
)
from vismt.llm.tasks.classes import AlternatingObjective
from vismt.llm.tasks.generation import normalised, prompts_of
from vismt.llm.tasks.harness import Harness
from vismt.llm.tasks.pieces import IGNORED, Piece, collate_pieces, pack, piece, stem, tree, windows
from vismt.methods import adapt
from vismt.storage.lines import read_lines
from vismt.uncertainty.last_layers import LinearAnswerHead, log_predictive, make_head
from vismt.uncertainty.temperature import fit_temperature

KINDS = ("llama", "qwen2", "gpt2")
PIECES = [piece([5, 6, 7], [8, 9], 20), piece([10], [11, 12, 13, 14, 15], 20), piece([16, 17, 18, 19], [20], 20)]


def texts_of(task, net, items):
    return [record["text"] for record in task.score(net, gather_items(items), items)]


SENTIMENT = {"answers": {"0": " negative", "1": " positive"}}


@pytest.fixture(scope="module", params=KINDS)
def lm(request):
    return tiny_lm(request.param).requires_grad_(False)


def naive(lm, part: Piece) -> list[float]:
    """Return -log p of each counted token, with one forward pass per token and without padding or packing."""
    nats = []
    for position in range(1, len(part.ids)):
        if part.labels[position] != IGNORED:
            with torch.no_grad():
                logits = lm(input_ids=torch.tensor([part.ids[:position]])).logits[0, -1].double()
            nats.append(-float(logits.log_softmax(0)[part.ids[position]]))
    return nats


# ---- counted tokens ---------------------------------------------------------------------------------------------------


def test_the_answer_alone_is_counted():
    words = tokenizer()
    task = make_text_task("causal", "Question: {question}\nAnswer:", {"answer": " {answer}", "length": 64})
    item = task.encode("a", {"question": "what is one", "answer": "two plus three"}, words)
    (part,) = item.pieces
    counted = [token for token, label in zip(part.ids, part.labels) if label != IGNORED]
    assert words.decode(counted) == " two plus three</s>"
    assert all(label in (IGNORED, token) for token, label in zip(part.ids, part.labels))
    assert (
        words.decode([t for t, label in zip(part.ids, part.labels) if label == IGNORED])
        == "Question: what is one\nAnswer:"
    )
    with_bos = task.encode("a", {"question": "what is one", "answer": "two"}, tokenizer(bos=True)).pieces[0]
    # None before the answer.
    assert with_bos.ids[0] == 1 and with_bos.ids.count(1) == 1 and with_bos.labels[0] == IGNORED


def test_too_long_rows_lose_the_beginning_of_the_prompt():
    assert piece([1, 2, 3, 4], [5, 6], 4) == Piece((3, 4, 5, 6), (IGNORED, IGNORED, 5, 6))
    assert piece([1, 2], [3, 4, 5, 6], 4) == Piece((2, 3, 4, 5), (IGNORED, 3, 4, 5))  # one token of context is left
    assert piece([1, 2], [3], 4).counted == 1 and piece([], [3, 4], 4).counted == 1


@pytest.mark.parametrize("context", [[], [99]])
@pytest.mark.parametrize("count", [1, 2, 4, 5, 6, 7, 8, 9, 12])
def test_windows_count_every_token_once(count, context):
    text = list(range(count))
    pieces = windows(context, text, 4)
    counted = [label for part in pieces for label in part.labels[1:] if label != IGNORED]
    assert counted == (text if context else text[1:])  # without context nothing predicts the first
    assert all(1 <= len(part.ids) <= 4 for part in pieces) and all(a.ids[-1] == b.ids[0] for a, b in pairwise(pieces))


def test_of_long_texts_the_first_windows_can_be_taken():
    words = tokenizer()
    row = {"text": "one two three one two three one two three"}
    every = make_text_task("causal", "", {"answer": "{text}", "length": 4}).encode("a", row, words).pieces
    first = make_text_task("causal", "", {"answer": "{text}", "length": 4, "windows": 2})
    assert len(every) > 2 and first.encode("a", row, words).pieces == every[:2]
    assert first.about == "the first 7 tokens of each text, context 4"


# ---- packing -----------------------------------------------------------------------------------------------------------


def test_packing_keeps_every_label_but_those_that_another_document_would_predict():
    (both,) = pack([piece([], [1, 2, 3], 9), piece([4], [5, 6], 9)], 9)
    assert both.ids == (1, 2, 3, 4, 5, 6) and both.documents == (0, 0, 0, 1, 1, 1)
    assert both.labels == (IGNORED, 2, 3, IGNORED, 5, 6)
    second = pack([piece([7], [8], 9), piece([], [1, 2, 3], 9)], 9)[0]
    assert second.labels == (IGNORED, 8, IGNORED, 2, 3)  # token 1 is not predicted from 8
    assert [len(part.ids) for part in pack(PIECES, 11)] == [11, 5] and [len(part.ids) for part in pack(PIECES, 5)] == [
        5,
        6,
        5,
    ]
    assert sum(part.counted for part in pack(PIECES, 16)) == sum(part.counted for part in PIECES)


def test_a_chat_template_writes_the_turns_around_the_prompt():
    words = tokenizer()
    with pytest.raises(UserError, match="tasks: chat: the tokenizer has no chat template"):
        chat_task().encode("a", {"text": "green", "more": " green"}, words)
    words.chat_template = (
        "{% for m in messages %}<s>{{ m.role[0] }} {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>a{% endif %}"
    )
    item = chat_task().encode("a", {"text": "green", "more": " green"}, words)
    part = item.pieces[0]
    context = [token for token, label in zip(part.ids, part.labels) if label == IGNORED]
    assert words.decode(context) == "<s>u green!</s><s>a"
    assert [label for label in part.labels if label != IGNORED] == [
        *words(" green", add_special_tokens=False)["input_ids"],
        words.eos_token_id,
    ]


@pytest.mark.parametrize(
    ("turn", "end"),
    [("{{ m.content }}<turn>\n", "<turn>"), ("{{ m.content | trim }} </s>\n", " </s>"), ("{{ m.content }}\n", "</s>")],
)
def test_an_answer_in_a_chat_ends_as_the_template_ends_a_turn(turn, end, monkeypatch):
    """Gemma writes <end_of_turn> and a line end, where its tokenizer's end of text is another token."""
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    start = "{% if add_generation_prompt %}a{% endif %}"
    words.chat_template = f"{{% for m in messages %}}{{{{ m.role[0] }}}} {turn}{{% endfor %}}{start}"
    task = task_of(LmTaskConfig(name="a", prompt="{text}", chat=True, options={"answer": " {text}"}))
    (part,) = task.encode("a", {"text": "green"}, words).pieces
    counted = [label for label in part.labels if label != IGNORED]
    assert words.decode(counted) == f" green{end}"
    assert task.ask("a", {"text": "green \n\n"}, words) == task.ask("a", {"text": "green"}, words)
    stops: list[list[int]] = []
    monkeypatch.setattr("vismt.llm.tasks.causal.written", lambda *given: stops.append(given[-1]) or [""])
    for kind in (task, make_text_task("chat", "", {})):
        kind.reply(None, {}, [{"text": "green"}], words, None)
    assert stops == [counted[-1:] if end in turn else []] * 2


def sentencepiece(kind: str) -> Any:
    """Return a tokenizer that begins a text with "▁": any text, as Llama 2 ("normalizer"), or one without a space there."""
    words = ["▁", "▁▁", *"abcdefghijklmnopqrstuvwxyz:!\nQ", "▁blue", "blue", "▁green", "▁sky", "▁yes", "▁no", "▁Q"]
    tokens = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((word, -8.0 + len(word)) for word in words)]
    made = Tokenizer(models.Unigram(tokens, unk_id=0))
    if kind == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("kind", ["normalizer", "metaspace"])
def test_an_answer_has_the_tokens_that_it_has_after_its_prompt(kind):
    words, row = sentencepiece(kind), {"q": "sky", "a": "blue sky"}
    assert words.convert_ids_to_tokens(words("blue", add_special_tokens=False)["input_ids"]) == ["▁blue"]
    whole = words("Q sky: blue sky")["input_ids"]
    (part,) = make_text_task("causal", "Q {q}:", {"answer": " {a}", "end": False}).encode("a", row, words).pieces
    assert list(part.ids) == whole and part.counted == 2
    options = {"answers": {"0": " {a}", "1": " green!"}, "label": "0"}
    (branches,) = make_text_task("answers", "Q {q}:", options).encode("a", row, words).pieces
    assert [list(stem(branches, n).ids) for n in (0, 1)] == [whole, words("Q sky: green!")["input_ids"]]
    classes = make_text_task("classes", "Q {q}:", {"answers": {"0": " blue", "1": " green"}})
    assert words.convert_ids_to_tokens(classes.tokens(words)) == ["▁blue", "▁green"]
    catalogue = Catalogue(("0", "1", "2", "3", "4"), ("blue", "green", "sky", "no", "yes"))
    interactions = {"user": "u", "history": [0, 1], "next": 2, "catalogue": catalogue}
    named = make_text_task("recommendation", "Q {history}: {candidates}!", {"candidates": 2, "slot": "Q"})
    item = named.encode("a", interactions, words)
    titles = [catalogue.titles[number] for number in item.listed.candidates]
    for number, title in enumerate(titles):
        text = f"Q blue, green: {', '.join(titles)}! {title}\n"
        assert list(stem(item.pieces[0], number).ids) == words(text)["input_ids"]
    slots = words.convert_ids_to_tokens(item.hybrid.pieces[0].ids)
    assert "".join(slots[:12]).startswith("<s>▁Q▁blueQ<unk>▁greenQ:▁") and "▁▁" not in slots
    assert words.convert_ids_to_tokens(answer_tokens(words, "\n")) == ["\n"]  # at which a written answer ends


@pytest.mark.parametrize("kind", ["normalizer", "metaspace"])
def test_the_turns_of_a_chat_have_the_tokens_that_they_have_in_the_whole_text(kind):
    words = sentencepiece(kind)
    words.chat_template = "{% for m in messages %}{{ 'Q ' if m.role == 'user' else ' ' }}{{ m.content }}:{% endfor %}"
    texts = ("sky", "blue sky", "no", "green")
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts)]
    (part,) = make_text_task("chat", "", {}).encode("a", {"messages": turns}, words).pieces
    assert list(part.ids) == words("Q sky: blue sky:Q no: green:", add_special_tokens=False)["input_ids"]


def test_where_a_token_reaches_over_the_border_the_answer_keeps_its_letters():
    for kind in ("normalizer", "metaspace"):
        words = sentencepiece(kind)
        (part,) = (
            make_text_task("causal", "Q:b", {"answer": "{a}", "end": False}).encode("a", {"a": "lue"}, words).pieces
        )
        assert words.convert_ids_to_tokens(part.ids) == ["<s>", "▁Q", ":", "b", "l", "u", "e"]


@pytest.mark.parametrize("words", [tokenizer(), sentencepiece("normalizer"), sentencepiece("metaspace")])
def test_a_prompt_that_ends_in_a_space_has_the_tokens_of_one_whose_answer_begins_with_it(words):
    """As in lm-eval-harness, which moves the space: an answer is " blue", not a space and "blue"."""
    row = {"q": "sky", "sky_": "sky ", "a": "blue", "b": "green"}
    kinds = {
        "causal": [{"answer": f"{start}{{a}}"} for start in ("", " ")],
        "answers": [{"answers": {"0": f"{start}{{a}}", "1": f"{start}{{b}}"}, "label": "0"} for start in ("", " ")],
    }
    for kind, (bare, spaced) in kinds.items():
        wanted = make_text_task(kind, "Q {q}", spaced).encode("a", row, words)
        for prompt in ("Q {q} ", "Q {sky_}"):  # the space of the prompt, or of the row
            found = make_text_task(kind, prompt, bare).encode("a", row, words)
            assert found.pieces == wanted.pieces and found.sizes == wanted.sizes
    named = [{"answers": {"0": f"{start}blue", "1": f"{start}green"}} for start in ("", " ")]
    found, wanted = make_text_task("classes", "Q {q}: ", named[0]), make_text_task("classes", "Q {q}:", named[1])
    assert found.tokens(words) == wanted.tokens(words)
    assert found.ask("a", row, words).pieces == wanted.ask("a", row, words).pieces
    with pytest.raises(UserError, match="begin it with one space, which may be the end of the prompt"):
        make_text_task("classes", "Q: ", named[1]).tokens(words)


def test_a_written_answer_does_not_repeat_the_space_of_its_prompt(monkeypatch):
    monkeypatch.setattr("vismt.llm.tasks.causal.written", lambda *_: [" blue", "blue"])
    task = make_text_task("causal", "Q {q}: ", {"answer": "{a}"})
    replies = task.reply(None, {}, [{"q": "sky"}] * 2, tokenizer(), None)
    assert [reply.text for reply in replies] == ["blue", "blue"]
    assert (
        make_text_task("causal", "", {"answer": "{a}"}).reply(None, {}, [{"a": "sky "}] * 2, tokenizer(), None)[0].text
        == " blue"
    )


def chat_task() -> Any:
    section = LmTaskConfig(name="a", kind="causal", prompt="{text}!", chat=True, options={"answer": "{more}"})
    return task_of(section)


def test_logits_of_a_training_step_are_computed_in_chunks_with_equal_gradients(monkeypatch):
    lm = tiny_lm("llama")
    net = LmNet(lm)
    ids = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(0))
    batch = collate_pieces([Piece(tuple(row), tuple(row)) for row in ids.tolist()])
    weight, seen = lm.get_output_embeddings().weight, []
    handle = lm.get_output_embeddings().register_forward_hook(lambda module, inputs, out: seen.append(len(out)))
    gradients = []
    for at_once in (5, 1024):
        monkeypatch.setattr(net_file, "TRAINED_AT_ONCE", at_once)
        loss = net.token_nll(batch)[0].sum()
        gradients.append((loss.detach(), *torch.autograd.grad(loss, [weight, *list(lm.parameters())[2:4]])))
    handle.remove()
    # Each chunk a second time in its backward pass.
    assert max(seen[:-1]) == 5 and seen[-1] == 32 and sum(seen) == 3 * 32
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*gradients))


def test_positions_begin_anew_and_attention_stays_within_a_document():
    batch = collate_pieces([*pack([piece([1], [2, 3], 9), piece([4], [5], 9)], 9), piece([6], [7], 9)])
    assert batch["positions"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 0, 0, 1]]
    assert batch["mask"].shape == (2, 5, 5)
    assert batch["mask"][0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert (
        batch["mask"][1].int()[3:].tolist() == [[0, 0, 0, 1, 0], [0, 0, 0, 1, 1]] and not batch["mask"][1, :, :3].any()
    )


def test_a_packed_piece_has_the_nll_of_its_documents(lm):
    net = LmNet(lm)
    packed, tokens = net.token_nll(collate_pieces(pack(PIECES, 16)))
    alone = [sum(naive(lm, part)) for part in PIECES]
    assert float(packed) == pytest.approx(sum(alone), rel=1e-4) and int(tokens) == 8
    # another document before it changes nothing
    other = piece([30, 31, 32], [33, 34], 20)
    changed = net.token_nll(collate_pieces(pack([other, *PIECES[1:]], 16)))[0]
    assert float(changed) == pytest.approx(sum(naive(lm, other)) + sum(alone[1:]), rel=1e-4)


# ---- padding and log-likelihood -------------------------------------------------------------------------------------------


def test_log_likelihood_is_that_of_a_loop_over_tokens(lm, monkeypatch):
    monkeypatch.setattr(net_file, "SCORED_AT_ONCE", 3)
    nats, tokens = LmNet(lm).token_nll(collate_pieces(PIECES))
    assert tokens.tolist() == [2, 5, 1]
    for value, part in zip(nats.tolist(), PIECES):
        assert value == pytest.approx(sum(naive(lm, part)), rel=1e-4)
    none = LmNet(lm).token_nll(collate_pieces([Piece((1, 2), (IGNORED, IGNORED))]))
    assert none[0].tolist() == [0.0] and none[1].tolist() == [0]


def test_left_padding_changes_neither_features_nor_generation(lm):
    net, words = LmNet(lm), tokenizer()
    task = make_text_task("generation", "Question: {q}", {"answer": "{a}", "gold": "a", "new_tokens": 6})
    questions = ["what is one plus two", "sky", "the green grass is"]
    items = [task.encode(q, {"q": q, "a": "one"}, words) for q in questions]
    assert len({len(item.pieces[0].ids) for item in items}) == 3
    together = texts_of(task, net, items)
    assert together == [texts_of(task, net, [item])[0] for item in items] and len(set(together)) > 1
    for text, question in zip(together, questions):  # and transformers generates the same text for the single prompt
        ids = torch.tensor([words(f"Question: {question}")["input_ids"]])
        generated = lm.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=2)
        assert text == words.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
    prompts = [piece(item.pieces[0].ids, [], 99) for item in items]
    with torch.no_grad():
        both = net.features(collate_pieces(prompts))
        for row, prompt in zip(both, prompts):
            assert torch.allclose(row, net.features(collate_pieces([prompt]))[0], atol=1e-4)


def test_generation_is_greedy_whatever_the_checkpoint_asks_for():
    lm, words = tiny_lm().requires_grad_(False), tokenizer()
    task = make_text_task("generation", "{q}", {"answer": "{a}", "gold": "a", "new_tokens": 8})
    prompt = words("the green grass is")["input_ids"]
    ids = list(prompt)
    for _ in range(8):
        ids.append(int(lm(torch.tensor([ids])).logits[0, -1].argmax()))
    wanted = words.decode(ids[len(prompt) :], skip_special_tokens=True)
    asked = {
        "repetition_penalty": 9.0,
        "num_beams": 3,
        "do_sample": True,
        "suppress_tokens": ids[len(prompt) :],
        "min_new_tokens": 9,
    }
    lm.generation_config.update(**asked)
    (item,) = [task.encode("a", {"q": "the green grass is", "a": "one"}, words)]
    assert texts_of(task, LmNet(lm), [item]) == [wanted]
    assert all(getattr(lm.generation_config, name) == value for name, value in asked.items())  # left as it was


def test_a_written_answer_ends_where_the_checkpoint_ends_a_turn_and_its_prompt_is_whole():
    lm, words = tiny_lm().requires_grad_(False), tokenizer()
    row = {"q": "the green grass is very bright", "a": "one two three four five"}
    long, short = (
        make_text_task("generation", "{q}", {"answer": " {a}", "gold": "a", "new_tokens": 6, "length": length})
        for length in (64, 8)
    )
    net, item = LmNet(lm), long.encode("a", row, words)
    (tokens,) = net.generate(prompts_of(net, [item]), 6, []).tolist()
    assert texts_of(long, net, [item]) == [words.decode(tokens, skip_special_tokens=True)]
    # A prompt that made room for the trained answer would have 2 tokens.
    assert texts_of(short, net, [short.encode("a", row, words)]) == texts_of(long, net, [item])
    lm.generation_config.eos_token_id = [words.eos_token_id, tokens[2]]
    assert texts_of(long, net, [item]) == [words.decode(tokens[:3], skip_special_tokens=True)]


def test_the_zero_shot_head_is_the_lm_restricted_to_the_answers(lm):
    words = tokenizer()
    task = make_text_task("classes", "Review: {text}\nSentiment:", SENTIMENT)
    tokens = task.tokens(words)
    assert words.convert_ids_to_tokens(tokens) == ["Ġnegative", "Ġpositive"]
    net = LmNet(lm)
    net.head = make_head("linear", *net.answer_rows(tokens), 3, 0, {})
    texts = ["a bad film", "the very good plot was bright"]
    items = [task.encode(text, {"text": text, "label": "1"}, words) for text in texts]
    records = task.score(net, gather_items(items), items)
    for record, text in zip(records, texts):
        with torch.no_grad():
            logits = lm(torch.tensor([words(f"Review: {text}\nSentiment:")["input_ids"]])).logits[0, -1, tokens]
        assert (
            record["log_p"] == pytest.approx(logits.double().log_softmax(0).tolist(), abs=1e-4) and record["label"] == 1
        )
    with torch.no_grad():
        loss = task.loss(net, gather_items(items))["loss"]
    assert float(loss) == pytest.approx(-sum(record["log_p"][1] for record in records) / 2, rel=1e-4)


@pytest.mark.parametrize("normalise", ["token", "character", "none"])
def test_answers_are_scored_list_wise(lm, normalise):
    words, net = tokenizer(), LmNet(lm)
    options = {"answers": {"one": " {one}", "two": " {two}", "three": " {three}"}, "normalise": normalise}
    task = make_text_task("answers", "Question: {q}", options)
    rows = [
        {"q": "sky", "one": "blue", "two": "very bright green", "answer": "two"},
        {"q": "grass is", "one": "green", "two": "blue", "three": "of the sky", "answer": "three"},
    ]
    items = [task.encode(str(i), row, words) for i, row in enumerate(rows)]
    assert [len(item.pieces) for item in items] == [1, 1] and [item.label for item in items] == [1, 2]
    records = task.score(net, gather_items(items), items)
    for record, item, row, count in zip(records, items, rows, (2, 3)):
        alone = [stem(item.pieces[0], answer) for answer in range(count)]
        assert len(record["log_p"]) == count
        sizes = {
            "token": [part.counted for part in alone],
            "none": [1] * 3,
            "character": [len(row[key]) for key in options["answers"] if key in row],
        }[normalise]
        scores = torch.tensor([-sum(naive(lm, part)) / size for part, size in zip(alone, sizes)], dtype=torch.float64)
        assert record["log_p"] == pytest.approx(scores.log_softmax(0).tolist(), abs=1e-3)
    embedding = net.lm.get_input_embeddings().weight.requires_grad_(True)
    loss = task.loss(net, gather_items(items))["loss"]
    # The choice that the first row lacks does not divide by zero.
    assert torch.autograd.grad(loss, embedding)[0].isfinite().all()
    embedding.requires_grad_(False)
    mean = -sum(record["log_p"][item.label] for record, item in zip(records, items)) / 2
    assert float(loss.detach()) == pytest.approx(mean, rel=1e-3)
    assert task.measures(records)["NLL in nats"].score == pytest.approx(mean, rel=1e-3)


@pytest.mark.parametrize("prompt", [False, True])
def test_a_right_answer_alone_has_the_loss_of_a_language_model(lm, prompt):
    words = tokenizer()
    task = make_text_task("answers", "Question: {q}", {"answers": {"one": " {one}", "two": " {two}"}})
    rows = [
        {"q": "sky", "one": "blue", "two": "very bright green", "answer": "two"},
        {"q": "grass is", "one": "green", "two": "blue sky", "answer": "one"},
    ]
    items = [right_answer(task.encode(str(i), row, words), prompt=prompt) for i, row in enumerate(rows)]
    nats = []
    for row in rows:
        asked = words(f"Question: {row['q']}")["input_ids"]
        answer = words(f" {row[row['answer']]}", add_special_tokens=False)["input_ids"]
        text = piece([], asked + answer, 99) if prompt else piece(asked, answer, 99)
        nats += naive(lm, text)
    batch = gather_items(items)
    assert int(task.examples(batch)) == len(nats) > len(rows)
    # A mean over tokens, not rows.
    assert float(task.loss(LmNet(lm), batch)["loss"]) == pytest.approx(sum(nats) / len(nats), rel=1e-4)


# ---- measures ------------------------------------------------------------------------------------------------------------


def test_a_task_of_the_harness_without_numbers_is_refused():
    task = SimpleNamespace(aggregation=dict, higher_is_better=dict)
    with pytest.raises(UserError, match="'lm_eval:own' has no metric with a number"):
        Harness.measures(SimpleNamespace(task=task, name="own"), [{"id": "a", "answer": "yes"}])


def test_perplexity_is_counted_over_tokens():
    # 2 nats on one token and 6 on seven: 8 nats / 8 tokens = 1. A mean over rows would be (2 + 6 / 7) / 2 = 1.43.
    causal = make_text_task("causal", "", {"answer": "{text}"})
    measures = causal.measures([{"id": "a", "nats": 2.0, "tokens": 1}, {"id": "b", "nats": 6.0, "tokens": 7}])
    nats, perplexity = measures["NLL in nats a token"], measures["perplexity"]
    assert nats.score == pytest.approx(1.0) and perplexity.score == pytest.approx(math.e)
    assert nats.values == pytest.approx({"a": 1 + (2 - 1) / 4, "b": 1 + (6 - 7) / 4})  # effect of each row
    assert perplexity.better == "lower"


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_perplexity_does_not_depend_on_the_batch(batch):
    lm, words = tiny_lm().requires_grad_(False), tokenizer()
    task = make_text_task("causal", "", {"answer": "{text}", "length": 5, "end": False})
    texts = ["a bad film", "the plot was very dull and the film was bad and dull", "the sky is blue", "green grass"]
    items = [task.encode(text, {"text": text}, words) for text in texts]
    chunks = [items[i : i + batch] for i in range(0, len(items), batch)]
    records = [record for chunk in chunks for record in task.score(LmNet(lm), gather_items(chunk), chunk)]
    each = [naive(lm, part) for item in items for part in item.pieces]
    tokens = [len(words(text)["input_ids"]) - 1 for text in texts]
    assert [record["tokens"] for record in records] == tokens and sum(map(len, each)) == sum(tokens)
    assert task.measures(records)["perplexity"].score == pytest.approx(
        math.exp(sum(map(sum, each)) / sum(tokens)), rel=1e-4
    )
    assert task.quality(records) == pytest.approx(1 / task.measures(records)["perplexity"].score)


def test_calibration_by_hand_and_rows_with_fewer_choices():
    records = [
        {"id": "a", "label": 0, "log_p": [math.log(0.9), math.log(0.1)]},  # bin 13: right, 0.9
        {"id": "b", "label": 1, "log_p": [math.log(0.9), math.log(0.1)]},  # bin 13: wrong, 0.9
        {"id": "c", "label": 2, "log_p": [math.log(0.2), math.log(0.2), math.log(0.6)]},  # bin 8 or 9: right, 0.6
    ]
    measures = probability_measures(records)
    # |(1 - .9) + (0 - .9)| / 3 + |1 - .6| / 3 = (.8 + .4) / 3; each row's part, by the sign of its bin: -.1, .9, .4
    assert measures["ECE-15"].score == pytest.approx(0.4)
    assert measures["ECE-15"].values == pytest.approx({"a": -0.1, "b": 0.9, "c": 0.4})
    assert measures["accuracy"].score == pytest.approx(2 / 3)
    assert measures["NLL in nats"].values == pytest.approx(
        {"a": -math.log(0.9), "b": -math.log(0.1), "c": -math.log(0.6)}
    )
    assert measures["Brier"].values == pytest.approx({"a": 0.02, "b": 1.62, "c": 0.24})
    # Each class against the rest, pairs in the right order: class 0 (.9 over .9 and .2): .75; class 1: 0.5, .1 against .1 and .2
    # gives .25; class 2: 1.
    assert measures["AUROC"].score == pytest.approx((0.75 + 0.25 + 1) / 3)
    low, high = measures["ECE-15"].interval()
    assert 0 <= low < high and "AUROC" not in probability_measures(records[:1])
    temperature = fit_temperature(*choices(records[:2]))
    soft = in_form(records[:2], lambda logits: logits / temperature)
    assert [math.exp(p) for p in soft[0]["log_p"]] == pytest.approx([0.5, 0.5], abs=1e-2) and soft[0]["label"] == 0


def test_an_answer_that_is_null_is_not_a_choice():
    task = make_text_task("answers", "{q}", {"answers": {"a": " {a}", "b": " {b}", "c": " {c}"}, "label": "{label}"})
    row = {"q": "sky", "a": "blue", "b": "green", "c": None, "label": "b"}
    assert list(task.choices_of(row)) == ["a", "b"] and len(task.encode("x", row, tokenizer()).sizes) == 2


def test_generated_answers_are_read_and_compared():
    task = make_text_task(
        "generation", "{q}", {"answer": "{a[0]}", "gold": "a", "pattern": r"#### ?(\S+)", "stop": "Question"}
    )
    assert task.read("1 #### 4 and #### 1,250.00 Question #### 9") == "1,250.00" and task.read("none") == ""
    assert normalised("1,250.00") == normalised("$1250.") == "1250" and normalised("100") == "100"
    assert normalised("The  Sky, is Blue!") == "sky is blue" and normalised("nan") == "nan"
    assert [normalised(text) for text in ("1e9999999", "1e99999", "2e3")] == ["1e9999999", "1e99999", "2000"]
    assert [normalised(text) for text in ("0.00", "-1.50", "1e-3", "7" * 30)] == ["0", "-1.5", "0.001", "7" * 30]
    item = task.encode("x", {"q": "Question", "a": ["one", "two"]}, tokenizer())
    assert item.gold == ["one", "two"]
    assert task.measures([{"id": "a", "right": True}, {"id": "b", "right": False}])["exact-match accuracy"].score == 0.5


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("classes", SENTIMENT),
        ("answers", {"answers": {"a": " one", "b": " two"}}),
        ("generation", {"answer": " {answer}", "gold": "answer"}),
    ],
)
def test_a_prompt_without_a_token_is_one_error(kind: str, options: dict[str, Any]) -> None:
    task = make_text_task(kind, "{text}", options)
    row = {"text": "", "label": "0", "answer": "a"}
    for encode in (task.encode, task.ask):
        with pytest.raises(UserError, match=r"row 'empty' has a prompt (or an answer )?without a token"):
            encode("empty", row, tokenizer())
    assert make_text_task(kind, "{text}", options).encode("begun", row, tokenizer(bos=True)).pieces


# ---- cached lower blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_cached_lower_blocks_give_the_same_loss_and_gradient(kind):
    results = []
    for cached in (False, True):
        lm = tiny_lm(kind)
        adapt(lm, "lora", targets=r".*\.2\..*", rank=2, seed=1)
        with torch.no_grad():
            for name, parameter in lm.named_parameters():
                if name.endswith("lora_B"):
                    parameter.normal_(generator=torch.Generator().manual_seed(3))
        net, calls = LmNet(lm, first=2), []
        rows = next(m for m in lm.base_model.modules() if isinstance(m, torch.nn.ModuleList))
        inner = next(m for m in rows[0].modules() if not list(m.children()))
        items = [Item(str(i), [part]) for i, part in enumerate([*PIECES, *pack(PIECES, 16)])]
        if cached:
            states = net.lower_states([item.pieces[0] for item in items], at_once=2)
            assert [state.shape for state in states] == [(len(item.pieces[0].ids), 32) for item in items]
            for item, state in zip(items, states):
                item.lower = [state]
        inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        nats, _ = net.token_nll(gather_items(items))
        nats.sum().backward()
        assert bool(calls) != cached  # the lower blocks did not run
        results.append((nats.detach(), {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}))
        assert "forward" not in vars(rows[0])
    (plain, slow), (quick, fast) = results
    assert torch.allclose(plain, quick, rtol=1e-4) and slow.keys() == fast.keys() and slow
    assert all(torch.allclose(slow[name], fast[name], rtol=1e-3, atol=1e-4) for name in slow)


@pytest.mark.parametrize(
    "change",
    [
        lambda lm, _: lm.base_model.layers[0].mlp.up_proj.weight.data.mul_(2),
        lambda lm, _: lm.base_model.embed_tokens.weight.data[PIECES[0].ids[0]].add_(1),
        lambda lm, _: setattr(lm.base_model.layers[1].input_layernorm, "variance_epsilon", 0.5),
        lambda lm, _: vars(lm.base_model.layers[0].mlp).update(forward=lambda x: x),
        lambda lm, patch: patch.setattr(type(lm.base_model.layers[0].mlp), "forward", lambda self, x: x),
        lambda lm, _: lm.base_model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output * 2),
        lambda lm, _: lm.double(),
    ],
)
def test_stored_lower_states_belong_to_the_lm_as_it_runs(change, tmp_path, monkeypatch):
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path))

    def states(lm):
        return torch.cat(stored_lower_states(LmNet(lm, first=2), PIECES))

    first = states(tiny_lm("llama"))
    upper = tiny_lm("llama")
    upper.base_model.layers[2].mlp.up_proj.weight.data.mul_(2)
    with monkeypatch.context() as patch:
        patch.setattr(LmNet, "lower_states", lambda *_: pytest.fail("computed again"))
        assert torch.equal(states(tiny_lm("llama")), first) and torch.equal(states(upper), first)
    other = tiny_lm("llama")
    change(other, monkeypatch)
    assert not torch.equal(states(other), first)


# ---- heads ------------------------------------------------------------------------------------------------------------------


def test_alternating_moves_the_posterior_apart_from_the_lm_and_saves_its_moments():
    words = tokenizer()
    task = make_text_task("classes", "Review: {text}\nSentiment:", SENTIMENT)
    items = [
        task.encode(text, {"text": text, "label": label}, words) for text, label in (("a bad film", "0"), ("good", "1"))
    ]

    def objective():
        lm = tiny_lm()
        adapt(lm, "lora", targets=["q_proj"], rank=2, seed=0)
        net = LmNet(lm)
        net.head = make_head("vbll", *net.answer_rows(task.tokens(words)), 2, 0, {"start_std": 0.1})
        return AlternatingObjective(net, task, lr=1e-2, spread_lr=1e-1, steps=2)

    def step(target, optimizer):
        before = {name: p.detach().clone() for name, p in target.net.named_parameters()}
        losses = target(gather_items(items))
        moved = {name for name, p in target.net.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {
            "head.mean",
            "head.log_noise",
            "head.spread.log_std",
        }  # only the posterior, by its separate optimiser
        losses["loss"].backward()
        assert all(p.grad is None for p in target.net.head.parameters())
        optimizer.step()
        optimizer.zero_grad()

    straight, stopped = objective(), objective()
    sgd = [
        torch.optim.SGD([p for p in target.net.lm.parameters() if p.requires_grad], 0.1)
        for target in (straight, stopped)
    ]
    for target, optimizer in zip((straight, stopped), sgd):
        step(target, optimizer)
    resumed = objective()
    resumed.load_state_dict(stopped.state_dict())
    step(straight, sgd[0])
    step(resumed, torch.optim.SGD([p for p in resumed.net.lm.parameters() if p.requires_grad], 0.1))
    states = [target.state_dict() for target in (straight, resumed)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]) and float(states[0]["step0"]) == 4
    net = resumed.net.requires_grad_(False)
    features = net.features(gather_items(items))
    assert log_predictive(net.head, features).exp().sum(1).tolist() == pytest.approx([1, 1])
    with pytest.raises(UserError, match=r"set head.name to vbll"):
        AlternatingObjective(LmNet(tiny_lm(), LinearAnswerHead(torch.zeros(2, 32))), task, 1e-3, 1e-2, 1)


def test_the_prior_of_a_vbll_head_is_centred_at_the_rows():
    rows = 30 * torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    head = make_head("vbll", rows, None, 10, 0, {"start_std": 0.25})
    assert torch.equal(head.mean, rows) and head.kl().item() < 50  # with a prior at zero it is over ten thousand nats
    with pytest.raises(UserError, match="'linear' has no option 'start_std'"):
        make_head("linear", rows, None, 10, 0, {"start_std": 0.25})
    biased = make_head("linear", rows, torch.ones(2), 10, 0, {})
    assert torch.equal(biased(torch.zeros(1, 32)), torch.ones(1, 2))
    with pytest.raises(UserError, match=r"no head 'vbl'. Near: 'vbll'"):
        make_head("vbl", rows, None, 10, 0, {})


# ---- errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "prompt", "options", "message"), [
    ("clases", "{text}", {}, "no kind 'clases'. Near: 'classes'"),
    ("causal", "{text}", {"anser": ""}, "'causal' has no option 'anser'. Near: 'answer'"),
    ("causal", "{text}", {}, "'causal' needs the option 'answer'"),
    ("causal", "{text}", {"answer": ""}, "answer: is empty"),
    ("causal", "", {"answer": "{text}", "length": 1}, "length 1"),
    ("causal", "", {"answer": "{text}", "windows": 0}, "windows 0; it must be at least 1"),
    ("causal", "{text}", {"answer": "{text}", "windows": 2}, "is for texts without a prompt"),
    ("classes", "", SENTIMENT, "needs a prompt and two answers"),
    ("classes", "x", {"answers": ["a", "b"]}, "expected mapping of str to str"),
    ("answers", "x", {"answers": {"a": "b", "c": "d"}, "normalise": "words"}, "normalise 'words'"),
    ("generation", "x", {"answer": "y", "gold": "z", "pattern": "("}, "is not a regular expression"),
    ("generation", "x", {"answer": "y", "gold": "z", "pattern": "a"}, "has 0 groups, needed one"),
])  # fmt: skip
def test_settings_that_do_not_go_together(kind, prompt, options, message):
    with pytest.raises(UserError, match=message):
        make_text_task(kind, prompt, options)


def test_rows_that_do_not_fit():
    words, row = tokenizer(), {"text": "good", "label": "2"}
    with pytest.raises(UserError, match=r"prompt 'Review: {txt}': no field 'txt'. Near: 'text'"):
        make_text_task("causal", "Review: {txt}", {"answer": "{text}"}).encode("a", row, words)
    with pytest.raises(UserError, match=r"'Review: {text}': field 'text' of a row is null"):
        make_text_task("causal", "Review: {text}", {"answer": "good"}).encode("a", {"text": None}, words)
    with pytest.raises(UserError, match="is not a template"):
        make_text_task("causal", "Review: {text", {"answer": "{text}"}).encode("a", row, words)
    with pytest.raises(UserError, match="row 'a' has label '2'"):
        make_text_task("classes", "{text}", SENTIMENT).encode("a", row, words)
    with pytest.raises(UserError, match=r"answer ' very good' is .*, needed one token"):
        make_text_task("classes", "{text}", {"answers": {"0": " very good", "1": " bad"}}).tokens(words)
    with pytest.raises(UserError, match="share a token"):
        make_text_task("classes", "{text}", {"answers": {"0": " bad", "1": " bad"}}).tokens(words)
    with pytest.raises(UserError, match="has label '2' and answers"):
        make_text_task("answers", "{text}", {"answers": {"0": " {text}", "2": " {b}"}, "label": "{label}"}).encode(
            "a", row, words
        )
    with pytest.raises(UserError, match="has no token that is counted"):
        make_text_task("causal", "", {"answer": "{one}", "end": False}).encode("a", {"one": "good"}, words)


def test_an_lm_that_caps_its_logits_is_refused():
    lm = tiny_lm()
    check_logits(lm)
    head = lm.forward
    lm.forward = lambda **inputs: type("Out", (), {"logits": head(**inputs).logits / 4})()
    with pytest.raises(UserError, match="scales or caps its logits"):
        check_logits(lm)
    with pytest.raises(UserError, match=r"model.first_block: 3; LlamaForCausalLM has blocks 0 to 2"):
        LmNet(tiny_lm(), first=3)


def step_of(task, batches, folder, **settings: Any) -> torch.Tensor:
    """Return what one step of SGD changes in the B of LoRA."""
    lm = tiny_lm().requires_grad_(False)
    adapt(lm, "lora", targets=["q_proj"], rank=2)
    config = TrainConfig(steps=1, lr=1.0, optimizer="sgd", momentum=0.0, clip=None, warmup=0, **settings)
    loop.train(LmObjective(LmNet(lm), task), batches.__getitem__, config, folder, "hash", runtime.accelerator(), seed=0)
    return torch.cat([p.detach().flatten() for name, p in lm.named_parameters() if "lora_B" in name])


@pytest.mark.parametrize("kind", ["causal", "generation"])
def test_a_step_of_several_batches_is_that_of_one_with_their_rows(kind, tmp_path):
    """Answers of 2 and 40 tokens: batches weigh by their tokens, not one as the other."""
    options = {"answer": " {a}", "end": False, "length": 99} | ({"gold": "a"} if kind == "generation" else {})
    task = make_text_task(kind, "{q}", options)
    rows = [{"q": "sky", "a": "blue sky"}, {"q": "grass is", "a": " ".join(["very green"] * 20)}]
    items = [task.encode(row["q"], row, tokenizer()) for row in rows]
    assert [item.pieces[0].counted for item in items] == [2, 40]
    one = step_of(task, [gather_items(items)], tmp_path / "one")
    several = step_of(task, [gather_items([item]) for item in items], tmp_path / "two", accumulate=2)
    assert (one - several).abs().max() < 1e-4 * one.abs().max()
    logged = [read_lines(tmp_path / name / "metrics.jsonl")[0]["loss"] for name in ("one", "two")]
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_an_objective_gives_the_loss_of_its_task():
    task = make_text_task("causal", "{q}", {"answer": " {a}"})
    lm = tiny_lm().requires_grad_(False)
    rows = [{"q": "sky", "a": "blue"}, {"q": "grass is", "a": "very green"}]
    items = [task.encode(row["q"], row, tokenizer()) for row in rows]
    each = [naive(lm, item.pieces[0]) for item in items]
    loss = LmObjective(LmNet(lm), task)(gather_items(items))["loss"]
    # A mean over tokens, not rows.
    assert float(loss) == pytest.approx(sum(map(sum, each)) / sum(map(len, each)), rel=1e-4)
    packed = task.training(items)
    assert (
        len(packed) == 2 and len(make_text_task("causal", "{q}", {"answer": " {a}", "pack": True}).training(items)) == 1
    )


# ---- rows that do not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options"),
    [("causal", {"answer": " {answer}"}), ("answers", {"answers": {"0": " {answer}", "1": " two"}})],
)
def test_a_list_has_no_text_of_its_own_and_a_place_in_it_has(kind, options):
    words, row = tokenizer(), {"question": "what is one", "answer": ["one", "two"], "label": "0"}
    options = {"label": "{label}", **options} if kind == "answers" else options
    with pytest.raises(UserError, match=r"it cannot be filled \(.*'one'.* is a list; name a place in it, such as"):
        make_text_task(kind, "Question: {question}", options).encode("a", row, words)
    place = make_text_task("causal", "Question: {question}", {"answer": " {answer[1]}", "end": False})
    (part,) = place.encode("a", row, words).pieces
    assert words.decode([token for token in part.labels if token != IGNORED]) == " two"


@pytest.mark.parametrize("answer", ["", "  "])
def test_an_empty_answer_is_refused(answer):
    task = make_text_task("causal", "Question: {question}", {"answer": " {answer}"})
    with pytest.raises(UserError, match="row 'a' has an empty answer; leave the row out"):
        task.encode("a", {"question": "what", "answer": answer}, tokenizer())


def test_a_piece_knows_what_did_not_fit():
    assert piece([1, 2, 3, 4], [5, 6], 4).cut == (2, 0) and piece([1, 2], [3, 4, 5, 6], 4).cut == (1, 1)
    assert piece([1, 2], [3, 4], 4).cut == (0, 0) and piece([], [1, 2, 3], 2).cut == (0, 1)
    branches = tree([1, 2, 3], [[4], [5, 6]], 4)
    assert branches.cut == (1, 0) and stem(branches, 1).cut == (1, 0)
