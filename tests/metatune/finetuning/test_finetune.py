"""Test-time fine-tuning: which tensors change, the unchanged model, and independent tasks."""

import pytest
import torch
import torch.nn.functional as F
from helpers.tiny import images, shake, snapshot, tiny_vit
from torch import nn
from torch.func import functional_call

from vismt import adapt
from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError
from vismt.base.seeds import mix_seed
from vismt.metatune import EpisodeSampler, ProtoNet, cosine_logits, prototypes, run_protocol
from vismt.metatune.finetuning.diffaugment import diff_augment
from vismt.metatune.finetuning.finetune import FineTuned, FineTuneSettings, finetune
from vismt.metatune.functional import WithWeights
from vismt.metatune.protonet import PrototypeClassifier

LABELS = torch.arange(3).repeat(4)


def backbone(**options):
    # Weights as large as a trained model's: at timm's start attention has almost no effect.
    return shake(Backbone(tiny_vit(num_classes=0, **options)), 0.2)


def textures(labels, seed):
    """Draw waves of six kinds at a random phase and strength, recognisable after a change of colour or a shift."""
    generator = torch.Generator().manual_seed(seed)
    count = len(labels)
    wave = (torch.arange(16) * torch.pi / 2 + 2 * torch.pi * torch.rand(count, 1, generator=generator)).sin()
    rows, columns = wave[:, :, None].expand(count, 16, 16), wave[:, None, :].expand(count, 16, 16)
    kinds = [rows, columns, (rows + columns) / 2, rows * columns, 0 * rows, (rows - columns.roll(1, -1)) / 2]
    strength = 0.1 + 0.1 * torch.rand(count, 3, 1, 1, generator=generator)
    noise = 0.15 * torch.randn(count, 3, 16, 16, generator=generator)
    return (0.5 + strength * torch.stack(kinds, 1)[torch.arange(count), labels][:, None] + noise).clamp(0, 1)


def support(seed=1):
    return textures(LABELS, seed)


def settings(**changes):
    return FineTuneSettings(**{"lr": 1e-3, "steps": 6, **changes})


def tune(model, seed=1, weights=None, **changes):
    return finetune(model, support(seed), LABELS, settings(**changes), scale=10.0, weights=weights)


