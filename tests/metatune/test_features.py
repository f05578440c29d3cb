"""Features that are computed once: equal to those of every episode bit for bit, on disk only where they stay true."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.amt_parts import backbone, drawn, saved
from timm.layers import Mlp
from torch import Tensor, nn

from vismt.backbones.vit import Backbone
from vismt.base.errors import UserError
from vismt.base.identity import Identity
from vismt.metatune import EpisodeSampler, LogisticProbe, MergeSettings, PoolNet, ProtoNet, RidgeProbe, run_protocol
from vismt.metatune import features as module
from vismt.metatune.amt.pool import ExpertPool
from vismt.metatune.features import FeatureStore, features, number
from vismt.metatune.finetuning.finetune import FineTuned, FineTuneSettings
from vismt.robustness.attacks.attacks import AttackSpec
from vismt.storage import stored_tensors as files

LABELS = torch.arange(6).repeat_interleave(8)
IMAGES = drawn(LABELS, 3)


class Pixels:
    """Images with a key, as `vismt.data.pixels.Pixels` has one."""

    def __init__(self, key: str | None = "gratings"):
        self.key = key

    def __getitem__(self, index: Tensor) -> Tensor:
        return IMAGES[index]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("VISMT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """Number of images in every forward pass of a backbone."""
    counts: list[int] = []
    compute = module._computed

    def counting(backbone, images, batch):
        counts.append(len(images))
        return compute(backbone, images, batch)

    monkeypatch.setattr(module, "_computed", counting)  # a counter inside the backbone would change it
    return counts


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> ExpertPool:
    return ExpertPool(backbone(), saved(tmp_path_factory.mktemp("experts"), (3, 4, 5))).requires_grad_(False).eval()


def run(
    net: nn.Module, mode: str = "auto", records: Path | None = None, shots: int = 2, **options
) -> dict[str, Tensor]:
    sampler = EpisodeSampler(LABELS, ways=3, shots=shots, queries=4, seed=1)
    pixels = options.pop("pixels", None) or Pixels()
    episodes = options.pop("episodes", 3)
    return run_protocol(net, pixels, sampler, episodes=episodes, records=records, features=mode, **options)


def frozen() -> ProtoNet:
    return ProtoNet(backbone().requires_grad_(False)).requires_grad_(False).eval()


MODELS: dict[str, Callable[[ExpertPool], nn.Module]] = {
    "frozen": lambda pool: frozen(),
    "ridge": lambda pool: RidgeProbe(frozen()),
    "logistic of a pool": lambda pool: LogisticProbe(PoolNet(pool, MergeSettings("average"))),
    "tuned": lambda pool: FineTuned(frozen(), FineTuneSettings(steps=2)),
    "trimmed average": lambda pool: PoolNet(pool, MergeSettings("average", trim={r".*mlp.fc1": 0.5})),
    "expert": lambda pool: PoolNet(pool, MergeSettings("expert", expert=pool.labels[1])),
    **{
        name: lambda pool, name=name: PoolNet(pool, MergeSettings(name))
        for name in ("paper", "tsv", "logits", "min_ce")
    },
}


@pytest.mark.parametrize("name,shots", [*((name, 2) for name in MODELS), ("ridge", 1), ("tuned", 1)])
def test_records_are_those_of_every_episode(name, shots, pool, cache, tmp_path):
    paths = {mode: tmp_path / f"{mode}.jsonl" for mode in ("off", "auto", "again")}
    logits = {}
    for mode, path in paths.items():
        seen: list[Tensor] = []
        net = MODELS[name](pool)
        plain = net.classifier

        def watched(support, labels, plain=plain, seen=seen):
            task = plain(support, labels)
            task.register_forward_hook(lambda module, inputs, output: seen.append(output))
            return task

        net.classifier = watched
        run(net, "off" if mode == "off" else "auto", path, shots)
        logits[mode] = seen
    assert paths["auto"].read_text() == paths["off"].read_text() == paths["again"].read_text()
    assert len(logits["off"]) == len(logits["again"]) == 3
    assert all(map(torch.equal, logits["auto"], logits["off"])) and all(
        map(torch.equal, logits["again"], logits["off"])
    )


def test_each_image_is_computed_once_and_never_by_the_next_run(cache, computed):
    run(frozen(), "off", episodes=12)
    each = 12 * 3 * (2 + 4)
    assert sum(computed) == each
    computed.clear()
    run(frozen(), episodes=12)
    probe = 3 * 2 // 2 + 1  # half of the first support, compared in another batch
    assert sum(computed) <= len(LABELS) + probe + computed.count(2)  # an image that is missing alone is doubled
    computed.clear()
    run(frozen(), episodes=12)
    assert computed == []


@pytest.mark.parametrize("name, models", [("ridge", 1), ("expert", 1), ("paper", 3)])
def test_the_identity_of_a_model_is_computed_once_for_an_evaluation(name, models, pool, cache, monkeypatch):
    """It takes longer than a forward pass of a small model."""
    made = []
    monkeypatch.setattr(
        module, "Identity", lambda *values, **options: made.append(Identity(*values, **options)) or made[-1]
    )
    run(MODELS[name](pool), episodes=12)
    assert len(made) == models


def test_attacks_are_those_on_the_images(cache, tmp_path):
    spec = AttackSpec("pgd", 8 / 255, steps=3)
    paths = [tmp_path / mode for mode in ("auto", "off")]
    for path in paths:
        run(frozen(), path.name, path, attacks=[spec])
    assert paths[0].read_text() == paths[1].read_text()
    row = json.loads(paths[0].read_text().splitlines()[1])
    assert row[str(spec)] < row["clean"]


class Relative(nn.Module):
    """A backbone whose features depend on the batch."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, images):
        means = images.mean((2, 3)) * self.weight
        return means - means.mean(0)


