"""The rate of fine-tuning chosen on a support set: folds, ties, single images, divergence, and the same through finetune."""

import importlib

import pytest
import torch
from helpers.amt_parts import backbone, drawn, same
from helpers.tiny import snapshot
from torch import nn

from vismt.base.errors import UserError
from vismt.config.typed import build
from vismt.jobs.fewshot.config import FewShotConfig
from vismt.metatune import FineTuned, FineTuneSettings, ProtoNet
from vismt.metatune.finetuning.finetune import RATES, VIEWS, LossNotFinite, choose_rate, finetune, held_out

FINETUNE = importlib.import_module("vismt.metatune.finetuning.finetune")  # the package exports a function of this name
LABELS = torch.tensor([1, 0, 0, 1, 2, 0, 1])  # 3, 3 and 1 images


def flat(labels, noise=0.0):
    """Images of one colour each, which tells the class."""
    colours = torch.eye(3)[labels].view(-1, 3, 1, 1).expand(-1, 3, 16, 16)
    return (0.2 + 0.6 * colours + noise * torch.randn(colours.shape, generator=torch.Generator().manual_seed(0))).clamp(
        0, 1
    )


def colours(images):
    return images.mean((2, 3))


def tuner(right, calls=None):
    """A tuning whose features are right at some rates and always the same at the others."""

    def tune(images, labels, rate):
        if calls is not None:
            calls.append((rate, labels.tolist(), len(images)))
        return colours if rate in right else lambda batch: torch.ones(len(batch), 3)

    return tune


def test_each_image_of_a_larger_class_is_held_out_once_and_single_images_never():
    folds = held_out(LABELS)
    assert len(folds) == 2 and (folds[0].int() + folds[1].int()).tolist() == [1, 1, 1, 1, 0, 1, 1]
    for mask in folds:
        assert set(LABELS[~mask].tolist()) == {0, 1, 2}  # a class without an image has no prototype
    (alone,) = held_out(torch.arange(3))
    assert not alone.any()


def test_the_best_rate_wins_and_the_smallest_of_a_tie():
    images = flat(LABELS)
    assert choose_rate(tuner({1e-3}), images, LABELS) == 1e-3
    assert choose_rate(tuner({1e-2, 1e-4}), images, LABELS) == 1e-4
    assert choose_rate(tuner(set(RATES)), images, LABELS) == 0 == choose_rate(tuner(()), images, LABELS)


def test_tuning_never_sees_what_it_is_judged_on():
    images, judged = flat(LABELS, 0.1), []

    def tune(kept, labels, rate):
        def features(batch):
            if len(batch) != len(kept):
                judged.append((rate, kept, batch))
            return colours(batch)

        return features

    choose_rate(tune, images, LABELS)
    assert [rate for rate, _, _ in judged] == [rate for rate in RATES for _ in range(2)]
    for _, kept, batch in judged:
        assert not (batch[:, None] == kept[None]).flatten(2).all(2).any()
    # Six images are held out once, and the single image of class 2 is judged by crops in both folds.
    assert sum(len(batch) for rate, _, batch in judged if rate == 0) == 6 + 2 * VIEWS
    assert all(torch.equal(first[2], second[2]) for first, second in zip(judged[:2], judged[2:4]))


def test_one_shot_judges_crops_of_the_images_it_tunes_on():
    labels, calls = torch.arange(3), []
    assert choose_rate(tuner({1e-2}, calls), flat(labels, 0.1), labels) == 1e-2
    assert calls == [(rate, [0, 1, 2], 3) for rate in RATES]


def test_a_rate_that_diverges_is_not_chosen():
    def tune(images, labels, rate):
        if rate == 1e-2:
            raise LossNotFinite("fine-tuning: the loss is nan")
        return colours if rate == 1e-4 else lambda batch: torch.ones(len(batch), 3)

    assert choose_rate(tune, flat(LABELS), LABELS) == 1e-4


def settings(**changes):
    return FineTuneSettings(**{"lr": "auto", "steps": 4, **changes})


def test_finetune_runs_at_the_chosen_rate_and_leaves_the_model_alone(monkeypatch):
    model, support = backbone().train(), drawn(LABELS, 1)
    before, chosen = snapshot(model), []
    monkeypatch.setattr(FINETUNE, "choose_rate", lambda *a, **k: chosen.append(choose_rate(*a, **k)) or 1e-3)
    auto = finetune(model, support, LABELS, settings(), scale=10.0)
    assert len(chosen) == 1 and chosen[0] in RATES
    assert same(auto, finetune(model, support, LABELS, settings(lr=1e-3), scale=10.0))
    assert same(snapshot(model), before) and all(part.training for part in model.modules())


def test_rates_are_tried_from_given_weights_and_without_dropout(monkeypatch):
    monkeypatch.setattr(FINETUNE, "RATES", (0.0,))
    model = backbone().train()
    model.vit.norm.register_forward_hook(lambda module, *_: modes.append(module.training))
    modes, starts = [], []
    monkeypatch.setattr(FINETUNE, "WithWeights", lambda module, weights: starts.append(weights) or nn.Flatten())
    finetune(model, drawn(LABELS, 1), LABELS, settings(), scale=10.0, weights={"vit.norm.bias": torch.ones(32)})
    assert len(starts) == 2 and all(start["vit.norm.bias"].eq(1).all() for start in starts) and not any(modes)


@pytest.mark.slow
def test_every_task_gets_its_own_rate():
    """A model without use for tuning keeps its weights; one that confuses the classes is tuned."""
    labels = torch.arange(3).repeat(6)
    easy, hard = flat(labels), drawn(labels, 1)
    net = FineTuned(ProtoNet(backbone()), settings(steps=30))
    plain = ProtoNet(backbone())
    assert torch.equal(net.classifier(easy, labels)(easy), plain.classifier(easy, labels)(easy))
    truth = torch.arange(3).repeat(30)
    query = drawn(truth, 2)
    tuned, frozen = (model.classifier(hard, labels)(query) for model in (net, plain))
    assert not torch.equal(tuned, frozen)
    assert (tuned.argmax(1) == truth).float().mean() >= (frozen.argmax(1) == truth).float().mean()
    with torch.inference_mode():
        assert torch.allclose(net.classifier(hard, labels)(query), tuned, atol=1e-5)


def test_lr_is_a_number_or_auto():
    assert build(FewShotConfig, {"finetune": {"lr": "auto"}}, "a").finetune.lr == "auto"
    assert build(FewShotConfig, {"finetune": {"lr": "1e-4"}}, "a").finetune.lr == 1e-4
    with pytest.raises(UserError, match=r"finetune.lr: expected float or 'auto', got 'fast'"):
        build(FewShotConfig, {"finetune": {"lr": "fast"}}, "a")
    with pytest.raises(UserError, match=r"finetune.lr: 'fast'; it must be a number from 0 to 1, or auto"):
        FineTuneSettings(lr="fast")