def loss(model, weights, batch):
    with torch.no_grad():
        net = WithWeights(model, weights)
        logits = cosine_logits(net(batch), prototypes(net(support()), LABELS))
        return float(F.cross_entropy(logits, LABELS.repeat(len(batch) // 12)))


def same(tensors, other):
    return set(tensors) == set(other) and all(torch.equal(tensors[name], other[name]) for name in tensors)


def augmented(model, count=20):
    seeds = (torch.Generator().manual_seed(900 + number) for number in range(count))
    return torch.cat([diff_augment(support(), seed, mean=model.mean, std=model.std) for seed in seeds])


@pytest.mark.parametrize(("parameters", "lr", "fall"), [("all", 1e-3, 0.05), ("attention_scale", 0.1, 0.02)])
def test_the_loss_of_augmentations_falls_and_the_model_is_untouched(parameters, lr, fall):
    model = backbone().train()
    before, views = snapshot(model), augmented(model)
    tuned = tune(model, parameters=parameters, lr=lr, steps=12)
    assert loss(model, tuned, views) < loss(model, {}, views) - fall
    assert same(snapshot(model), before) and all(part.training for part in model.modules())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(tensor.requires_grad for tensor in tuned.values())


def test_all_means_every_parameter_frozen_or_not_and_a_loop_by_hand_agrees():
    model = backbone()
    for parameter in model.vit.blocks.parameters():
        parameter.requires_grad_(False)
    tuned = tune(model, seed=2)
    assert set(tuned) == set(dict(model.named_parameters()))
    # A deep copy trained as a module, with the optimiser and the draws written out.
    other = backbone()
    optimiser = torch.optim.Adam(other.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(mix_seed(0, "fine-tuning"))
    for _ in range(6):
        views = diff_augment(support(2), generator, probability=0.9, mean=other.mean, std=other.std)
        centres = prototypes(other(support(2)), LABELS)
        optimiser.zero_grad()
        F.cross_entropy(cosine_logits(other(views), centres, 10.0), LABELS).backward()
        optimiser.step()
    for name, parameter in other.named_parameters():
        assert torch.allclose(tuned[name], parameter, atol=1e-6), name


def test_tasks_in_either_order_and_twice_give_the_same():
    model = backbone()
    first, second = tune(model, seed=1), tune(model, seed=2)
    again_second, again_first = tune(model, seed=2), tune(model, seed=1)
    assert same(first, again_first) and same(second, again_second) and not same(first, second)


def test_no_random_state_outside_is_read_or_changed():
    model, state = backbone(), torch.get_rng_state()
    first = tune(model)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert same(tune(model), first)


def test_dropout_is_off_meanwhile_and_modes_come_back():
    model = backbone(proj_drop_rate=0.5).train()
    model.vit.norm.eval()
    assert same(tune(model), tune(model)) and model.vit.blocks[0].training and not model.vit.norm.training
    with pytest.raises(UserError, match="no support image of class 1"):
        finetune(model, support(), LABELS * 2, settings(), scale=10.0)
    assert model.vit.blocks[0].training


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients(mode):
    model, zeros = backbone(), {"vit.norm.bias": torch.zeros(32)}
    plain = tune(model, weights=zeros)
    with mode():
        batch, weights = support(), {"vit.norm.bias": torch.zeros(32)}  # all created in inference mode
        tuned = finetune(model, batch, LABELS.clone(), settings(), scale=torch.tensor(10.0), weights=weights)
        assert not torch.is_grad_enabled()
        net = FineTuned(ProtoNet(model), settings())
        assert net.classifier(batch, LABELS)(batch).shape == (12, 3)
    assert same(tuned, plain) and not any(tensor.is_inference() for tensor in tuned.values())


def test_autocast_does_not_go_on_with_the_weights_of_the_first_step():
    model = backbone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tuned = tune(model, steps=12)
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        assert same(tuned, tune(model, steps=12))


def test_half_precision_weights_are_tuned_in_float32():
    model = backbone().to(torch.bfloat16)
    # Numbers above 1/4 are 2e-3 apart in bf16: a step of 2e-4 alone is lost, twelve are not.
    tuned, before = tune(model, lr=2e-4, steps=12), {name: p.detach() for name, p in model.named_parameters()}
    large = torch.cat([(tuned[name] != p)[p.abs() > 0.25] for name, p in before.items()])
    assert len(large) > 1000 and large.float().mean() > 0.3
    assert all(tensor.dtype == torch.bfloat16 for tensor in tuned.values())
    assert same(tune(model, lr=0.0), before)


def test_lr_zero_and_no_steps_leave_everything_as_it_is():
    model = backbone()
    assert same(tune(model, lr=0.0), {name: p.detach() for name, p in model.named_parameters()})
    plain = ProtoNet(model).classifier(support(), LABELS)(images())
    for still in ({"lr": 0.0}, {"steps": 0}, {"lr": 0.0, "parameters": "attention_scale"}):
        classifier = FineTuned(ProtoNet(model), settings(**still)).classifier(support(), LABELS)
        assert torch.equal(classifier(images()), plain)


def test_tuning_starts_from_given_weights_and_hands_back_the_rest():
    model = backbone()
    start = {"vit.norm.weight": torch.full((32,), 0.5), "mean": torch.full((1, 3, 1, 1), 0.4)}
    tuned = tune(model, weights=start)
    assert torch.equal(tuned["mean"], start["mean"]) and (tuned["vit.norm.weight"] - 0.5).abs().max() < 0.02
    assert set(tuned) == set(dict(model.named_parameters())) | {"mean"} and start["vit.norm.weight"].eq(0.5).all()
    scaled = tune(model, weights=start, parameters="attention_scale")
    assert scaled["vit.norm.weight"].eq(0.5).all() and "vit.blocks.0.attn.qkv.weight" in scaled


# ---- attention scaling


def test_attention_scale_moves_the_rows_of_q_alone_by_one_factor_a_head():
    model = backbone()
    before, tuned = dict(model.named_parameters()), tune(model, parameters="attention_scale", lr=0.05)
    assert set(tuned) == {f"vit.blocks.{k}.attn.qkv.{part}" for k in (0, 1) for part in ("weight", "bias")}
    for k in (0, 1):
        weight, bias = (tuned[f"vit.blocks.{k}.attn.qkv.{part}"] for part in ("weight", "bias"))
        old_weight, old_bias = (before[f"vit.blocks.{k}.attn.qkv.{part}"].detach() for part in ("weight", "bias"))
        assert torch.equal(weight[32:], old_weight[32:]) and torch.equal(bias[32:], old_bias[32:])
        factors = (weight / old_weight)[:32].view(4, 8 * 32)
        assert torch.allclose(factors, factors[:, :1].expand_as(factors), rtol=1e-4)
        assert torch.allclose((bias / old_bias)[:32].view(4, 8), factors[:, :1].expand(4, 8), rtol=1e-4)
        assert len({round(float(f), 4) for f in factors[:, 0]}) > 1 and (factors - 1).abs().min() > 1e-4


def test_scaled_rows_of_q_are_scaled_attention_logits():
    model = backbone()
    tuned = tune(model, parameters="attention_scale", lr=0.2)
    name = "vit.blocks.0.attn.qkv.weight"
    factors = (tuned[name] / dict(model.named_parameters())[name]).detach()[:32].view(4, -1).median(1).values
    attention, tokens = model.vit.blocks[0].attn, torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(4))
    heads = {key[len("vit.blocks.0.attn.") :]: value for key, value in tuned.items() if ".0.attn." in key}
    output = functional_call(attention, heads, (tokens,))
    q, k, v = attention.qkv(tokens).view(2, 17, 3, 4, 8).permute(2, 0, 3, 1, 4)
    logits = factors.view(1, 4, 1, 1) * (q @ k.transpose(-2, -1)) / 8**0.5
    byhand = attention.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(2, 17, 32))
    assert torch.allclose(output, byhand, atol=1e-5) and not torch.allclose(output, attention(tokens), atol=1e-3)


def test_attention_scale_reaches_a_low_rank_update_too():
    model = backbone()
    adapt(model.vit, "pissa", targets=["attn.qkv"], rank=2)
    tuned = tune(model, parameters="attention_scale", lr=0.2)
    layer = model.vit.blocks[1].attn.qkv
    scaled = {key.rsplit(".", 1)[1]: value for key, value in tuned.items() if "blocks.1.attn.qkv" in key}
    factors = (scaled["weight"] / layer.weight).detach()[:32].view(4, -1).median(1).values.repeat_interleave(8)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(4))
    assert torch.allclose(
        functional_call(layer, scaled, (x,)), layer(x) * torch.cat([factors, torch.ones(64)]), atol=1e-5
    )


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda attention: delattr(attention, "qkv"),
            "'vit.blocks.0.attn' .Attention.: it has no fused qkv projection",
        ),
        (lambda attention: setattr(attention, "qkv", nn.Sequential(attention.qkv)), "its qkv is Sequential"),
        (lambda attention: setattr(attention, "q_norm", nn.LayerNorm(8)), "it normalises q"),
        (lambda attention: setattr(attention, "q_bias", nn.Parameter(torch.zeros(32))), "its bias of q"),
        (lambda attention: setattr(attention, "num_heads", 5), "96 rows for 5 heads"),
    ],
)
def test_attention_that_cannot_be_scaled_is_refused(break_it, message):
    model = backbone()
    break_it(model.vit.blocks[0].attn)
    with pytest.raises(UserError, match=message):
        tune(model, parameters="attention_scale")