def test_features_that_depend_on_the_batch_are_not_kept(cache, capsys):
    net = ProtoNet(Relative()).requires_grad_(False).eval()
    expected = run(net, "off")["clean"]
    capsys.readouterr()
    assert torch.equal(run(net)["clean"], expected)
    assert capsys.readouterr().out.count("features depend on the other images") == 1


class Blocked(nn.Module):
    """A backbone whose features are rounded otherwise in batches of another size, as some CPUs' kernels do."""

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 8).flatten(1) * (1 + 1e-6 * len(images))


def test_features_are_kept_where_the_size_of_a_batch_decides_the_order_of_sums(computed):
    """Kept as they come, a feature would depend on the episode that computed it first."""
    net = ProtoNet(Blocked()).requires_grad_(False).eval()
    expected = run(net, "off", episodes=12)["clean"]
    computed.clear()
    assert torch.allclose(run(net, episodes=12)["clean"], expected)
    assert sum(computed) < 3 * len(LABELS)  # 12 episodes of 18 images without the store
    tables = []
    for order in (torch.arange(len(LABELS)), torch.arange(len(LABELS)).flip(0)):
        with FeatureStore() as store, torch.no_grad():
            for index in order.split([6, 1, 10, 20, 11]):
                features(net.backbone, number(IMAGES[index], store, index))
            tables.append(store.table(net.backbone).rows)
    assert all(torch.equal(tables[0][row], tables[1][row]) for row in range(len(LABELS)))
    whole = net.backbone(IMAGES)
    assert any(not torch.equal(tables[0][row], whole[row]) for row in range(len(LABELS)))


