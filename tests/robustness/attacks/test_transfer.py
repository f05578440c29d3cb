"""Attacks on another model: the images depend on the source alone, with its classifier of the same episode."""

import pytest
import torch
from helpers.attack_parts import Channels, Colours
from torch import nn

from vismt.base.errors import UserError
from vismt.metatune import EpisodeSampler, ProtoNet, run_protocol
from vismt.robustness.attacks.attacks import AttackSpec
from vismt.robustness.conditions import Transfer, TransferSource

SPEC = AttackSpec(epsilon=64 / 255, step_size=16 / 255, steps=6)


class Counted:
    """A few-shot model that keeps the supports of its classifiers."""

    def __init__(self, net):
        self.net, self.supports = net, []

    def classifier(self, support, labels):
        self.supports.append((support, labels))
        return self.net.classifier(support, labels)


def run(net, attacks, **options):
    sampler = EpisodeSampler(Colours.labels, ways=5, shots=2, queries=5, seed=1)
    return run_protocol(net, Colours(0.05, 6), sampler, episodes=4, attacks=attacks, **options)


def test_from_itself_is_the_white_box_attack():
    net = ProtoNet(Channels())
    accuracies = run(net, [SPEC, Transfer(SPEC, TransferSource("frozen", net, "a"))])
    white, transferred = accuracies[str(SPEC)], accuracies[f"{SPEC} from frozen"]
    assert torch.equal(white, transferred) and white.mean() < accuracies["clean"].mean() - 0.2


def test_the_source_decides_the_images_not_the_evaluated_model():
    evaluated = ProtoNet(Channels())
    blind = TransferSource("blind", ProtoNet(Channels([0.0, 0.0, 0.0])), "b")
    start = AttackSpec(epsilon=64 / 255, step_size=16 / 255, steps=6, random_start=False)
    with pytest.raises(UserError, match="gradients of zero on every image"):
        run(evaluated, [Transfer(start, blind)])
    other = TransferSource("other", ProtoNet(Channels([1.0, 0.4, 1.5])), "c")
    accuracies = run(evaluated, [start, Transfer(start, other)])
    white, some = (accuracies[name].mean() for name in list(accuracies)[1:])
    # With another model's gradient less changes than with the model's.
    assert white <= some < accuracies["clean"].mean()


def test_one_classifier_an_episode_from_its_own_support():
    net = ProtoNet(Channels())
    task = Counted(net)
    source = TransferSource("frozen", task, "a")
    weak = AttackSpec(epsilon=2 / 255, steps=2)
    run(net, [Transfer(SPEC, source), Transfer(weak, source)], batch=7)
    assert len(task.supports) == 4  # two attacks, four pieces, four episodes
    sampler, pixels = EpisodeSampler(Colours.labels, ways=5, shots=2, queries=5, seed=1), Colours(0.05, 6)
    for index, (support, labels) in enumerate(task.supports):
        assert torch.equal(support, pixels[sampler[index].support]) and torch.equal(
            labels, sampler[index].support_labels
        )


def test_the_source_is_built_in_eval_mode_and_once_for_each_support():
    torch.manual_seed(0)
    net = ProtoNet(nn.Sequential(Channels(), nn.Dropout(0.5))).train()
    task = Counted(net)
    source = TransferSource("frozen", task, "a")
    images, labels = Colours(0.05, 6).images, Colours.labels
    assert source.classifier(images, labels) is source.classifier(images.clone(), labels) and len(task.supports) == 1
    found = TransferSource("frozen", net, "a").classifier(images, labels).prototypes
    assert net.training and all(module.training for module in net.modules())
    assert torch.equal(found, net.eval().classifier(images, labels).prototypes)


def test_records_of_another_source_or_of_other_weights_are_not_continued(tmp_path):
    net = ProtoNet(Channels())
    records = tmp_path / "a.jsonl"
    run(net, [Transfer(SPEC, TransferSource("frozen", net, "a"))], records=records)
    assert '"source": "frozen"' in records.read_text() and '"source_fingerprint": "a"' in records.read_text()
    with pytest.raises(UserError, match=r"different: attacks\)"):
        run(net, [Transfer(SPEC, TransferSource("frozen", net, "b"))], records=records)
    with pytest.raises(UserError, match=r"different: conditions, attacks\)"):
        run(net, [Transfer(SPEC, TransferSource("clean", net, "a"))], records=records)


def test_the_text_names_source_and_few_ways():
    auto = Transfer(AttackSpec("autoattack", epsilon=4 / 255), TransferSource("merged+finetune", None, ""))
    assert auto.describe(3) == "AutoAttack (APGD-CE x5+FAB-T+Square) linf 4/255 from merged+finetune"
    assert auto.describe(5) == "AutoAttack linf 4/255 from merged+finetune" and auto.worst_case and auto.seed == 0