def test_backbones_without_attention_or_parameters_are_refused():
    class Flat(nn.Module):
        def forward(self, batch):
            return batch.flatten(1)

    with pytest.raises(UserError, match="Flat has no attention"):
        tune(Flat(), parameters="attention_scale")
    with pytest.raises(UserError, match="Flat has no parameter"):
        tune(Flat())


# ---- the task


class Merged:
    """A pool's stand-in: its classifier's backbone is a WithWeights with one merged tensor."""

    def __init__(self, model, weights):
        self.model, self.weights = model, weights

    def classifier(self, batch, labels):
        net = WithWeights(self.model, self.weights)
        with torch.no_grad():
            task = PrototypeClassifier(net, prototypes(net(batch), labels), torch.tensor(7.0)).eval()
        task.register_buffer("mixture", torch.tensor([0.25, 0.75]))
        return task


def test_a_merged_backbone_is_tuned_from_its_own_weights():
    model = backbone()
    start = {"vit.norm.weight": torch.full((32,), 0.5)}
    before = snapshot(model)
    classifier = FineTuned(Merged(model, start), settings()).classifier(support(), LABELS)
    weights = finetune(model, support(), LABELS, settings(), scale=7.0, weights=start)
    assert same(classifier.backbone.weights, weights) and classifier.scale == 7 and not classifier.training
    assert classifier.mixture.tolist() == [0.25, 0.75]
    with torch.no_grad():
        net = WithWeights(model, weights)
        byhand = cosine_logits(net(images()), prototypes(net(support()), LABELS), 7.0)
    assert torch.allclose(classifier(images()), byhand, atol=1e-5)
    assert same(snapshot(model), before) and start["vit.norm.weight"].eq(0.5).all()
    batch = images().requires_grad_()
    classifier(batch).sum().backward()
    assert batch.grad.abs().sum() > 0  # what an attack needs