def test_changed_images_changed_weights_and_gradients_are_computed(computed):
    net, index = backbone().requires_grad_(False), torch.arange(4)
    with FeatureStore() as store, torch.no_grad():
        images = number(IMAGES[index], store, index)
        first = features(net, images)
        computed.clear()
        assert torch.equal(features(net, images), first) and computed == []
        images.mul_(0.5)
        assert torch.equal(features(net, images), net(images)) and not torch.equal(net(images), first)
        images = number(IMAGES[index], store, index)
        net.vit.blocks[0].mlp.fc1.weight.mul_(2)
        changed = features(net, images)
        assert torch.equal(changed, net(IMAGES[index])) and not torch.equal(changed, first)
        computed.clear()
        assert torch.equal(features(net, number(IMAGES[[2, 5]], store, torch.tensor([2, 5]))), net(IMAGES[[2, 5]]))
        assert computed == [2]  # row 5, in a batch of two
        with torch.enable_grad():
            assert features(net, images) is not changed and computed[-1] == 4
    net.train()
    with FeatureStore() as store, torch.no_grad():
        assert store.table(net) is None  # dropout draws anew


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.backbone.vit.blocks[1].attn.proj.weight.mul_(1.5),
        lambda net: net.backbone.std.mul_(2),
        lambda net: setattr(net.backbone, "block", 0),
        lambda net: vars(net.backbone.vit.blocks[0].attn).update(num_heads=2, head_dim=16),
        lambda net: setattr(net.backbone.vit.norm, "eps", 0.5),
        lambda net: net.double(),
    ],
)
def test_a_file_belongs_to_all_that_a_feature_depends_on(cache, computed, change):
    run(frozen())
    other = frozen()
    with torch.no_grad():
        change(other)
    computed.clear()
    run(other)
    assert computed and len(list(cache.iterdir())) == 2
    computed.clear()
    run(frozen(), pixels=Pixels("other images"))
    assert computed and len(list(cache.iterdir())) == 3


def _cast(net) -> None:
    net.vit.blocks[0].mlp.half().register_forward_pre_hook(lambda module, inputs: (inputs[0].half(),))
    net.vit.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: output.float())


CHANGES: dict[str, Callable[..., object]] = {
    "in place": lambda net, _: net.vit.blocks[0].mlp.fc1.weight.mul_(2),
    "through .data": lambda net, _: net.vit.blocks[0].mlp.fc1.weight.data.mul_(2),
    "one value through .data": lambda net, _: net.vit.blocks[0].mlp.fc1.weight.data.view(-1)[-1].add_(1),
    "the data replaced": lambda net, _: setattr(net.vit.norm.weight, "data", net.vit.norm.weight.data.flip(0) * 2),
    "a parameter replaced": lambda net, _: setattr(net.vit.norm, "weight", nn.Parameter(torch.rand(32))),
    "a buffer": lambda net, _: net.mean.data.add_(0.1),
    "dtype": lambda net, _: net.double(),
    "dtype of a part": lambda net, _: _cast(net),
    "eps": lambda net, _: setattr(net.vit.norm, "eps", 0.5),
    "block": lambda net, _: setattr(net, "block", 0),
    "pool": lambda net, _: setattr(net, "pool", "avg"),
    "heads": lambda net, _: vars(net.vit.blocks[0].attn).update(num_heads=2, head_dim=16),
    "a module replaced": lambda net, _: setattr(net.vit.blocks[0].mlp, "act", nn.Tanh()),
    "_pos_embed on the instance": lambda net, _: setattr(
        net.vit, "_pos_embed", lambda x, old=net.vit._pos_embed: 2 * old(x)
    ),
    "forward on an instance": lambda net, _: setattr(net.vit.norm, "forward", torch.tanh),
    "forward_intermediates on the instance": lambda net, _: setattr(
        net.vit,
        "forward_intermediates",
        lambda x, old=net.vit.forward_intermediates, **options: [(2 * p, 2 * q) for p, q in old(x, **options)],
    ),
    "forward of a class": lambda _, patch: patch.setattr(Mlp, "forward", lambda self, x: self.fc2(self.fc1(x))),
    "a method of our class": lambda net, patch: patch.setattr(Backbone, "normalise", lambda self, images: images),
    "a hook": lambda net, _: net.vit.norm.register_forward_hook(lambda module, inputs, output: output * 2),
    "a hook before": lambda net, _: net.vit.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2 + 1,)),
    "a global hook": lambda _, patch: patch.setitem(
        nn.modules.module._global_forward_hooks,
        0,
        lambda module, inputs, output: output * 2 if module.training else output + 1,
    ),
}


