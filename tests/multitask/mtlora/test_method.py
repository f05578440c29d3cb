"""MTLoRA: the equations of a block, features of tasks beside shared ones, gradients and decay, counts, merging, files, errors."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.tiny import holds, images, shake, snapshot, tiny_vit
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

import vismt
from vismt import UserError
from vismt.backbones.pyramid import Pyramid
from vismt.backbones.vit import Backbone
from vismt.config.sections import TrainConfig
from vismt.engine.blocks import running_blocks
from vismt.engine.sharding import check_sharded
from vismt.lowrank.layers.base import adapter_layers
from vismt.methods import method_optimizer
from vismt.multitask import merge_shared, task_features
from vismt.multitask.heads import make_map_head
from vismt.multitask.mtlora.layers import TaskBlock, TaskLinear
from vismt.multitask.nets import DenseNet

TASKS = ("depth", "edge")


def adapted(dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    """Return a ViT of two blocks, both with pairs of two tasks, every pair far from its start."""
    model = tiny_vit().to(dtype)
    vismt.adapt(model, "mtlora", rank=2, **{"tasks": TASKS, "task_rank": 3, **options})
    return shake(model, 0.2)


def swin() -> nn.Module:
    """Return a Swin of two stages of two blocks, the second of each with shifted windows, for images of 32 pixels."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2)}
    return timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, **shape).eval()


