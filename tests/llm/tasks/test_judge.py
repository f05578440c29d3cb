"""Candidates that are judged one by one: branches against separate prompts, the loss by hand, training rows, sampling."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.lm_parts import ROWS, TITLES, encoded, small_hybrid, tiny_lm, tokenizer

from vismt.base.errors import UserError
from vismt.jobs.lm.data import ItemBatches
from vismt.llm.ilora.hybrid import Hybrid, title_vectors
from vismt.llm.ilora.recommenders import SASRec
from vismt.llm.net import LmNet, stored_lower_states
from vismt.llm.tasks import make_text_task
from vismt.llm.tasks.base import gather_items
from vismt.llm.tasks.pieces import collate_pieces, prune, stem, tree
from vismt.methods import adapt
from vismt.uncertainty.intervals import mean_interval

YES, NO = (tokenizer()(word, add_special_tokens=False)["input_ids"][0] for word in (" yes", " no"))


def task(**options):
    given = {"answer": "judge", "question": " and {candidate} is", "candidates": 4, "history": 3, "negatives": 2}
    return make_text_task("recommendation", "the {history}", {"curriculum": 0, **given, **options})


def hybrid_net(kind: str = "llama", first: int = 0, **options) -> LmNet:
    lm = tiny_lm(kind).requires_grad_(False)
    head = small_hybrid(**options)
    with torch.no_grad():
        for weight in head.projector.parameters():
            weight.mul_(3)  # so that candidates differ
    return LmNet(lm, head, first).eval()


def by_hand(net: LmNet, piece) -> list[float]:
    """Return logit(" yes") - logit(" no") after each branch, from a forward pass of the whole LM for each prompt, unpadded."""
    scores = []
    for number in range(max(piece.documents)):
        batch = collate_pieces([stem(piece, number)])
        if "items" in batch:
            batch["vectors"] = net.head.vectors(batch["items"][batch["items"] >= 0])
        with torch.no_grad():
            logits = net.lm.get_output_embeddings()(net.hidden(batch))[0, -1]
        scores.append(float(logits[YES] - logits[NO]))
    return scores


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("options", [{"items": False}, {}, {"titles": False}], ids=["titles", "both", "slots"])
def test_a_branch_scores_what_its_prompt_scores_alone(kind, first, options):
    net, judge = hybrid_net(kind, first), task(**options)
    items = judge.shown(net, encoded(judge))
    for item, state in zip(items, net.lower_states([item.pieces[0] for item in items])):
        item.lower = [state] if first else None
    records = judge.score(net, gather_items(items), items)
    for item, record in zip(items, records):
        scores = by_hand(net, item.pieces[0])
        assert len(scores) == 4 and max(scores) - min(scores) > 0.01
        assert record["log_p"] == pytest.approx(torch.tensor(scores).log_softmax(0).tolist(), abs=2e-3)
        assert record["label"] == item.label and record["user"] == f"user {item.id[-1]}"
    hits = judge.measures(records)["HitRatio@1"]
    assert hits.chance == 0.25 and hits.values == {
        record["id"]: float(record["log_p"][record["label"]] == max(record["log_p"])) for record in records
    }


def test_the_loss_is_the_cross_entropy_over_the_branches():
    net, judge = hybrid_net(), task()
    items = judge.training(encoded(judge))
    terms = []
    for item, (_, target) in zip(items, ROWS):
        scores = torch.tensor(by_hand(net, item.pieces[0]))
        assert len(scores) == 3  # the right candidate and two negatives
        assert item.listed.candidates[item.label] == target and len(set(item.listed.candidates)) == 3
        terms.append(float(scores.logsumexp(0) - scores[item.label]))
    losses = judge.loss(net, gather_items(items))
    assert losses["loss"].item() == pytest.approx(sum(terms) / 3, abs=1e-3) and losses["hybrid"].item() == 1


def test_prompts_have_titles_slots_or_both():
    words = tokenizer()
    (item,) = encoded(task(join=" "), ROWS[:1])
    question = words.decode([t for t, d in zip(item.pieces[0].ids, item.pieces[0].documents) if d == 1 + item.label])
    assert question == " and two three is" and item.pieces[0].items is None
    assert words.decode(item.pieces[0].ids[: item.pieces[0].shared]) == "the blue green bright"
    (slots,) = encoded(task(join=" ", titles=False), ROWS[:1])
    piece = slots.hybrid.pieces[0]
    assert [number for number in piece.items if number >= 0] == [0, 1, 2, *slots.listed.candidates]
    # The text form has them.
    assert "two" not in words.decode(piece.ids) and "two three" in words.decode(slots.pieces[0].ids)
    (both,) = encoded(task(join=" "), ROWS[:1])
    assert len(both.hybrid.pieces[0].ids) == len(item.pieces[0].ids) + 3 + 4


def test_pruning_keeps_the_prompt_and_whole_branches():
    whole = tree([1, 2], [[3, 4], [5], [6, 7]], 9, [8, -1], [[-1, 0], [1], [-1, 2]])
    kept = prune(whole, [2, 0])
    assert kept.ids == (1, 2, 6, 7, 3, 4) and kept.documents == (0, 0, 1, 1, 2, 2) and kept.shared == 2
    assert kept.items == (8, -1, -1, 2, -1, 0)
    batch = collate_pieces([kept])
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 2, 3]]


def test_the_right_candidate_can_be_learnt():
    net, judge = hybrid_net(projector="linear"), task(titles=False)
    adapt(net.lm, "lora", targets=r".*_proj", rank=8, seed=0)
    items = judge.training(encoded(judge))
    net.head.projector.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    for _ in range(60):
        judge.loss(net.train(), gather_items(items))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    shown = judge.shown(net.eval(), encoded(judge))
    with torch.no_grad():
        # One of four, two of which were never negatives.
        assert judge.quality(judge.score(net, gather_items(shown), shown)) > 0.5


def test_texts_that_are_alike_run_once(tmp_path, monkeypatch):
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path))
    net, judge = hybrid_net(first=2), task(titles=False, join="")
    pieces = [item.hybrid.pieces[0] for item in encoded(judge, [([0, 1], 5), ([2, 3], 6), ([4], 7)])]
    alone = [net.lower_states([piece])[0] for piece in pieces]
    ran, states_of = [], net.states
    monkeypatch.setattr(net, "states", lambda batch: ran.append(len(batch["ids"])) or states_of(batch))
    states = stored_lower_states(net, pieces)
    assert sum(ran) == 2 and states[0] is states[1] and states[2] is not states[0]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(alone, states))
    packed = [pieces[0], stem(pieces[0], 0)]
    packed[1] = tree(pieces[0].ids[:2], [pieces[0].ids[2:]], 99)  # the same tokens in other documents
    assert not torch.equal(*stored_lower_states(net, packed))


def test_a_batch_draws_users_and_then_a_row_of_each():
    rows, users = [([0], 1)] * 90 + [([1], 2)] * 6 + [([2], 3)] * 4, ["a"] * 90 + ["b"] * 6 + ["c"] * 4
    for sample, expected in (("users", [50, 50, 50]), ("rows", [90, 6, 4])):
        judge = task(sample=sample, titles=False)
        items = judge.training(encoded(judge, rows, users))
        size = 3 if sample == "users" else 100
        batches = ItemBatches(items, size, judge, 50, seed=0)
        steps = 50 if sample == "users" else 1
        last = torch.cat([batches(k)["history"][:, 0] for k in range(steps)])
        assert last.bincount().tolist() == expected
        again = ItemBatches(items, size, judge, 50, seed=0)
        assert torch.equal(again(7)["key"], batches(7)["key"])
    by_user = task(sample="users")
    batches = ItemBatches(encoded(by_user, rows, users), 3, by_user, 50, seed=0)
    keys = torch.cat([batches(k)["key"] for k in range(50)])
    assert len(keys.unique()) > 30  # not always the first row of a user


def test_users_are_the_examples_where_they_have_several_rows():
    judge = task()
    log_p = [math.log(0.7), math.log(0.1), math.log(0.1), math.log(0.1)]
    rows = [("a", 0), ("a", 0), ("a", 0), ("b", 1), ("c", 0), ("c", 1)]
    records = [{"id": f"{i}", "user": user, "label": label, "log_p": log_p} for i, (user, label) in enumerate(rows)]
    hits = judge.measures(records)["HitRatio@1"]
    assert hits.values == {"a": 1.0, "b": 0.0, "c": 0.5} and not hits.counts and hits.score == 0.5
    assert hits.estimate().half == pytest.approx(mean_interval([1, 0, 0.5])[1])
    alone = judge.measures(records[2:5])["HitRatio@1"]  # a row of each user
    assert alone.counts and list(alone.values) == ["2", "3", "4"]


def test_vectors_of_titles_and_gates_from_them():
    lm, words = tiny_lm().requires_grad_(False), tokenizer()
    vectors = title_vectors(lm, words, TITLES)
    assert vectors.shape == (12, 32) and vectors.mean(0).abs().max() < 1e-5
    assert torch.allclose(vectors.std(0), torch.ones(32), atol=1e-4)
    table = lm.get_input_embeddings().weight
    raw = [table[words(f" {t}", add_special_tokens=False)["input_ids"]].mean(0) for t in ("blue", "two three", "nine")]
    step = (raw[0] - raw[1]) / (raw[2] - raw[1])
    assert torch.allclose((vectors[0] - vectors[5]) / (vectors[11] - vectors[5]), step, rtol=1e-3)

    adapt(lm, "ilora", targets=r".*q_proj", rank=4, seed=1, n_experts=2, user_width=32)
    head = Hybrid(SASRec(12, 3, width=8), 32, gates="text", texts=vectors)
    history = torch.tensor([[0, 5, -1], [11, -1, -1]])
    gates = head.gates(lm, {"history": history})
    expected = lm.instance_gate(torch.stack([(vectors[0] + vectors[5]) / 2, vectors[11]]))
    assert torch.allclose(gates, expected, atol=1e-6) and head.user_width == 32
    assert "texts" not in head.state_dict()


@pytest.mark.parametrize(("options", "message"), [
    ({"question": " and is"}, r"question: has the places \[\]; 'recommendation' needs {candidate}"),
    ({"question": "{candidate"}, "question .* is not a template"),
    ({"answer": "choose"}, "question: is for answer judge, and answer is 'choose'"),
    ({"negatives": 4}, "negatives 4 of 4 candidates; needed 1 to 3"),
    ({"negatives": 0}, "negatives 0 of 4 candidates"),
    ({"sample": "user"}, "sample 'user'. Near: 'users'"),
])  # fmt: skip
def test_settings_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        task(**options)


def test_prompts_and_answers_that_cannot_be(monkeypatch):
    with pytest.raises(
        UserError, match=r"prompt: has the places \['history', 'candidates'\]; 'recommendation' needs {history}"
    ):
        make_text_task("recommendation", "{history} {candidates}", {"answer": "judge", "question": "{candidate}?"})
    net = hybrid_net()
    rows = [task().training(encoded(judge))[0] for judge in (task(), task(negatives=3))]
    rows[1] = task(negatives=3).training(encoded(task(negatives=3)))[0]
    with pytest.raises(UserError, match="branch_logits: rows of different numbers of answers"):
        judge = task()
        encoded(judge)
        judge.loss(net, gather_items(rows))