@pytest.mark.slow
def test_it_scores_in_the_protocol_and_helps():
    labels = torch.arange(6).repeat_interleave(16)
    pixels, model = textures(labels, 5), backbone().train()
    net, before = ProtoNet(model), snapshot(model)
    sampler = EpisodeSampler(labels, ways=3, shots=8, queries=8, seed=1)
    plain, still, tuned, again = (
        run_protocol(task, pixels, sampler, episodes=3)["clean"]
        for task in (net, FineTuned(net, settings(lr=0.0)), *(FineTuned(net, settings(steps=60)) for _ in range(2)))
    )
    assert torch.equal(tuned, again) and torch.equal(still, plain)
    assert tuned.mean() > plain.mean() + 0.1
    assert same(snapshot(model), before) and model.training


def test_a_classifier_without_prototypes_is_refused():
    class Other:
        def classifier(self, batch, labels):
            return nn.Flatten()

    with pytest.raises(UserError, match="classifier is Flatten"):
        FineTuned(Other(), settings()).classifier(support(), LABELS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "finetune.lr is -1.0; it lies from 0 to 1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": 1e38}, r"lr is 1e\+38"),
        ({"steps": -1}, "steps is -1"),
        ({"parameters": "attn_scale"}, "'attn_scale' is not known. Near: 'attention_scale'"),
    ],
)
def test_settings_that_are_none(change, message):
    with pytest.raises(UserError, match=message):
        settings(**change)


def test_weights_that_do_not_fit_and_a_loss_that_is_not_finite():
    model = backbone()
    with pytest.raises(UserError, match=r"'vit.norm.wieght' is not a tensor of Backbone. Near: 'vit.norm.weight'"):
        tune(model, weights={"vit.norm.wieght": torch.ones(32)})
    with pytest.raises(UserError, match=r"'vit.norm.weight' is \(31,\), Backbone has \(32,\)"):
        WithWeights(model, {"vit.norm.weight": torch.ones(31)})
    with pytest.raises(
        UserError, match=r"the loss is nan in step 1 at lr 0.001: lower lr, or check for images or weights"
    ):
        tune(model, weights={"vit.norm.weight": torch.full((32,), torch.nan)})


def test_functional_holds_weights_apart_from_the_module():
    model = backbone()
    weights = {"vit.norm.bias": torch.full((32,), 3.0, requires_grad=True)}
    net = WithWeights(model, weights)
    moved = backbone()
    with torch.no_grad():
        moved.vit.norm.bias.fill_(3.0)
    assert torch.equal(net(images()), moved(images())) and not torch.equal(net(images()), model(images()))
    assert not net.weights["vit.norm.bias"].requires_grad
    assert set(net.state_dict()) == {f"module.{name}" for name in model.state_dict()}
    assert [id(p) for p in net.parameters()] == [id(p) for p in model.parameters()]
    assert not WithWeights(model.eval(), weights).training and WithWeights(model.train(), weights).training