def dinov3(**options: object) -> nn.Module:
    """Return a DINOv3 of two blocks for images of 32 pixels, its layer scales of the size of a trained one."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "init_values": 0.5, "num_classes": 3}
    return timm.create_model("vit_small_patch16_dinov3", head_init_scale=5.0, **shape, **options).eval()


def dinov3_plus() -> nn.Module:
    """Return one with a SwiGLU, as the larger ones have it."""
    return dinov3(swiglu_mlp=True, swiglu_align_to=8)


MAKES = [tiny_vit, swin, dinov3, dinov3_plus]


def product(layer: TaskLinear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def plus(layer: TaskLinear, x: Tensor, task: int | None = None) -> Tensor:
    A, B = (layer.lora_A, layer.lora_B) if task is None else (layer.task_A[task], layer.task_B[task])
    return 4.0 * x @ A.T @ B.T


@torch.no_grad()
def of(model: nn.Module, x: Tensor, *tasks: str) -> dict[str, Tensor]:
    """Return the features of each task block for each task, by "path task"."""
    with task_features(tasks) as features:
        model(x)
    paths = {module: path for path, module in model.named_modules()}
    return {
        f"{paths[block]} {task}": rows
        for block, own in features.own.items()
        for task, rows in zip(tasks, own.chunk(len(tasks)))
    }


def test_a_block_computes_the_equations_of_the_paper() -> None:
    model = adapted(torch.float64)
    block, x = model.blocks[1], torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with task_features(TASKS) as features:
        shared = block(x)
    own = features.own[block].chunk(2)
    proj, fc1, fc2 = block.attn.proj, block.mlp.fc1, block.mlp.fc2
    normed = block.norm1(x)
    q, k, v = block.attn.qkv(normed).view(2, 5, 3, 4, 8).permute(2, 0, 3, 1, 4)
    o = ((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).reshape(2, 5, 32)
    h = x + product(proj, o) + plus(proj, o)
    u = F.gelu(product(fc1, block.norm2(h)) + plus(fc1, block.norm2(h)))
    assert torch.allclose(shared, h + product(fc2, u) + plus(fc2, u), rtol=0, atol=1e-12)
    for task in range(2):
        h_t = x + product(proj, o) + plus(proj, o, task)
        frozen = product(fc1, block.norm2(h))
        u_t = F.gelu(frozen + plus(fc1, block.norm2(h_t), task))
        y_t = h_t + product(fc2, u) + plus(fc2, u_t, task)
        assert torch.allclose(own[task], y_t, rtol=0, atol=1e-12)
        # The two plausible others: the frozen product of the task's input, and the shared pair in the task's output.
        for first, more in ((product(fc1, block.norm2(h_t)), 0.0), (frozen, plus(fc1, block.norm2(h)))):
            other = F.gelu(first + plus(fc1, block.norm2(h_t), task) + more)
            assert not torch.allclose(own[task], h_t + product(fc2, u) + plus(fc2, other, task), rtol=0, atol=1e-3)


@torch.no_grad()
def test_a_block_of_dinov3_computes_them_with_rotary_positions_and_a_gate() -> None:
    model = dinov3_plus().double()
    vismt.adapt(model, "mtlora", rank=2, tasks=TASKS, task_rank=3)
    shake(model, 0.2)
    block, calls = model.blocks[1], []
    hook = block.register_forward_pre_hook(
        lambda _, inputs, options: calls.append((*inputs, options)), with_kwargs=True
    )
    with task_features(TASKS) as features:
        model(images(size=32).double())
    hook.remove()
    (x, options), own = calls[0], features.own[block].chunk(2)
    assert options["rope"] is not None
    attend = copy.deepcopy(block.attn)
    attend.proj = nn.Identity()
    o, proj, mlp = attend(block.norm1(x), **options), block.attn.proj, block.mlp
    h = x + block.gamma_1 * (product(proj, o) + plus(proj, o))
    n = block.norm2(h)
    gate, value = (product(layer, n) + plus(layer, n) for layer in (mlp.fc1_g, mlp.fc1_x))
    u = F.silu(gate) * value
    y = h + block.gamma_2 * (product(mlp.fc2, u) + plus(mlp.fc2, u))
    assert torch.allclose(block(x, **options), y, rtol=0, atol=1e-12)
    assert not torch.allclose(block(x), y, rtol=0, atol=1e-3)  # without positions
    for task in range(2):
        h_t = x + block.gamma_1 * (product(proj, o) + plus(proj, o, task))
        gate, value = (product(f, n) + plus(f, block.norm2(h_t), task) for f in (mlp.fc1_g, mlp.fc1_x))
        y_t = h_t + block.gamma_2 * (product(mlp.fc2, u) + plus(mlp.fc2, F.silu(gate) * value, task))
        assert torch.allclose(own[task], y_t, rtol=0, atol=1e-12)


def test_a_task_of_a_shifted_window_block_keeps_its_tokens_in_place() -> None:
    """With a task's pair in proj alone, y_t - y is what the task's attention adds to the shared one, after the windows."""
    model = swin()
    vismt.adapt(model, "mtlora", rank=2, tasks=["edge"])
    inputs = torch.randn(3, 16, 16, 8, generator=torch.Generator().manual_seed(2))
    block = model.layers[0].blocks[1]
    proj, stock = block.attn.proj, copy.deepcopy(swin().layers[0].blocks[1])
    assert any(stock.shift_size)
    with torch.no_grad():
        proj.task_B[0].normal_(generator=torch.Generator().manual_seed(1))
    with task_features(["edge"]) as features:
        shared = block(inputs)
    before = stock._attn(stock.norm1(inputs))
    with torch.no_grad():
        stock.attn.proj.weight += 4.0 * proj.task_B[0] @ proj.task_A[0]
    added = stock._attn(stock.norm1(inputs)) - before
    assert torch.allclose(features.own[block] - shared, added, atol=1e-5)
    assert float(added.detach().abs().max()) > 0.1


def test_a_swin_with_pairs_of_tasks_is_converted_and_resized_like_the_stock_one() -> None:
    model = swin()
    vismt.adapt(model, "mtlora", rank=2, tasks=TASKS)
    shake(model, 0.05)
    expected = of(model, images(size=32), *TASKS)
    double = copy.deepcopy(model).double()
    assert double.layers[0].blocks[1].shell.attn_mask.dtype == torch.float64  # what its forward reads
    for name, rows in of(double, images(size=32).double(), *TASKS).items():
        assert torch.allclose(rows.float(), expected[name], atol=1e-4 * float(expected[name].abs().max()))
    model.set_input_size((64, 64), window_size=4)
    fresh = swin()
    vismt.adapt(fresh, "mtlora", rank=2, tasks=TASKS)
    vismt.unadapt(fresh)
    fresh.set_input_size((64, 64), window_size=4)
    vismt.adapt(fresh, "mtlora", rank=2, tasks=TASKS)
    fresh.load_state_dict(model.state_dict())
    resized = of(fresh, images(size=64), *TASKS)
    assert all(torch.equal(rows, resized[name]) for name, rows in of(model, images(size=64), *TASKS).items())


@pytest.mark.parametrize("make", MAKES)
def test_at_the_start_every_task_has_the_features_of_the_stock_model(make) -> None:
    model, x = make(), images(size=16 if make is tiny_vit else 32)
    expected = model(x)
    vismt.adapt(model, "mtlora", rank=2, tasks=TASKS)
    for task in TASKS:
        with task_features([task] * 3, per_sample=True):
            assert torch.allclose(model(x), expected, atol=1e-6)
    layer = next(layer for layer in adapter_layers(model).values() if isinstance(layer, TaskLinear))
    assert not any(B.any() for B in layer.task_B) and not torch.equal(*layer.task_A)


def test_a_pair_of_a_task_changes_the_features_of_this_task_alone() -> None:
    model = adapted()
    shared, before = model(images()), of(model, images(), *TASKS)
    assert all(float((before[f"blocks.{k} depth"] - before[f"blocks.{k} edge"]).abs().max()) > 0.01 for k in (0, 1))
    with torch.no_grad():
        model.blocks[0].mlp.fc2.task_B[1] += 1.0
    after = of(model, images(), *TASKS)
    changed = [name for name, rows in after.items() if not torch.equal(rows, before[name])]
    assert changed == ["blocks.0 edge"]
    assert torch.equal(model(images()), shared)


@pytest.mark.parametrize("make", MAKES)
def test_a_mixed_batch_is_its_samples_each_with_a_model_of_its_task_alone(make) -> None:
    x = images(4, size=16 if make is tiny_vit else 32)
    model = make()
    vismt.adapt(model, "mtlora", rank=2, tasks=TASKS)
    shake(model, 0.2)
    names = ["edge", "depth", "depth", "edge"]
    with task_features(names, per_sample=True):
        mixed = model(x)
    for number, name in enumerate(TASKS):
        alone = make()
        vismt.adapt(alone, "mtlora", rank=2, tasks=[name])
        for layer, one in zip(adapter_layers(model).values(), adapter_layers(alone).values()):
            tensors = layer.tensors()
            one.fill({key: tensors[key.replace(".0", f".{number}")] for key in one.tensors()})
        for row in (k for k, of_row in enumerate(names) if of_row == name):
            with task_features([name], per_sample=True):
                assert torch.allclose(alone(x[row : row + 1])[0], mixed[row], atol=1e-6)
    assert float((mixed - model(x)).detach().abs().max()) > 0.01  # the shared features are others


STATISTICS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


def net(depth: int = 2, backbone: Backbone | Pyramid | None = None) -> DenseNet:
    backbone = backbone or Backbone(tiny_vit(num_classes=0, depth=depth), **STATISTICS)
    heads = {task: make_map_head("segformer", backbone.widths[-2:], 3, hidden=8) for task in TASKS}
    return DenseNet(backbone, heads, [backbone.depth - 2, backbone.depth - 1])


@pytest.mark.parametrize("stages", [False, True])
def test_a_head_reads_the_maps_of_its_task(stages: bool) -> None:
    model, x = net(backbone=Pyramid(swin(), **STATISTICS) if stages else None), images(size=32 if stages else 16)
    backbone = model.backbone
    read = ["layers.0.blocks.1", "layers.1.blocks.1"] if stages else ["blocks.0", "blocks.1"]
    assert model.read_blocks == read
    vismt.adapt(model.stock, "mtlora", rank=2, tasks=TASKS)
    shake(model.stock, 0.2)
    rows: list[Tensor] = []
    hooks = [model.stock.get_submodule(path).register_forward_hook(lambda *call: rows.append(call[2])) for path in read]
    maps = backbone.maps(x, [0, 1])
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(backbone.as_maps(tokens), map) for tokens, map in zip(rows, maps))
    own, logits = of(model.stock, backbone.normalise(x), *TASKS), model(x)
    for task, head in model.heads.items():
        expected = head([backbone.as_maps(own[f"{path} {task}"]) for path in read])
        assert torch.allclose(logits[task], expected, atol=1e-5 * float(expected.detach().abs().max()))
        assert not torch.allclose(logits[task], head(maps), rtol=0, atol=1e-3)


def test_a_loss_reaches_the_pairs_of_its_task_and_every_shared_pair_that_a_head_reads() -> None:
    model = net()
    vismt.adapt(model.stock, "mtlora", rank=2, tasks=TASKS)
    shake(model.stock, 0.2)
    model(images())["edge"].square().sum().backward()
    for path, layer in adapter_layers(model.stock).items():
        reached = {name: bool(value.grad is not None and value.grad.any()) for name, value in layer.tensors().items()}
        shared = path != "blocks.1.mlp.fc2"  # its shared output leaves the model
        assert (reached.pop("lora_A"), reached.pop("lora_B")) == (shared, shared), path
        assert all(got == name.endswith(".1") for name, got in reached.items()), path


def test_the_pairs_of_a_task_without_a_loss_neither_move_nor_decay() -> None:
    model = net()
    vismt.adapt(model.stock, "mtlora", rank=2, tasks=TASKS)
    shake(model.stock, 0.2)
    trained = [parameter for parameter in model.stock.parameters() if parameter.requires_grad]
    optimizer = method_optimizer(torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5), model)
    for losses in (TASKS, ("edge",)):
        before = snapshot(model.stock)
        logits = model(images())
        # As MultitaskObjective does: the head of an absent task stays in the graph with a gradient of zero.
        sum(
            logits[task].square().sum() if task in losses else logits[task].flatten()[:0].sum() for task in TASKS
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.stock.state_dict()
    still = {name for name in after if ".task_" in name and torch.equal(after[name], before[name])}
    assert still == {name for name in after if ".task_" in name and name.endswith(".0")}


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = net(depth=3).train()
        vismt.adapt(model.stock, "mtlora", rank=2, tasks=TASKS, task_blocks=["blocks.1", "blocks.2"])
        shake(model.stock, 0.2)
        with running_blocks(model, TrainConfig(steps=1, lr=0.1, checkpointing=checkpointing)):
            logits = model(images())
            sum(value.square().sum() for value in logits.values()).backward()
        gradients.append({name: p.grad for name, p in model.stock.named_parameters() if p.requires_grad})
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


def test_fsdp_is_refused() -> None:
    model = net()
    vismt.adapt(model.stock, "mtlora", rank=2, tasks=TASKS)
    with pytest.raises(UserError, match="FSDP: a block returns features of tasks beside its output"):
        check_sharded(model, TrainConfig(steps=1, lr=0.1))


# Of a Swin-T with four tasks: (r, r_t) -> trained parameters of MTLoRA and MTLoRA+, decoders of 1,946,624 among them.
COUNTS = {
    (4, 4): (4_105_274, 2_573_114),
    (16, 4): (4_953_146, 3_469_370),
    (16, 16): (5_782_586, 4_298_810),
    (64, 4): (8_344_634, 7_054_394),
}


def test_the_published_numbers_of_trained_parameters() -> None:
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0)
    linears = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    extra = [r"layers\..*norm.*", "relative_position_bias_table", "patch_embed"]
    for plus in (False, True):
        targets = [*linears, *["downsample.reduction"] * plus]
        also_train = extra if plus else [*extra, "downsample.reduction"]
        for (rank, task_rank), expected in COUNTS.items():
            sizes = {"rank": rank, "task_rank": task_rank, "tasks": list("abcd")}
            report = vismt.adapt(model, "mtlora", targets, also_train=also_train, **sizes)
            assert report.trainable + 1_946_624 == expected[plus]
            # timm's Swin ends with a norm, which the released class lacks.
            frozen = {name for name, value in model.named_parameters() if not value.requires_grad} - {
                "norm.weight",
                "norm.bias",
            }
            assert {re.sub(r".*blocks\.\d+\.|.*(?=downsample)", "", name) for name in frozen} == {
                *(f"{path}.{leaf}" for path in linears for leaf in ("weight", "bias")),
                *["downsample.reduction.weight"] * plus,
            }
            vismt.unadapt(model)


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"rank": 3}])
def test_without_alpha_the_scale_does_not_depend_on_the_rank(options: dict) -> None:
    model = tiny_vit()
    vismt.adapt(model, "mtlora", tasks=TASKS, **{"rank": 2, **options})
    assert {layer.scale for layer in adapter_layers(model).values()} == {4.0}


def test_ranks_and_scales_by_stage() -> None:
    model = swin()
    vismt.adapt(
        model,
        "mtlora",
        rank=2,
        rank_pattern={r"layers\.1\..*": 3},
        alpha_pattern={r"layers\.1\..*": 6.0},
        tasks=TASKS,
        task_rank={r"layers\.0\..*": 1, r"layers\.1\..*": 5},
        task_scale={r"layers\.0\..*": 0.5, r"layers\.1\..*": 2.0},
    )
    seen = [model.layers[k].blocks[1].mlp.fc1 for k in (0, 1)]
    assert [(f.rank, f.scale, len(f.task_A[0]), f.task_scale) for f in seen] == [(2, 4.0, 1, 0.5), (3, 2.0, 5, 2.0)]


@pytest.mark.parametrize("make", MAKES)
def test_merge_shared_keeps_the_features_of_all_tasks(make) -> None:
    model, x = make(), images(size=16 if make is tiny_vit else 32)
    vismt.adapt(model, "mtlora", rank=2, tasks=TASKS)
    shake(model, 0.2)
    shared, before = model(x), of(model, x, *TASKS)
    with pytest.raises(UserError, match=r"merge: '.*attn.proj' has a pair for each task.*merge_shared"):
        vismt.merge(model)
    wrong = copy.deepcopy(model)
    merge_shared(model)
    kept = [path for path, module in model.named_modules() if isinstance(module, TaskLinear)]
    assert list(adapter_layers(model)) == kept and len(kept) == (8 if make is dinov3_plus else 6)
    assert torch.allclose(model(x), shared, atol=1e-5)
    after = of(model, x, *TASKS)
    assert all(
        float((after[name] - rows).abs().max()) < 1e-5 * float(rows.abs().max()) for name, rows in before.items()
    )
    # Merged where tasks have pairs as well, the shared features stay and those of tasks do not.
    for layer in adapter_layers(wrong).values():
        with torch.no_grad():
            layer.weight += layer.scale * layer.lora_B @ layer.lora_A
            layer.lora_B.zero_()
    assert torch.allclose(wrong(x), shared, atol=1e-5)
    off = of(wrong, x, *TASKS)
    assert all(float((off[name] - before[name]).detach().abs().max()) > 1e-2 for name in before)
    with pytest.raises(UserError, match="merge_shared: this model is not adapted"):
        merge_shared(model)


@pytest.mark.slow
@torch.no_grad()
def test_a_graph_takes_any_batch() -> None:
    backbone = Pyramid(swin())
    net = DenseNet(backbone, {task: make_map_head("linear", backbone.widths, 2) for task in TASKS}, [0, 1])
    vismt.adapt(net.stock, "mtlora", rank=2, tasks=TASKS)
    merge_shared(shake(net.stock, 0.2))
    net.eval().requires_grad_(False)
    batch = {"images": {0: torch.export.Dim("batch", min=1, max=4096)}}
    graph = torch.export.export(net, (torch.rand(2, 3, 32, 32),), dynamic_shapes=batch).module()
    for count in (1, 3):
        x = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
        assert all(torch.allclose(graph(x)[task], wanted, atol=1e-5) for task, wanted in net(x).items())


def test_files_copies_and_undoing(tmp_path: Path) -> None:
    model, x = adapted(also_train=["head"]), images()

    def answers(model: nn.Module) -> Tensor:
        with task_features(["edge", "depth", "edge"], per_sample=True):
            return torch.cat([model(x), of(model, x, *TASKS)["blocks.0 depth"].flatten(1)], 1)

    expected = answers(model)
    vismt.save_adapter(model, tmp_path)
    fresh = vismt.load_adapter(tiny_vit(), tmp_path)
    again = vismt.load_adapter(adapted(also_train=["head"]), tmp_path)
    assert all(torch.equal(answers(other), expected) for other in (fresh, again, copy.deepcopy(model)))
    vismt.adapt(model, "lora", name="other")
    vismt.activate(model, "default")
    assert torch.equal(answers(model), expected)
    vismt.remove(model, "other")
    vismt.unadapt(model)
    assert holds(model, tiny_vit().state_dict())
    eva, stock = dinov3(), dinov3().state_dict()  # whose blocks have parameters of their own
    vismt.adapt(eva, "mtlora", tasks=TASKS)
    assert {name for name in stock if "gamma" in name} <= set(eva.state_dict())
    vismt.activate(eva, None)
    assert not [name for name in eva.state_dict() if "gamma" in name and name not in stock]
    vismt.unadapt(eva)
    assert list(eva.state_dict()) == list(stock)
    assert not any(isinstance(module, TaskBlock) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"tasks \[\]; give a list of different names"),
        ({"tasks": ["a", "a"]}, "give a list of different names"),
        ({"tasks": TASKS, "targets": ["qkv", "attn.proj", "fc1"]}, "targets leave out 'blocks.0.mlp.fc2'"),
        ({"tasks": TASKS, "task_rank": 0}, "task_rank of 'blocks.0' is 0; it must be a whole number"),
        ({"tasks": TASKS, "task_rank": 33}, "task_rank 33 for 'blocks.0.attn.proj' .32 x 32. is larger than 32"),
        ({"tasks": TASKS, "task_rank": {"blocks.0": 2}}, "task_rank of 'blocks.1' is None"),
        ({"tasks": TASKS, "task_scale": -1}, "task_scale of 'blocks.0' is -1; it must be a positive"),
        ({"tasks": TASKS, "task_scale": {"layers.0": 1.0}}, "task_scale: no module matches 'layers.0'"),
        ({"tasks": TASKS, "task_blocks": ["blocks.0"]}, "the last block, 'blocks.1', has to be among them"),
        ({"tasks": TASKS, "task_blocks": ["blocks.7"]}, "'blocks.7' is no such module"),
        ({"tasks": TASKS, "task_blocks": ["norm"]}, "'norm' is a LayerNorm, needed a Block"),
    ],
)
def test_errors_of_options_leave_the_model_as_it_was(options: dict, words: str) -> None:
    model = tiny_vit()
    with pytest.raises(UserError, match=words):
        vismt.adapt(model, "mtlora", rank=2, **options)
    assert list(model.state_dict()) == list(tiny_vit().state_dict())


def test_errors_of_tasks_in_a_call() -> None:
    model = adapted()
    with pytest.raises(UserError, match=r"no pairs of the task.*'deph'.*Near: 'depth'"), task_features(["deph"]):
        model(images())
    with pytest.raises(UserError, match="2 names for a batch of 3 samples"), task_features(TASKS, per_sample=True):
        model(images())
    for names in ("depth", [], ["edge", "edge"], [None]):
        with pytest.raises(UserError, match="give a list of different names"):
            task_features(names)
    with pytest.raises(UserError, match=r"merge_shared: 'lora' has no pairs of tasks; call vismt\.merge"):
        lora = tiny_vit()
        vismt.adapt(lora, "lora")
        merge_shared(lora)
    dense = net(depth=3)
    vismt.adapt(dense.stock, "mtlora", tasks=TASKS, task_blocks=["blocks.0", "blocks.2"])
    with pytest.raises(UserError, match=r"in 2 blocks, of which its heads read 1; name blocks of blocks\.1, blocks\.2"):
        dense(images())
    with pytest.raises(UserError, match="ResNet has no blocks; it needs a ViT or a Swin"):
        vismt.adapt(timm.create_model("test_resnet"), "mtlora", tasks=TASKS)
    other = tiny_vit(block_fn=ResPostBlock)
    with pytest.raises(UserError, match=r"'blocks\.0' is a ResPostBlock, needed a Block of timm's ViT, an EvaBlock or"):
        vismt.adapt(other, "mtlora", tasks=TASKS)
