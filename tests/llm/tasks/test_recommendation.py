"""Recommendation on tiny LMs: prompts and loss mask, trees against a loop, vectors and gates, measures."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.lm_parts import CATALOGUE, ROWS, TITLES, encoded, small_hybrid, tiny_lm, tokenizer
from torch import nn

from vismt.base.errors import UserError
from vismt.data.texts.interactions import Catalogue
from vismt.llm.ilora.hybrid import USER_GROUPS, random_gates
from vismt.llm.ilora.method import gate_of, gate_part
from vismt.llm.ilora.recommenders import SASRec, pad_histories
from vismt.llm.net import LmNet
from vismt.llm.tasks import make_text_task
from vismt.llm.tasks.base import gather_items
from vismt.llm.tasks.item_prompts import read_answer
from vismt.llm.tasks.pieces import IGNORED, collate_pieces, stem, tree
from vismt.lowrank.layers.gates import instance_gates
from vismt.methods import adapt

PROMPT = "the {history} : {candidates} Answer:"
KINDS = ("llama", "qwen2", "gpt2")


def task(**options):
    return make_text_task("recommendation", PROMPT, {"candidates": 4, "history": 3, **options})


def shaken(lm: nn.Module) -> nn.Module:
    """Set the adapters to random values."""
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return lm


def gated(kind: str = "llama", gate: str | None = "linear", **options) -> LmNet:
    lm = tiny_lm(kind).requires_grad_(False)
    adapt(lm, "ilora", targets=r".*\.(q_proj|c_fc|up_proj)", rank=4, seed=1, n_experts=2, gate=gate, user_width=8)
    shaken(lm)
    if gate:
        with torch.no_grad():
            gate_of(lm).network.weight.mul_(5)
    return LmNet(lm, small_hybrid(**options)).eval()


# ---- prompt and loss mask ------------------------------------------------------------------------------------------------


def test_i13_the_right_title_and_the_end_of_its_line_are_counted_and_nothing_else():
    words, rec_task = tokenizer(), task()
    items = encoded(rec_task)
    for item, (history, target) in zip(rec_task.training(items), ROWS):
        for form in (item, item.hybrid):
            (piece,) = form.pieces
            counted = [token for token, label in zip(piece.ids, piece.labels) if label != IGNORED]
            assert words.decode(counted) == f" {TITLES[target]}\n" and all(
                b in (IGNORED, a) for a, b in zip(piece.ids, piece.labels)
            )
            context = [token for token, label in zip(piece.ids, piece.labels) if label == IGNORED]
            assert list(piece.ids) == context + counted
        titles = ", ".join(TITLES[i] for i in history[-3:])
        (text,) = item.pieces
        assert words.decode(text.ids[: -text.counted]).startswith(f"the {titles} : ") and text.items is None
        (both,) = item.hybrid.pieces
        assert [i for i in both.items if i >= 0] == [*history[-3:], *item.listed.candidates]
        assert len(both.ids) == len(text.ids) + len(history[-3:]) + 4  # exactly one slot for each title


def test_a_slot_stands_after_its_title():
    (item,) = encoded(task(), ROWS[:1])
    words, piece = tokenizer(), item.hybrid.pieces[0]
    before: list[int] = []
    for token, number in zip(piece.ids, piece.items):
        if number >= 0:
            assert words.decode(before).endswith(TITLES[number])
        before.append(token)


def test_a_prompt_that_is_too_long_loses_its_beginning_and_no_place_moves():
    cut = tree([1, 2, 3, 4], [[5, 6], [7]], 5, [9, -1, 8, -1])
    assert cut.ids == (2, 3, 4, 5, 6, 7) and cut.items == (-1, 8, -1, -1, -1, -1) and cut.shared == 3
    assert stem(cut, 1).ids == (2, 3, 4, 7) and stem(cut, 1).labels == (IGNORED, IGNORED, IGNORED, 7)
    assert stem(cut, 0).items == (-1, 8, -1, -1, -1)
    with pytest.raises(UserError, match="length 2: no room for a prompt before an answer of 2 tokens"):
        tree([1], [[5, 6], [7]], 2)


def test_the_curriculum_goes_from_text_to_vectors():
    rec_task = task(curriculum=0.5)
    items = rec_task.training(encoded(rec_task))
    forms = [rec_task.form(items, number, 400, seed=0)[0].pieces[0].items is not None for number in range(400)]
    assert forms == [rec_task.form(items, number, 400, seed=0)[0].pieces[0].items is not None for number in range(400)]
    assert all(forms[200:]) and not forms[0]
    for start, share in ((0, 0.125), (50, 0.375), (100, 0.625), (150, 0.875)):  # 1 - k / 200, in the middle of each
        assert sum(forms[start : start + 50]) / 50 == pytest.approx(share, abs=0.2)
    assert forms[:200] != [rec_task.form(items, n, 400, seed=1)[0].pieces[0].items is not None for n in range(200)]
    batch = [rec_task.form(items, number, 400, seed=0) for number in (3, 399)]
    assert len({item.pieces[0].items is None for item in batch[0]}) == 1  # a batch has one form
    whole = task(curriculum=0.0)
    assert whole.training(encoded(whole))[0].pieces[0].items is not None
    plain = task(items=False)
    assert encoded(plain)[0].hybrid is None and plain.form(encoded(plain), 399, 400, 0)[0].pieces[0].items is None


# ---- candidates by log-likelihood -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("form", ["text", "hybrid"])
def test_a_tree_gives_what_each_answer_gives_alone(kind, first, form):
    lm = tiny_lm(kind).requires_grad_(False)
    net, rec_task = LmNet(lm, small_hybrid(), first).eval(), task()
    items = encoded(rec_task)
    items = [item.hybrid for item in items] if form == "hybrid" else items
    records = rec_task.score(net, gather_items(items), items)
    states = net.lower_states([item.pieces[0] for item in items])
    for item, state in zip(items, states):
        item.lower = [state]
    cached = rec_task.score(net, gather_items(items), items) if first else records
    for record, other, item in zip(records, cached, items):
        nats = []
        for number in range(4):  # one sequence for each answer, one forward pass for each, no padding
            alone = collate_pieces([stem(item.pieces[0], number)])
            vectors = {}
            if form == "hybrid":
                vectors["vectors"] = net.head.vectors(alone["items"][alone["items"] >= 0])
            with torch.no_grad():
                nats.append(float(net.token_nll({**alone, **vectors})[0]))
        expected = torch.tensor([-n for n in nats], dtype=torch.float64).log_softmax(0).tolist()
        assert record["log_p"] == pytest.approx(expected, abs=2e-3) and other["log_p"] == pytest.approx(
            expected, abs=2e-3
        )
        assert record["label"] == item.label and item.listed.titles[item.label] == TITLES[ROWS[int(item.id[-1])][1]]
    measures = rec_task.measures(records)
    assert measures["HitRatio@1"].counts and measures["HitRatio@1"].values == {
        record["id"]: float(max(record["log_p"]) == record["log_p"][record["label"]]) for record in records
    }
    assert rec_task.quality(records) == pytest.approx(math.exp(-measures["NLL in nats"].score))


def test_normalised_scores():
    net = LmNet(tiny_lm())
    log_p = {}
    for how in ("none", "token", "character"):
        rec_task = task(normalise=how, items=False)
        items = encoded(rec_task)
        log_p[how] = rec_task.score(net, gather_items(items), items)[0]["log_p"]
        sizes = {
            "none": [1] * 4,
            "token": [len(tokenizer()(f" {t}\n")["input_ids"]) for t in items[0].listed.titles],
            "character": [len(t) for t in items[0].listed.titles],
        }[how]
        with torch.no_grad():
            nats = net.branch_nll(gather_items(items))[0][0].double()
        assert log_p[how] == pytest.approx((-nats / torch.tensor(sizes)).log_softmax(0).tolist(), abs=1e-6)
    assert log_p["none"] != log_p["token"] != log_p["character"]


def test_the_first_choice_can_be_learnt():
    # After training on the right answers, these are the most likely candidates and the written answers.
    rec_task, written = task(curriculum=0.0), task(answer="write", new_tokens=6)
    net = LmNet(tiny_lm().requires_grad_(False), None)
    adapt(net.lm, "lora", targets=r".*_proj", rank=8, seed=0)
    with torch.no_grad():
        net.lm.lm_head.weight.mul_(8)  # otherwise no token has a high probability
    net.head = small_hybrid()
    items, questions = rec_task.training(encoded(rec_task)), encoded(rec_task)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 1e-2)
    for _ in range(40):
        loss = rec_task.loss(net.train(), gather_items(items))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    shown = rec_task.shown(net.eval(), questions)
    with torch.no_grad():
        assert rec_task.measures(rec_task.score(net, gather_items(shown), shown))["HitRatio@1"].score == 1
        text = written.shown(net, encoded(written))
        records = written.score(net, gather_items(text), text)
    assert [record["text"].split("\n")[0] for record in records] == [f" {TITLES[t]}" for _, t in ROWS]
    assert {name: m.score for name, m in written.measures(records).items()} == dict.fromkeys(
        ("HitRatio@1", "ValidRatio", "HitRatio@1 by substring", "ValidRatio by substring"), 1.0
    )
    alone = [
        written.score(net, gather_items([item]), [item])[0] for item in text
    ]  # padding on the left changes nothing
    assert [record["text"].split("\n")[0] for record in alone] == [record["text"].split("\n")[0] for record in records]


# ---- vectors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_replaces_the_input_embedding_of_its_slot(kind):
    lm = tiny_lm(kind).requires_grad_(False)
    net, (item,) = LmNet(lm, small_hybrid()).eval(), [piece.hybrid for piece in encoded(task(), ROWS[:1])]
    piece = stem(item.pieces[0], 0)
    batch = collate_pieces([piece])
    places = batch["items"] >= 0
    vectors = net.head.vectors(batch["items"][places])
    embeddings = lm.get_input_embeddings()(batch["ids"]).clone()
    embeddings[places] = vectors.detach()
    with torch.no_grad():
        expected = lm.base_model(inputs_embeds=embeddings).last_hidden_state
        actual = net.hidden({**batch, "vectors": vectors})
        without = net.hidden(batch)
        again = net.hidden({**batch, "ids": torch.where(places, 7, batch["ids"]), "vectors": vectors})
    assert torch.allclose(actual, expected, atol=1e-4) and (actual - without).abs().max() > 1e-2
    assert torch.equal(actual, again)  # for any slot token
    assert not lm.get_input_embeddings()._forward_hooks


def test_deeper_a_vector_weighs_what_it_would_weigh_in_the_embeddings():
    lm = tiny_lm().requires_grad_(False)
    net, (item,) = LmNet(lm, small_hybrid(), first=2).eval(), [row.hybrid for row in encoded(task(), ROWS[:1])]
    batch = collate_pieces([stem(item.pieces[0], 0)])
    states: list[torch.Tensor] = []
    hook = lm.model.layers[2].register_forward_pre_hook(lambda module, inputs: states.append(inputs[0]))
    vectors = net.head.vectors(batch["items"][batch["items"] >= 0])
    for inputs in (batch, {**batch, "vectors": vectors}):
        net.hidden(inputs)
    hook.remove()
    places = batch["items"] >= 0
    assert torch.equal(states[0][~places], states[1][~places])
    token_embeddings = lm.get_input_embeddings().weight[batch["ids"][places]]
    change, state = states[1][places] - states[0][places], states[0][places]
    length = lm.get_input_embeddings().weight.norm(dim=1).mean()
    assert torch.allclose(change, (vectors - token_embeddings) / length * state.norm(dim=1, keepdim=True), atol=1e-4)
    net.hidden({**batch, "vectors": vectors}).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.head.projector.parameters())


# ---- the recommender and the gates --------------------------------------------------------------------------------------------


def test_i10_a_training_step_leaves_the_recommender_as_it_was():
    net, rec_task = gated(), task(curriculum=0.0)
    net.head.projector.requires_grad_(True)
    before = {name: value.clone() for name, value in net.head.recommender.state_dict().items()}
    net.train()
    assert net.head.projector.training and not any(module.training for module in net.head.recommender.modules())
    batch = gather_items(rec_task.training(encoded(rec_task)))
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained and not any("recommender" in name for name in trained)
    first = net.head.gates(net.lm, batch).detach()
    assert torch.equal(first, net.head.gates(net.lm, batch))  # in train mode its dropout would make them differ
    moving = {name: p.detach().clone() for name, p in net.named_parameters() if p.requires_grad}
    rec_task.loss(net, batch)["loss"].backward()
    optimizer.step()
    after = net.head.recommender.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before) and not net.head.recommender.training
    assert all(not torch.equal(p, moving[name]) for name, p in net.named_parameters() if p.requires_grad)
    assert "lm.instance_gate.network.weight" in moving and "head.projector.0.weight" in moving


def test_a_text_batch_does_not_move_the_projector():
    net, rec_task = gated(), task()
    net.head.projector.requires_grad_(True)
    rec_task.loss(net, gather_items(rec_task.training(encoded(rec_task))))["loss"].backward()
    assert all(p.grad is None for p in net.head.projector.parameters())
    assert gate_of(net.lm).network.weight.grad.abs().sum() > 0


def test_gates_come_from_the_users_history():
    net, rec_task = gated(), task()
    items = rec_task.training(encoded(rec_task))
    batch = gather_items(items)
    gates = net.head.gates(net.lm, batch)
    users = net.head.recommender(pad_histories([h[-3:] for h, _ in ROWS]))
    assert torch.allclose(gates, gate_of(net.lm)(users)) and (gates[0] - gates[1]).abs().max() > 1e-3
    with torch.no_grad():
        loss = rec_task.loss(net, batch)["loss"]
        with instance_gates(gates):
            nats, tokens = net.token_nll(batch)
        assert torch.allclose(loss, nats.sum() / tokens.sum())
        shuffled = {**batch, "history": batch["history"].roll(1, 0)}  # another user's history: another loss
        assert (rec_task.loss(net, shuffled)["loss"] - loss).abs() > 1e-5
    with pytest.raises(UserError, match="gates of 2 samples for a batch of 3"):
        rec_task.loss(net, {**batch, "history": batch["history"][:2]})


def test_one_gate_for_all_tokens_also_where_answers_are_written():
    net, rec_task = gated(), task(answer="write", new_tokens=3)
    items = rec_task.shown(net, encoded(rec_task))
    gates: list[torch.Tensor] = []
    host = net.lm.model.layers[1].self_attn.q_proj
    plain = host.gate
    host.gate = lambda x: gates.append(plain(x)) or gates[-1]
    records = rec_task.score(net, gather_items(items), items)
    assert len(records) == 3 and len(gates) > 1 and all(torch.equal(gate, gates[0]) for gate in gates)


def test_controls_do_not_depend_on_the_user():
    others = torch.randn(97, 8, generator=torch.Generator().manual_seed(0))
    rec_task = task()
    batch = gather_items(encoded(rec_task))
    other = {**batch, "history": batch["history"].flip(0)}
    for net in (gated(gate=None, gates="random"), gated(gates="shuffled-user", others=others)):
        gates = net.head.gates(net.lm, batch)
        assert torch.equal(gates, net.head.gates(net.lm, other)) and (gates[0] - gates[1]).abs().max() > 1e-4
        assert torch.allclose(gates.sum(1), torch.ones(3)) and bool((gates >= 0).all())
        flipped = net.head.gates(net.lm, {**batch, "key": batch["key"].flip(0)})
        assert torch.equal(gates, flipped.flip(0))  # gates belong to the row, in any batch
    drawn = random_gates(torch.arange(2000), 4)
    assert drawn.mean(0).tolist() == pytest.approx([0.25] * 4, abs=0.02)
    assert float(drawn.var(0).mean()) == pytest.approx(3 / 80, rel=0.1)  # (1/4)(3/4)/5 of a flat Dirichlet
    assert gate_part(tiny_lm()) is None and small_hybrid().gates(tiny_lm(), batch) is None


def test_gates_of_a_group_follow_the_users_and_not_the_row():
    others = small_hybrid().recommender(torch.tensor([[a, b, -1] for a in range(4, 7) for b in range(8)]))
    net = gated(gate=None, gates="group", others=others)
    batch = gather_items(encoded(task(), [([a, b], 5) for a in range(4) for b in range(6, 12)]))
    gates = net.head.gates(net.lm, batch)
    assert torch.equal(gates, net.head.gates(net.lm, {**batch, "key": batch["key"].flip(0)}))
    assert torch.equal(net.head.gates(net.lm, {**batch, "history": batch["history"].flip(0)}), gates.flip(0))
    users = net.head.recommender(batch["history"])
    nearest = [min(range(USER_GROUPS), key=lambda g: float((user - others[g]).norm())) for user in users]
    groups = {group: gate for group, gate in zip(nearest, gates)}
    assert all(torch.equal(groups[group], gate) for group, gate in zip(nearest, gates))
    assert 1 < len({tuple(gate.tolist()) for gate in gates}) == len(groups) < len(gates)


def test_a_prompt_of_the_last_items_leaves_the_gates_the_history():
    words = tokenizer()
    (whole,), (cut,), (short,) = (encoded(task(**of), ROWS[:1]) for of in ({}, {"shown": 1}, {"history": 1}))
    assert words.decode(cut.pieces[0].ids) == words.decode(short.pieces[0].ids) != words.decode(whole.pieces[0].ids)
    assert next(n for n in cut.hybrid.pieces[0].items if n >= 0) == ROWS[0][0][-1]
    assert cut.listed.history == whole.listed.history == ROWS[0][0] and short.listed.history == ROWS[0][0][-1:]
    for shown in (0, 4):
        with pytest.raises(UserError, match=f"shown {shown} of a history of 3; needed 1 to 3, or null for all"):
            task(shown=shown)


# ---- measures (I12) ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "right", "valid", "right_substring", "valid_substring"), [
    (" Nirvana\nmore", True, True, True, True),
    (" nirvana", True, True, True, True),  # case
    (" Nirvana.", False, False, True, True),  # part of the line
    (" I think of The Cure", False, False, False, True),  # another candidate
    (" Nirvana and The Cure", False, False, False, False),  # two names
    (" Enigma", False, False, False, False),  # no candidate
    ("", False, False, False, False),
    ("\nNirvana", False, False, False, False),  # the first line is empty
    (" Nirvana Tribute Band", False, True, False, True),  # a name within a longer name: the longer name counts
    (" The  Cure ", False, True, False, True),
])  # fmt: skip
def test_i12_reading_what_was_written(text, right, valid, right_substring, valid_substring):
    titles = ["Nirvana", "The Cure", "Nirvana Tribute Band", "Muse"]
    judgement = read_answer(text, titles, 0)
    assert judgement == {
        "right": right,
        "valid": valid,
        "right_substring": right_substring,
        "valid_substring": valid_substring,
    }


def test_i12_ratios_are_of_all_rows():
    rec_task = task(answer="write")
    titles = ["a b", "c", "d"]
    records = [{"id": text, **read_answer(text, titles, 0)} for text in ("a b", "c", "e", "x a b")]
    ratios = {name: measure.score for name, measure in rec_task.measures(records).items()}
    # exact: 1 hit, 2 valid of 4 (1 / 2 of the valid ones is never reported as the hit ratio); by substring "x a b" is a hit, too
    assert ratios["HitRatio@1"] == 0.25 and ratios["ValidRatio"] == 0.5
    assert read_answer("x a b", titles, 0)["right_substring"] and rec_task.quality(records) == 0.25


# ---- errors -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "options", "message"), [
    ("{history}", {}, r"has the places \['history'\]"), ("{history} {candidates} {title}", {}, "has the places"),
    ("{history", {}, "is not a template"), (PROMPT, {"answer": "chose"}, "answer 'chose'. Near: 'choose'"),
    (PROMPT, {"normalise": "words"}, "normalise 'words'"), (PROMPT, {"candidates": 1}, "candidates 1"),
    (PROMPT, {"curriculum": 1.5}, "curriculum 1.5"), (PROMPT, {"history": 0}, "history 0"),
])  # fmt: skip
def test_settings_that_cannot_be(prompt, options, message):
    with pytest.raises(UserError, match=message):
        make_text_task("recommendation", prompt, options)


def test_rows_that_do_not_fit():
    words, rec_task = tokenizer(), task()
    with pytest.raises(UserError, match="needs sets of kind interactions"):
        rec_task.encode("a", {"text": "x"}, words)
    with pytest.raises(UserError, match="row 'a' has no history"):
        rec_task.encode("a", {"history": [], "next": 1, "catalogue": CATALOGUE}, words)
    with pytest.raises(UserError, match="slot ' one two' is 2 tokens, needed one"):
        encoded(task(slot=" one two"))
    with pytest.raises(UserError, match=r"candidates: 4 of 3 items"):
        rec_task.encode("a", {"history": [0], "next": 1, "catalogue": Catalogue(tuple("abc"), tuple("xyz"))}, words)
    with pytest.raises(UserError, match="histories of 1 to 3 items are needed, these have up to 4"):
        SASRec(12, 3)(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(UserError, match="histories of 1 to 3 items"):
        SASRec(12, 3)(torch.tensor([[-1, -1]]))
    with pytest.raises(UserError, match="heads that divide the width"):
        SASRec(12, 3, width=8, heads=3)
    with pytest.raises(UserError, match=r"gates: no source 'shuffled'. Near: 'shuffled-user'"):
        small_hybrid(gates="shuffled")
    for gates in ("shuffled-user", "group"):
        with pytest.raises(UserError, match=f"'{gates}' needs the representations of other users"):
            small_hybrid(gates=gates)