# A version of a tensor does not tell what is changed through .data, nor a module what is changed on its class.
LATER = {
    *("through .data", "one value through .data", "a buffer"),
    *("forward of a class", "a method of our class"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_features_of_a_changed_backbone_are_computed(name, cache, monkeypatch):
    """In one store but for LATER, and by a later run from the files of the first."""
    index = torch.arange(6)

    def seen(net, store):
        with torch.no_grad():
            return features(net, number(IMAGES[index], store, index))

    net = backbone().requires_grad_(False).eval()
    with FeatureStore("gratings") as store:
        first = seen(net, store)
        with torch.no_grad():
            CHANGES[name](net, monkeypatch)
            expected = net(IMAGES[index])
        changed = seen(net, store)
    assert not torch.equal(expected, first) and torch.equal(changed, first if name in LATER else expected)
    with FeatureStore("gratings") as store:
        assert torch.equal(seen(net, store), expected)
    monkeypatch.undo()


def test_features_are_of_one_precision(cache):
    index, net = torch.arange(6), backbone().requires_grad_(False).eval()
    with FeatureStore("gratings") as store, torch.no_grad():
        plain = features(net, number(IMAGES[index], store, index))
        with torch.autocast("cpu", torch.bfloat16):
            assert not torch.equal(features(net, number(IMAGES[index], store, index)), plain)
    with FeatureStore("gratings") as store, torch.no_grad():
        assert torch.equal(features(net, number(IMAGES[index], store, index)), plain)


def test_hooks_run_whenever_features_are_asked_for():
    """A hook may do more than change the features."""
    net, index, calls = backbone().requires_grad_(False).eval(), torch.arange(4), []
    net.vit.norm.register_forward_hook(lambda module, inputs, output: calls.append(1))
    with FeatureStore() as store, torch.no_grad():
        for _ in range(3):
            features(net, number(IMAGES[index], store, index))
    assert len(calls) == 3


def test_code_of_others_is_not_trusted_from_run_to_run(cache):
    hooked, replaced = frozen(), frozen()
    hooked.backbone.vit.norm.register_forward_hook(lambda module, inputs, output: output * 2)
    replaced.backbone.vit.norm.forward = torch.tanh
    run(ProtoNet(Relative()).eval())
    run(hooked)
    run(replaced)
    run(frozen(), pixels=Pixels(None))
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["cut", "bit"])
def test_a_damaged_file_is_computed_again(cache, computed, capsys, damage):
    expected = run(frozen())["clean"]
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    file.write_bytes(whole[:-9] if damage == "cut" else flipped)
    computed.clear()
    assert torch.equal(run(frozen())["clean"], expected) and computed
    assert "is damaged; its features are computed again" in capsys.readouterr().out
    assert file.read_bytes() == whole


def test_an_interrupted_evaluation_keeps_what_it_computed(cache, computed, tmp_path):
    class Interrupted(Pixels):
        calls = 0

        def __getitem__(self, index):
            self.calls += 1
            if self.calls > 10:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        run(frozen(), pixels=Interrupted(), episodes=12)
    assert len(list(cache.iterdir())) == 1
    first = sum(computed)
    run(frozen(), episodes=12)
    assert sum(computed) - first < len(LABELS) and sum(computed) <= len(LABELS) + 2 * 4 + computed.count(2)


def test_without_room_there_is_one_notice_and_the_same_result(cache, capsys):
    expected = run(frozen(), "off")["clean"]
    cache.parent.write_text("a file where the folder should be")
    capsys.readouterr()
    assert all(torch.equal(run(frozen())["clean"], expected) for _ in range(2))
    assert capsys.readouterr().out.count("features are computed again by the next run") == 1


def test_the_file_used_longest_ago_makes_room(cache, monkeypatch):
    run(frozen())
    (old,) = cache.iterdir()
    size = old.stat().st_size
    theirs = cache / "my_features.safetensors"
    theirs.write_bytes(b"theirs")
    os.utime(theirs, (0, 0))
    os.utime(old, (1, 1))
    run(frozen(), pixels=Pixels("second"))
    (second,) = set(cache.iterdir()) - {old, theirs}
    os.utime(second, (2, 2))
    run(frozen())  # used now
    monkeypatch.setattr(files, "LIMIT", int(2.5 * size))
    run(frozen(), pixels=Pixels("third"))
    assert old.exists() and not second.exists() and theirs.exists() and len(list(cache.iterdir())) == 3
    monkeypatch.setattr(files, "LIMIT", size - 1)
    run(frozen(), pixels=Pixels("fourth"))
    assert len(list(cache.iterdir())) == 3


def test_another_word_is_refused():
    with pytest.raises(UserError, match=r"features 'of'. Near: 'off'"):
        run(frozen(), "of")
