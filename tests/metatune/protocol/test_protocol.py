"""The protocol: the same episodes for every model, records that resume, the panel of an episode."""

import json
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakSet

import numpy as np
import pytest
import torch
from torch import nn

from vismt.base.errors import UserError
from vismt.evaluation.certify import Certify
from vismt.evaluation.ood import Ood
from vismt.metatune import EpisodeSampler, ProtoNet, features, run_protocol
from vismt.metatune.functional import WithWeights
from vismt.metatune.protonet import PrototypeClassifier, prototypes
from vismt.storage.lines import read_lines, write_lines

LABELS = torch.arange(6).repeat_interleave(20)


class Backbone(nn.Module):
    """Counts its images."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.weight = nn.Parameter(torch.ones(3))
        self.count = 0

    def forward(self, images):
        self.count += len(images)
        return self.drop(images.mean((2, 3)) * self.weight - 0.5)


class Plain(Backbone):
    """A backbone that nothing changes, so that its features can be kept."""

    def forward(self, images):
        return self.drop(images.mean((2, 3)) * self.weight - 0.5)


class Pixels:
    """One colour per class with noise; reads are counted."""

    classes = tuple("abcdef")

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        colours = torch.rand(6, 3, 1, 1, generator=generator)
        noise = torch.randn(120, 3, 4, 4, generator=generator)
        self.images = (colours[LABELS] + 0.4 * noise).clamp(0, 1)

    def __getitem__(self, index):
        return self.images[index]


class Outside:
    """Noise of other classes; the rows of every read are kept."""

    def __init__(self, count=120):
        self.images, self.read = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(5)), []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.read.append(index)
        return self.images[index]


class Darken:
    """A perturbation that records its calls."""

    def __init__(self, amount=0.9, seed=0, name="dark"):
        self.amount, self.seed, self.name, self.calls = amount, seed, name, []

    def describe(self, num_classes=None):
        return self.name

    def settings(self):
        return {"amount": self.amount}

    def perturb(self, model, images, labels, *, num_classes, keys):
        assert len(keys) == len(images)
        self.calls.append((len(images), num_classes, keys[0], bool(model.training)))
        return images * (1 - self.amount)


def run(records=None, episodes=6, **changes):
    options = {"attacks": [Darken()], "fingerprint": "w1", "data": "fake"} | changes
    net = options.pop("net", None) or ProtoNet(Backbone())
    sampler = options.pop("sampler", None) or EpisodeSampler(LABELS, ways=4, shots=2, queries=5, seed=1)
    return run_protocol(net, Pixels(), sampler, episodes=episodes, records=records, **options)


def test_accuracies_equal_a_plain_loop():
    net = ProtoNet(Backbone()).train()
    sampler, pixels = EpisodeSampler(LABELS, ways=4, shots=2, queries=5, seed=1), Pixels()
    result = run(net=net)
    assert list(result) == ["clean", "dark"] and result["clean"].dtype == torch.float64
    assert net.training and net.backbone.drop.training  # modes are as before, though it was scored in eval mode
    net.eval()
    for i in range(6):
        e = sampler[i]
        logits = net(pixels[e.support], e.support_labels, pixels[e.query] * 0.1)
        assert float(result["dark"][i]) == pytest.approx(float((logits.argmax(1) == e.query_labels).double().mean()))
    assert result["dark"].mean() < result["clean"].mean()


def test_pieces_do_not_change_the_result_and_seeds_differ():
    attack = Darken()
    whole, pieces = run(), run(batch=7, attacks=[attack])
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    # 4 ways x 5 queries = 20 = 7 + 7 + 6, six episodes; every piece has another seed; the model is in eval mode.
    assert [call[0] for call in attack.calls[:3]] == [7, 7, 6] and len({call[2] for call in attack.calls}) == 18
    assert all(call[1] == 4 and not call[3] for call in attack.calls)


def test_resume_continues_at_the_episode_where_it_stopped(tmp_path):
    records = tmp_path / "sub" / "fake.jsonl"
    whole = run(records)
    lines = records.read_text().splitlines(keepends=True)
    header, rows = json.loads(lines[0]), [json.loads(line) for line in lines[1:]]
    assert header["weights"] == "w1" and header["protocol"]["data"] == "fake"
    assert [row["episode"] for row in rows] == list(range(6)) and rows[2]["clean"] == float(whole["clean"][2])
    # Killed in the middle of writing episode 3.
    records.write_text("".join(lines[:4]) + lines[4][:9])
    attack = Darken()
    again = run(records, attacks=[attack])
    assert len(attack.calls) == 3 and records.read_text() == "".join(lines)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    # Nothing is left to do, then two episodes more, then fewer.
    net = ProtoNet(Backbone())
    assert torch.equal(run(records, net=net)["clean"], whole["clean"]) and net.backbone.count == 0
    assert len(run(records, episodes=8)["clean"]) == 8
    assert torch.equal(run(records, episodes=3)["clean"], whole["clean"][:3])


def test_the_quality_of_probabilities_is_on_record_and_resumes(tmp_path):
    from vismt.uncertainty.probability_metrics import scores

    net, pixels = ProtoNet(Backbone()).eval(), Pixels()
    sampler = EpisodeSampler(LABELS, ways=4, shots=2, queries=5, seed=1)
    records = tmp_path / "fake.jsonl"
    whole = run(records, net=net, probabilities=True, batch=7)
    assert list(whole) == ["clean", "dark", "clean gaps", "clean nll", "clean brier"]
    for i in range(6):
        e = sampler[i]
        with torch.no_grad():
            p = net(pixels[e.support], e.support_labels, pixels[e.query]).softmax(1)
        wanted = scores(p, e.query_labels)
        assert float(whole["clean nll"][i]) == pytest.approx(wanted.nll, abs=1e-5)
        assert float(whole["clean brier"][i]) == pytest.approx(wanted.brier, abs=1e-5)
        assert float(whole["clean gaps"][i].abs().sum()) == pytest.approx(wanted.ece, abs=1e-5)
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:3]) + lines[3][:9])
    again = run(records, probabilities=True, batch=7)
    assert records.read_text() == "".join(lines) and all(torch.equal(whole[name], again[name]) for name in whole)
    with pytest.raises(UserError, match="of another run"):
        run(records, batch=7)


def test_records_have_every_answer(tmp_path):
    records = tmp_path / "fake.jsonl"
    whole = run(records)
    header, *rows = read_lines(records)
    for row in rows:
        for name in ("clean", "dark"):
            assert len(row[f"{name} right"]) == 20
            assert row[f"{name} right"].count("1") / 20 == pytest.approx(float(whole[name][row["episode"]]))
    write_lines(records, [header, {**rows[0], "clean right": "012"}])
    with pytest.raises(UserError, match="'clean right' is '012'"):
        run(records)


OOD = [Ood(["other"])]


def test_outside_images_are_the_same_for_every_model_and_resume(tmp_path):
    from vismt.uncertainty.probability_metrics import detection_auroc

    other = Outside()
    net, records = ProtoNet(Backbone()).eval(), tmp_path / "fake.jsonl"
    sampler, pixels = EpisodeSampler(LABELS, ways=4, shots=2, queries=5, seed=1), Pixels()
    whole = run(records, net=net, probabilities=True, temperature=2.0, asked=OOD, outside={"other": other}, batch=7)
    quality = [f"{form} {name}" for form in ("clean", "tempered") for name in ("gaps", "nll", "brier")]
    assert list(whole) == ["clean", "dark", "against other AUROC", *quality]
    drawn = other.read
    assert [len(rows) for rows in drawn] == [20] * 6 and len({tuple(rows.tolist()) for rows in drawn}) == 6
    for i, rows in enumerate(drawn):
        e = sampler[i]
        assert len(set(rows.tolist())) == 20
        with torch.no_grad():
            support = pixels[e.support], e.support_labels
            inside, outside = (net(*support, x) for x in (pixels[e.query], other.images[rows]))
        confidence = [logits.softmax(1).amax(1) for logits in (inside, outside)]
        assert float(whole["against other AUROC"][i]) == pytest.approx(detection_auroc(-confidence[0], -confidence[1]))
        wanted = nn.functional.cross_entropy(inside / 2, e.query_labels)
        assert float(whole["tempered nll"][i]) == pytest.approx(float(wanted), abs=1e-5)
    # Another model and other shots of the same set draw the same, an interrupted file is continued, another set is refused.
    again, five = Outside(), EpisodeSampler(LABELS, ways=4, shots=5, queries=5, seed=1)
    run(net=ProtoNet(Backbone(), scale=3.0), sampler=five, asked=OOD, outside={"other": again})
    assert all(torch.equal(a, b) for a, b in zip(again.read, drawn))
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join(lines[:3]) + lines[3][:9])
    options = {"probabilities": True, "temperature": 2.0, "batch": 7}
    resumed = run(records, asked=OOD, outside={"other": Outside()}, **options)
    assert records.read_text() == "".join(lines) and all(torch.equal(whole[name], resumed[name]) for name in whole)
    for changes, key in (
        ({"outside": {"it": other}}, "outside"),
        ({"outside": None, "asked": ()}, "outside, features"),
    ):
        with pytest.raises(UserError, match=rf"\(different: {key}\)"):
            run(records, **{"asked": OOD, **options, **changes})


def test_episodes_of_different_parts_share_no_outside_image_and_no_group_of_them():
    other, grouped = Outside(), Outside()
    grouped.group_of = torch.arange(120) // 4
    sampler = EpisodeSampler(LABELS, ways=4, shots=1, queries=3, seed=1, parts=5)
    assert sampler.parts == 5
    for images, unit in ((other, torch.arange(120)), (grouped, grouped.group_of)):
        run(net=ProtoNet(Backbone()), sampler=sampler, episodes=20, attacks=[], asked=OOD, outside={"other": images})
        seen = [set(unit[torch.cat(images.read[part::5])].tolist()) for part in range(5)]
        assert len(images.read) == 20 and all(len(rows) == 12 for rows in images.read)
        assert sum(map(len, seen)) == len(set().union(*seen)) > 5
    with pytest.raises(UserError, match="4 images in 'other', for episodes in 5 parts"):
        run(net=ProtoNet(Backbone()), sampler=sampler, attacks=[], asked=OOD, outside={"other": Outside(4)})


def test_features_of_outside_images_are_stored(monkeypatch):
    sampler = EpisodeSampler(LABELS, ways=4, shots=2, queries=5, seed=1)
    net, plain = ProtoNet(Plain()), ProtoNet(Backbone())
    counts, compute = [], features._computed

    def counting(backbone, images, batch):
        counts.append(len(images))
        return compute(backbone, images, batch)

    monkeypatch.setattr(features, "_computed", counting)
    stored = run(net=net, sampler=sampler, attacks=[], episodes=40, asked=OOD, outside={"other": Outside()})
    passed = sum(counts)
    computed = run(
        net=plain, sampler=sampler, attacks=[], episodes=40, asked=OOD, outside={"other": Outside()}, features="off"
    )
    assert all(torch.equal(stored[name], computed[name]) for name in stored)
    # 40 episodes of 8 + 20 + 20 images; two sets of 120, and a few for the check of the first batch.
    assert plain.backbone.count == 40 * 48 and passed < 300


def test_a_small_outside_set_is_drawn_whole():
    small = Outside(9)
    run(asked=OOD, outside={"other": small}, attacks=[])
    assert all(sorted(rows.tolist()) == list(range(9)) for rows in small.read)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"fingerprint": "w2"}, "weights"),
        ({"data": "other"}, "data"),
        ({"attacks": [Darken(0.5)]}, "attacks"),
        ({"attacks": []}, "conditions, attacks"),
        ({"sampler": EpisodeSampler(LABELS, ways=4, shots=2, queries=5, seed=2)}, "sampler"),
    ],
)
def test_another_protocol_is_refused_and_nothing_lost(tmp_path, changes, key):
    records = tmp_path / "fake.jsonl"
    run(records)
    before = records.read_text()
    with pytest.raises(UserError, match=rf"of another run \(different: {key}\)"):
        run(records, **changes)
    assert records.read_text() == before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda header, rows: rows[0].pop("clean"), "line 2: 'clean' is missing"),
        (lambda header, rows: rows[1].update({"clean": 123.0}), "line 3: 'clean' is 123.0, which it cannot be"),
        (lambda header, rows: rows[1].update({"dark": -0.1}), "line 3: 'dark' is -0.1"),
        (lambda header, rows: rows[1].update({"dark": True}), "line 3: 'dark' is True"),
        (lambda header, rows: rows[1].update({"dark": float("nan")}), "line 3: 'dark' is nan"),
        (lambda header, rows: rows[1].update({"mixture": [0.5, "a"]}), "line 3: 'mixture' is"),
        (lambda header, rows: rows[2].update({"other": 0.5}), "line 4: 'other' is not a field"),
        (lambda header, rows: rows[2].update({"episode": 0}), "line 4: episode 0 comes twice"),
        (lambda header, rows: rows[2].update({"episode": 2.0}), "line 4: episode is 2.0"),
        (lambda header, rows: header.update({"settings": 1}), "of another run"),
        (lambda header, rows: header.pop("examples"), "different: header"),
    ],
)
def test_rows_that_no_evaluation_writes_are_named(tmp_path, damage, message):
    records = tmp_path / "fake.jsonl"
    run(records)
    header, *rows = read_lines(records)
    damage(header, rows)
    write_lines(records, [header, *rows])
    with pytest.raises(UserError, match=message) as error:
        run(records)
    assert str(records) in str(error.value)


def test_a_line_changed_by_hand_is_named(tmp_path):
    records = tmp_path / "fake.jsonl"
    run(records)
    lines = records.read_text().splitlines(keepends=True)
    records.write_text("".join([*lines[:2], lines[2].replace('"dark": 0', '"dark": 1'), *lines[3:]]))
    with pytest.raises(UserError, match=f"'{records}' line 3 was changed"):
        run(records)


def test_unwritable_records(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        run(tmp_path / "file" / "fake.jsonl")


def test_full_disk_keeps_earlier_episodes(tmp_path, monkeypatch):
    path = tmp_path / "fake.jsonl"
    real, calls = Path.open, []

    def fails_at_third(self, mode="r", *options, **named):
        if mode == "ab" and self == path:
            calls.append(self)
            if len(calls) == 3:
                raise OSError(28, "No space left on device")
        return real(self, mode, *options, **named)

    monkeypatch.setattr(Path, "open", fails_at_third)
    with pytest.raises(UserError, match=f"cannot write '{path}': No space left on device"):
        run(path)
    monkeypatch.undo()
    assert len(path.read_text().splitlines()) == 3  # header and two episodes
    assert len(run(path)["clean"]) == 6


def test_panel_holds_one_episode(tmp_path):
    panel = tmp_path / "panels" / "fake.npz"
    sampler = EpisodeSampler(LABELS, ways=4, shots=2, queries=9, seed=1)
    run(panel=panel, sampler=sampler)
    with np.load(panel, allow_pickle=False) as stored:
        arrays = dict(stored)
    assert arrays["support"].shape == (8, 3, 4, 4) and arrays["support"].dtype == np.uint8
    assert arrays["query"].shape == (20, 3, 4, 4)  # 5 of 9 per class
    assert np.bincount(arrays["query_labels"]).tolist() == [5] * 4
    episode = sampler[0]
    assert arrays["classes"].tolist() == ["abcdef"[c] for c in episode.classes]
    assert str(arrays["condition"]) == "dark"
    first = Pixels()[episode.query[:1]]
    assert np.array_equal(arrays["query"][0], (first[0] * 255).round().numpy().astype(np.uint8))
    assert np.array_equal(arrays["adversarial"][0], (first[0] * 0.1 * 255).round().numpy().astype(np.uint8))
    assert arrays["predictions"].shape == arrays["adversarial_predictions"].shape == (20,)


def test_panel_is_made_up_for_on_resume(tmp_path):
    records, panel = tmp_path / "fake.jsonl", tmp_path / "fake.npz"
    run(records)
    run(records, panel=panel)
    assert panel.exists()
    clean = tmp_path / "clean.npz"
    run(panel=clean, attacks=[])
    assert "adversarial" not in np.load(clean)


def test_what_has_no_interval_or_no_name_is_refused():
    with pytest.raises(UserError, match="1 episodes have no confidence interval"):
        run(episodes=1)
    with pytest.raises(UserError, match="two conditions have the same text"):
        run(attacks=[Darken(), Darken(0.2)])


class Mixed(nn.Module):
    """A few-shot model with classifiers that have a mixture."""

    def __init__(self):
        super().__init__()
        self.net, self.count = ProtoNet(Backbone()), 0

    def classifier(self, support, labels):
        task = self.net.classifier(support, labels)
        self.count += 1
        task.register_buffer("mixture", torch.tensor([1 / 3, 2 / 3]) if self.count % 2 else torch.tensor([0.0, 1.0]))
        return task


def test_the_mixture_of_a_task_is_on_its_line_and_survives_a_resume(tmp_path):
    records = tmp_path / "fake.jsonl"
    run(records, net=Mixed(), episodes=3)
    rows = read_lines(records)[1:]
    assert [row["mixture"] for row in rows] == [[0.333333, 0.666667], [0.0, 1.0], [0.333333, 0.666667]]
    before = records.read_text()
    assert set(run(records, net=Mixed(), episodes=3)) == {"clean", "dark"} and records.read_text() == before
    plain = tmp_path / "plain.jsonl"
    run(plain)
    assert "mixture" not in plain.read_text()


class Prepared(Darken):
    """Darkens by the brightness of the support of `prepare`."""

    def __init__(self):
        super().__init__(name="prepared")
        self.prepared = []

    def prepare(self, support, labels):
        self.prepared.append((support, labels))
        return Darken(float(support.mean())).perturb

    def perturb(self, *arguments, **options):
        raise AssertionError("the result of prepare must perturb")


def test_an_attack_may_be_prepared_with_the_support_once_an_episode():
    attack, sampler = Prepared(), EpisodeSampler(LABELS, ways=4, shots=2, queries=5, seed=1)
    run(attacks=[attack], batch=7)
    assert len(attack.prepared) == 6
    for index, (support, labels) in enumerate(attack.prepared):
        assert torch.equal(support, Pixels()[sampler[index].support]) and torch.equal(
            labels, sampler[index].support_labels
        )


class Unpacked(PrototypeClassifier):
    """A kind of classifier that no attack packs, as that of MAML."""


class Tuned:
    """A model with weights of its own for each task, as after fine-tuning; `most` counts the tasks that are kept at a time."""

    def __init__(self, kind):
        self.kind, self.backbone, self.kept, self.most = kind, Plain().eval(), WeakSet(), 0

    def classifier(self, support, labels):
        net = WithWeights(self.backbone, {"weight": support.mean((0, 2, 3)).clone()})
        self.kept.add(net)
        self.most = max(self.most, len(self.kept))
        return self.kind(net, prototypes(net(support), labels), torch.tensor(5.0))


@pytest.mark.parametrize("kind", [PrototypeClassifier, Unpacked])
def test_weights_of_a_task_are_dropped_where_no_attack_packs_it(kind):
    attacks, net = [Darken(), Darken(0.5, name="dusk")], Tuned(kind)
    alone = run(net=net, episodes=9, attacks=attacks)
    for attack in attacks:
        attack.packs = True  # so that episodes are run in blocks
    block = run(net=net, episodes=9, attacks=attacks)
    assert net.most == 2 and all(torch.equal(block[name], alone[name]) for name in alone)


@pytest.mark.slow
def test_two_processes_write_the_records_of_one(tmp_path, monkeypatch):
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path / "cache"))
    from helpers.protocol_ranks import Pixels as Gratings
    from helpers.protocol_ranks import evaluate
    from helpers.ranks import of_two

    of_two("protocol_ranks.py", tmp_path)  # also compares the results of both ranks, and those of rank 0 alone
    evaluate(tmp_path / "one.jsonl", Gratings())
    evaluate(tmp_path / "one.jsonl", Gratings(), 19)
    assert (tmp_path / "shared.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()
    first, _ = torch.load(tmp_path / "reads.pt").tolist()
    assert first == 2 * 8 and (tmp_path / "panel.npz").exists()  # the first block of two, support and query


@dataclass
class Certifier:
    """Certifies the answer to the images themselves: radius 0.3 for even places, an abstention for odd ones."""

    sigma: float = 0.25
    largest: float = 0.5

    def certify(self, logits, images, keys):
        even = torch.tensor([place % 2 == 0 for _, place in keys])
        return torch.where(even, logits(images).argmax(1), -1), torch.where(even, 0.3, 0.0)


def test_certified_queries_are_recorded(tmp_path):
    sampler = EpisodeSampler(LABELS, ways=3, shots=2, queries=4, seed=0)
    options = {"episodes": 3, "records": tmp_path / "records.jsonl", "asked": [Certify(Certifier())]}
    found = run_protocol(ProtoNet(Plain()), Pixels(), sampler, **options)
    at = {radius: found[f"smoothed 0.25 certified l2 {radius:g} accuracy"] for radius in (0, 0.25, 0.5)}
    assert found["smoothed 0.25 abstentions"].tolist() == [0.5] * 3 and at[0.5].tolist() == [0.0] * 3
    assert torch.equal(at[0], at[0.25])
    for row, value in zip(read_lines(tmp_path / "records.jsonl")[1:], at[0.25].tolist()):
        assert value == pytest.approx(row["clean right"][::2].count("1") / 12)
    again = run_protocol(ProtoNet(Plain()), Pixels(), sampler, **options)
    assert all(torch.equal(again[name], found[name]) for name in found)
