"""LISA on three model families: trained layers, optimiser state, the schedule, resuming, and memory."""

from __future__ import annotations

import io
from inspect import signature

import numpy as np
import pytest
import torch
from helpers.lisa_parts import DEPTH, FAMILIES, Case, adamw, case, numel, train
from helpers.tiny import snapshot
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from scripts.bench.accounting import optimizer_bytes, saved_activation_bytes
from vismt.base.errors import UserError
from vismt.llm import LISA
from vismt.llm.lisa.method import lisa

POLICIES = ("drop", "keep", "offload", "reset_all")


def moved(setup: Case, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in setup.model.named_parameters() if not torch.equal(value, before[name])}


def toy(count: int, width: int = 2) -> nn.ModuleDict:
    return nn.ModuleDict(
        {"first": nn.Linear(2, 2), "layers": nn.ModuleList(nn.Linear(width, width) for _ in range(count))}
    )


def schedule(count: int, **options: object) -> LISA:
    model = toy(count)
    return LISA(model, torch.optim.SGD(model.parameters(), 0.1), **options)


# ---- 1, 2: trained layers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("active", [1, 2])
def test_exactly_gamma_layers_have_a_gradient_and_the_outside_always(family: str, active: int) -> None:
    setup = case(family)
    lisa = LISA(setup.model, adamw(setup.model), active=active, interval=2, seed=3)
    trained_layers = set()
    for step in range(8):
        lisa.on_step(step)
        setup.loss(step).backward()
        layers = setup.layers()
        with_gradient = [i for i, layer in enumerate(layers) if any(p.grad is not None for p in layer.parameters())]
        assert with_gradient == lisa.active_layers and len(with_gradient) == active
        for i in with_gradient:
            assert all(p.grad is not None for p in layers[i].parameters())
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in setup.outside())
        trained_layers |= set(with_gradient)
        lisa.optimizer.step()
        lisa.optimizer.zero_grad()
    assert len(trained_layers) > active
    # Layers and the other parameters together are the whole model.
    inside = {id(p) for layer in setup.layers() for p in layer.parameters()}
    assert inside.isdisjoint(map(id, setup.outside()))
    assert inside | set(map(id, setup.outside())) == set(map(id, setup.model.parameters()))


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize(
    "family,policy", [*((family, "drop") for family in FAMILIES), *(("llama", policy) for policy in POLICIES[1:])]
)
def test_frozen_layers_stand_still_bit_for_bit(family: str, momentum: bool, policy: str) -> None:
    """This includes a layer that was just frozen: with a zero gradient instead of none it would move by momentum and decay."""
    setup = case(family)
    sgd = torch.optim.SGD(setup.model.parameters(), 0.05, momentum=0.9, weight_decay=0.1)
    optimizer = sgd if momentum else adamw(setup.model)
    lisa = LISA(setup.model, optimizer, active=1, interval=2, seed=1, state_policy=policy)
    for step in range(10):
        before = snapshot(setup.model)
        train(setup, lisa, range(step, step + 1), set_to_none=False)
        expected = {*setup.before, *setup.after, *setup.names(lisa.active_layers[0])}
        assert moved(setup, before) == expected, step


# ---- 3: optimiser state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", ["drop", "reset_all"])
def test_adam_bytes_are_the_formula_at_every_step(family: str, policy: str) -> None:
    setup = case(family)
    lisa = LISA(setup.model, adamw(setup.model), active=2, interval=2, seed=0, state_policy=policy)
    outside, layer = setup.outside(), list(setup.layers()[0].parameters())
    # (|E| + |H| + |F| + 2 |layer|) * 8 bytes of moments; AdamW's step counters are 4 bytes per tensor
    formula = 8 * (numel(outside) + 2 * numel(layer)) + 4 * (len(outside) + 2 * len(layer))
    for step in range(10):
        train(setup, lisa, range(step, step + 1))
        assert optimizer_bytes(lisa.optimizer) == formula
        assert set(lisa.optimizer.state) == {p for p in setup.model.parameters() if p.requires_grad}


@pytest.mark.parametrize("policy", ["keep", "offload"])
def test_keep_grows_to_the_state_of_full_training(policy: str) -> None:
    setup = case("llama")
    lisa = LISA(setup.model, adamw(setup.model), active=1, interval=1, cover=True, state_policy=policy)
    sizes = []
    for step in range(DEPTH + 2):
        train(setup, lisa, range(step, step + 1))
        sizes.append(optimizer_bytes(lisa.optimizer))
    parameters = list(setup.model.parameters())
    assert sizes[:DEPTH] == sorted(set(sizes[:DEPTH])) and sizes[DEPTH - 1 :] == 3 * [
        8 * numel(parameters) + 4 * len(parameters)
    ]


def test_steps_below_the_spacing_of_half_precision_are_warned_of_and_fp32_under_autocast_takes_them(recwarn) -> None:
    shares = []
    for dtype in (torch.bfloat16, torch.float32):
        setup = case("llama")
        setup.model.to(dtype)
        lisa = LISA(setup.model, adamw(setup.model, lr=1e-5, weight_decay=0.0), active=DEPTH)
        assert len(recwarn) == 1  # by the first model alone
        before = snapshot(setup.model)
        with torch.autocast("cpu", torch.bfloat16):
            train(setup, lisa, range(4))
        changed = [(value != before[name]).sum() for name, value in setup.model.named_parameters()]
        shares.append(float(sum(changed)) / numel(list(setup.model.parameters())))
    assert shares[0] < 0.2 and shares[1] > 0.8
    assert "is trained in torch.bfloat16" in str(recwarn[0].message) and "in float32" in str(recwarn[0].message)


def test_the_outside_keeps_its_state_under_drop_and_loses_it_under_reset_all() -> None:
    ages = {}
    for policy in ("drop", "reset_all"):
        setup = case("llama")
        lisa = LISA(setup.model, adamw(setup.model), active=1, interval=2, state_policy=policy)
        train(setup, lisa, range(5))
        ages[policy] = int(lisa.optimizer.state[setup.outside()[0]]["step"])
    # After five steps with switches at 2 and 4: age five, or one since the last switch.
    assert ages == {"drop": 5, "reset_all": 1}


def test_a_layer_that_stays_keeps_its_state_and_one_that_returns_starts_again() -> None:
    setup = case("llama")
    lisa = LISA(setup.model, adamw(setup.model), active=3, interval=1, seed=0)
    ages = dict.fromkeys(range(DEPTH), 0)
    for step in range(12):
        train(setup, lisa, range(step, step + 1))
        ages = {layer: ages[layer] + 1 if layer in lisa.active_layers else 0 for layer in ages}
        for layer, age in ages.items():
            first = next(setup.layers()[layer].parameters())
            assert (int(lisa.optimizer.state[first]["step"]) if first in lisa.optimizer.state else 0) == age
    assert max(ages.values()) > 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU host memory is where the state is anyway")
def test_offload_moves_the_moments_to_host_memory_and_back() -> None:
    setup = case("vit")
    setup.model.cuda()
    lisa = LISA(setup.model, adamw(setup.model), active=1, interval=1, cover=True, state_policy="offload")
    for step in range(2 * DEPTH):
        lisa.on_step(step)
        setup.model(torch.rand(2, 3, 16, 16, device="cuda")).square().mean().backward()
        lisa.optimizer.step()
        lisa.optimizer.zero_grad()
        for layer, module in enumerate(setup.layers()):
            for parameter in module.parameters():
                if parameter in lisa.optimizer.state:
                    device = lisa.optimizer.state[parameter]["exp_avg"].device.type
                    assert device == ("cuda" if layer in lisa.active_layers else "cpu")


# ---- 4: gamma = L and gamma = 0 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_active_is_full_training_bit_for_bit(family: str) -> None:
    setup, full = case(family), case(family)
    lisa = LISA(setup.model, adamw(setup.model), active=DEPTH, interval=2)
    losses = train(setup, lisa, range(6))
    optimizer, expected = adamw(full.model), []
    for step in range(6):
        loss = full.loss(step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert losses == expected
    assert all(torch.equal(a, b) for a, b in zip(setup.model.parameters(), full.model.parameters()))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_layer_active_trains_the_outside_alone(family: str) -> None:
    setup = case(family)
    before = snapshot(setup.model)
    lisa = LISA(setup.model, adamw(setup.model), active=0, interval=1)
    train(setup, lisa, range(3))
    assert lisa.active_layers == [] and moved(setup, before) == {*setup.before, *setup.after}


# ---- 5, 6: the schedule --------------------------------------------------------------------------------------------------


def test_schedule_is_a_function_of_seed_and_interval_alone() -> None:
    first, second, other = (schedule(8, seed=seed, interval=3) for seed in (5, 5, 6))
    active_layers = []
    for step in range(60):
        np.random.seed(step)
        torch.manual_seed(step)
        first.on_step(step)
        np.random.rand(step)
        assert first.active_layers == second.layers_at(step)
        assert first.active_layers == sorted(np.random.default_rng([5, step // 3]).choice(8, 2, replace=False).tolist())
        assert first.active_layers == [i for i, layer in first._layers.items() if layer[0].requires_grad]
        active_layers.append(first.active_layers)
    changes = [step for step in range(1, 60) if active_layers[step] != active_layers[step - 1]]
    assert changes and all(step % 3 == 0 for step in changes)
    assert active_layers != [other.layers_at(step) for step in range(60)]
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    first.on_step(61)
    assert (np.random.get_state()[1] == state[0]).all() and torch.equal(torch.get_rng_state(), state[1])


def test_micro_batches_of_one_step_are_never_split_by_a_switch() -> None:
    setup, whole = case("llama"), case("llama")
    lisa = LISA(setup.model, adamw(setup.model), active=1, interval=1, seed=2)
    for step in range(6):
        for part in range(3):
            lisa.on_step(step)
            (setup.loss(3 * step + part) / 3).backward()
        lisa.optimizer.step()
        lisa.optimizer.zero_grad()
    # By hand: freeze and unfreeze the layers of each step, three batches per step.
    optimizer = adamw(whole.model)
    for step in range(6):
        for number, layer in enumerate(whole.layers()):
            layer.requires_grad_(number in lisa.layers_at(step))
            for parameter in layer.parameters():
                if number not in lisa.layers_at(step):
                    optimizer.state.pop(parameter, None)
        for part in range(3):
            (whole.loss(3 * step + part) / 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(setup.model.parameters(), whole.model.parameters()))


@pytest.mark.parametrize("cover", [False, True])
def test_marginals_are_uniform_and_no_draw_holds_a_layer_twice(cover: bool) -> None:
    lisa = schedule(8, active=3, interval=1, seed=0, cover=cover)
    counts = np.zeros(8)
    for step in range(5_000):
        drawn = lisa.layers_at(step)
        assert len(set(drawn)) == 3
        counts[drawn] += 1
    # three of eight layers a draw; the standard deviation of a share is sqrt(.375 * .625 / 5000) = .0068
    assert np.abs(counts / 5_000 - 3 / 8).max() < 0.02


@pytest.mark.parametrize("count,active", [(8, 2), (8, 3), (5, 4), (3, 3), (7, 1)])
def test_cover_visits_every_layer_in_the_fewest_intervals(count: int, active: int) -> None:
    lisa = schedule(count, active=active, interval=5, cover=True)
    hands = -(-count // active)
    decks = []
    for deck in range(4):
        drawn = [lisa.layers_at(5 * (deck * hands + hand)) for hand in range(hands)]
        assert set().union(*drawn) == set(range(count)) and all(len(set(hand)) == active for hand in drawn)
        decks.append(drawn)
    assert active == count or decks[0] != decks[1]


# ---- 7, 9: the optimiser -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("built", ["before", "frozen", "outside", "after"])
def test_every_layer_that_was_drawn_has_moved(family: str, built: str) -> None:
    """For any parameters frozen when the optimiser was made: none, all layers but one, all layers, or by the schedule."""
    setup = case(family)
    before = snapshot(setup.model)
    if built == "after":
        lisa = LISA(setup.model, None, active=1, interval=1, cover=True)
        with pytest.raises(UserError, match="the optimiser is missing"):
            lisa.on_step(0)
    elif built != "before":
        for layer in setup.layers()[1 if built == "frozen" else 0 :]:
            layer.requires_grad_(False)
    trained = [p for p in setup.model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    if built == "after":
        lisa.optimizer = optimizer
    else:
        lisa = LISA(setup.model, optimizer, active=1, interval=1, cover=True)
    for step in range(DEPTH):
        train(setup, lisa, range(step, step + 1))
        rates.step()
    assert moved(setup, before) == {name for name, _ in setup.model.named_parameters()}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    assert (
        len(parameters) == len(set(parameters)) == len(list(setup.model.parameters()))
        and len(optimizer.param_groups) == 2
    )
    for group in optimizer.param_groups:  # added parameters get the weight decay of their kind
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_the_rate_is_the_global_schedule_whatever_is_active() -> None:
    rates = {}
    for active in (1, DEPTH):
        setup = case("llama")
        optimizer = adamw(setup.model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
        lisa = LISA(setup.model, optimizer, active=active, interval=2)
        rates[active] = []
        for step in range(9):
            train(setup, lisa, range(step, step + 1))
            rates[active].append(optimizer.param_groups[0]["lr"])
            schedule.step()
    assert rates[1] == rates[DEPTH] and len(set(rates[1])) == 9


# ---- 8: resuming ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
# within an interval, at a switch, within a later interval
@pytest.mark.parametrize(("cut", "optimizer_made"), [(1, "before"), (3, "before"), (7, "before"), (3, "later")])
def test_resumed_at_any_step_is_the_uninterrupted_run_bit_for_bit(policy: str, cut: int, optimizer_made: str) -> None:
    options = {"active": 2, "interval": 3, "seed": 4, "state_policy": policy}
    whole, first = case("llama"), case("llama")
    expected = train(whole, LISA(whole.model, adamw(whole.model), **options), range(9))

    def start(model: nn.Module) -> LISA:
        lisa = LISA(model, adamw(model) if optimizer_made == "before" else None, **options)
        if optimizer_made == "later":  # with the parameters that require a gradient now, not all of them
            lisa.optimizer = torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
            )
        return lisa

    started = start(first.model)
    train(first, started, range(cut))
    buffer = io.BytesIO()
    torch.save([first.model.state_dict(), started.optimizer.state_dict(), started.state_dict()], buffer)
    buffer.seek(0)
    weights, moments, settings = torch.load(buffer, weights_only=True)
    second = case("llama", seed=9)
    second.model.load_state_dict(weights)
    lisa = start(second.model)
    lisa.optimizer.load_state_dict(moments)
    lisa.load_state_dict(settings)
    assert train(second, lisa, range(cut, 9)) == expected[cut:]
    for a, b in zip(second.model.parameters(), whole.model.parameters()):
        assert torch.equal(a, b)


def test_a_checkpoint_of_another_schedule_is_refused() -> None:
    lisa = schedule(4)
    lisa.load_state_dict(lisa.state_dict())
    for count, options, message in (
        (4, {"seed": 1}, "seed is 1"),
        (5, {}, "layers is 5"),
        (4, {"interval": 9}, "interval is 9"),
    ):
        with pytest.raises(UserError, match=message):
            lisa.load_state_dict(schedule(count, **options).state_dict())


# ---- 10, 11, 12: memory --------------------------------------------------------------------------------------------------


def saved_by_layer(setup: Case, number: int = 0) -> list[int]:
    """Return the bytes that autograd saves in each layer, without parameters."""
    sizes, inside = [0] * DEPTH, [None]
    ours = {p.untyped_storage().data_ptr() for p in (*setup.model.parameters(), *setup.model.buffers())}
    hooks = []
    for layer, module in enumerate(setup.layers()):
        hooks.append(module.register_forward_pre_hook(lambda *_, layer=layer: inside.__setitem__(0, layer)))
        hooks.append(module.register_forward_hook(lambda *_: inside.__setitem__(0, None)))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if inside[0] is not None and tensor.untyped_storage().data_ptr() not in ours:
            sizes[inside[0]] += tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        setup.loss(number)
    for hook in hooks:
        hook.remove()
    return sizes


@pytest.mark.parametrize("family", FAMILIES)
def test_with_frozen_embeddings_nothing_below_the_lowest_active_layer_is_saved(family: str) -> None:
    setup = case(family)
    lisa = LISA(setup.model, adamw(setup.model), active=1, interval=1, seed=0, train_embeddings=False)
    for step in range(8):
        lisa.on_step(step)
        lowest, sizes = lisa.active_layers[0], saved_by_layer(setup)
        assert sizes[:lowest] == [0] * lowest and all(size > 0 for size in sizes[lowest:])
        for name in setup.before:
            assert not setup.model.get_parameter(name).requires_grad
        for name in setup.after:
            assert setup.model.get_parameter(name).requires_grad


@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_under_gradient_checkpointing_with_frozen_embeddings(family: str) -> None:
    plain, saving = case(family), case(family)
    if family == "vit":
        saving.model.set_grad_checkpointing(True)
    else:
        saving.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = snapshot(saving.model)
    runs = [
        train(
            setup,
            LISA(setup.model, adamw(setup.model), active=1, interval=1, cover=True, train_embeddings=False),
            range(DEPTH),
        )
        for setup in (plain, saving)
    ]
    assert runs[0] == runs[1]
    assert {name for layer in range(DEPTH) for name in saving.names(layer)} <= moved(saving, before)
    saved_bytes = [saved_activation_bytes(setup.model, lambda setup=setup: setup.loss(0)) for setup in (plain, saving)]
    assert saved_bytes[1] < saved_bytes[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_activations_grow_with_gamma_from_frozen_to_full(family: str) -> None:
    full = case(family)
    everything = saved_activation_bytes(full.model, lambda: full.loss(0))
    sizes = []
    for active in range(DEPTH + 1):
        setup = case(family)
        LISA(setup.model, adamw(setup.model), active=active)
        sizes.append(saved_activation_bytes(setup.model, lambda setup=setup: setup.loss(0)))
    assert sizes == sorted(set(sizes)) and sizes[-1] == everything and sizes[0] < 0.85 * everything
    steps = np.diff(sizes)
    assert (steps == steps[0]).all()  # each layer costs the same


def test_tied_embeddings_are_one_parameter_with_one_state() -> None:
    setup = case("gpt2")
    tied = setup.model.lm_head.weight
    assert tied is setup.model.transformer.wte.weight
    lisa = LISA(setup.model, adamw(setup.model), active=1, interval=1)
    before = tied.detach().clone()
    train(setup, lisa, range(4))
    assert setup.model.lm_head.weight is setup.model.transformer.wte.weight and not torch.equal(tied, before)
    assert sum(parameter is tied for parameter in lisa._always) == 1 and int(lisa.optimizer.state[tied]["step"]) == 4
    frozen = case("gpt2")
    LISA(frozen.model, adamw(frozen.model), active=1, train_embeddings=False)
    assert not frozen.model.lm_head.weight.requires_grad


def test_untied_head_that_is_named_like_an_embedding_stays_on_without_embeddings() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_in, self.layers = nn.Embedding(4, 2), nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
            self.embed_out = nn.Linear(2, 4)

        def get_output_embeddings(self) -> nn.Module:
            return self.embed_out

    model = Named()
    LISA(model, adamw(model), active=1, train_embeddings=False)
    assert model.embed_out.weight.requires_grad and not model.embed_in.weight.requires_grad


# ---- naming the layers, and refused settings -------------------------------------------------------------------------------


def test_layers_by_path_by_modules_by_paths_and_excluded_parts() -> None:
    setup = case("llama")
    stack = setup.model.model.layers
    for layers in (None, "model.layers", stack, list(stack), [f"model.layers.{i}" for i in range(DEPTH)]):
        lisa = LISA(setup.model, adamw(setup.model), layers=layers)
        assert lisa.state_dict()["layers"] == DEPTH
    some = LISA(setup.model, adamw(setup.model), layers=list(stack)[1:3], active=1, interval=1)
    for step in range(5):
        some.on_step(step)  # the other two layers are outside and always train
        assert all(p.requires_grad for layer in (stack[0], stack[3]) for p in layer.parameters())
        assert sum(next(layer.parameters()).requires_grad for layer in stack[1:3]) == 1
    LISA(setup.model, adamw(setup.model), exclude=["lm_head", r".*\.mlp"], active=DEPTH)
    assert not setup.model.lm_head.weight.requires_grad and not stack[2].mlp.up_proj.weight.requires_grad
    assert stack[2].self_attn.q_proj.weight.requires_grad and setup.model.model.norm.weight.requires_grad


@pytest.mark.parametrize("cover", [False, True])
def test_a_layer_that_is_left_out_whole_takes_no_turn(cover: bool) -> None:
    setup = case("llama")
    stack, excluded = setup.layers(), r"model\.layers\.(0|2)\..*"
    lisa = LISA(setup.model, adamw(setup.model), active=1, interval=1, cover=cover, exclude=excluded)
    trained_layers = []
    for step in range(8):
        lisa.on_step(step)
        live = [number for number, layer in enumerate(stack) if any(p.requires_grad for p in layer.parameters())]
        assert live == lisa.active_layers and len(live) == 1
        assert set(lisa.optimizer.state) <= {p for p in setup.model.parameters() if p.requires_grad}
        trained_layers += live
        setup.loss(step).backward()
        lisa.optimizer.step()
        lisa.optimizer.zero_grad()
    assert set(trained_layers) == {1, 3} and (
        not cover or all(len({a, b}) == 2 for a, b in zip(trained_layers[::2], trained_layers[1::2]))
    )
    with pytest.raises(UserError, match=r"active \(of 2 layers that have parameters to train\): 3; .* from 0 to 2"):
        LISA(setup.model, adamw(setup.model), active=3, exclude=excluded)


def test_a_parameter_shared_between_layers_trains_with_either() -> None:
    model = toy(3)
    model["layers"][2].weight = model["layers"][0].weight
    lisa = LISA(model, torch.optim.SGD(model.parameters(), 0.1), active=1, interval=1, cover=True)
    for step in range(6):
        lisa.on_step(step)
        active = lisa.active_layers[0]
        assert model["layers"][0].weight.requires_grad == (active in (0, 2))
        assert model["layers"][1].weight.requires_grad == (active == 1)
        assert model["layers"][2].bias.requires_grad == (active == 2)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"active": 5}, "active .*: 5; .* from 0 to 4"),
        ({"active": -1}, "active .*: -1"),
        ({"active": 1.0}, r"active .*: 1\.0"),
        ({"interval": 0}, "interval: 0; .* at least 1"),
        ({"seed": -1}, "seed: -1"),
        ({"state_policy": "drip"}, "'drip'.*'drop'"),
        ({"layers": "laiers"}, "no module 'laiers'.*'layers'"),
        ({"layers": ["layers.0", "layers.9"]}, r"'layers\.9' is not a module.*'layers\.\d'"),
        ({"layers": [nn.Linear(2, 2)]}, "a Linear is not a module"),
        ({"layers": ["layers.1", "layers.1"]}, "2 layers, 1 of them"),
        ({"layers": []}, "0 layers"),
        ({"exclude": ["heed"]}, "no module matches 'heed'"),
    ],
)
def test_impossible_settings_are_named(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        schedule(4, **options)


def test_the_method_has_the_defaults_of_the_schedule() -> None:
    of_method, of_schedule = (
        {name: given.default for name, given in signature(of).parameters.items() if given.default is not given.empty}
        for of in (lisa, LISA)
    )
    assert of_method.items() <= of_schedule.items()


def test_models_without_layers_with_two_stacks_or_quantised_are_refused() -> None:
    no_stack = nn.Sequential()
    no_stack.add_module("one", nn.Linear(2, 2))
    no_stack.add_module("two", nn.ReLU())
    two_stacks = nn.ModuleDict(
        {name: nn.ModuleList(nn.Linear(2, 2) for _ in range(2)) for name in ("encoder", "decoder")}
    )
    quantised = toy(2)
    quantised["layers"][1].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    cases = (
        (no_stack, "no list of equal"),
        (two_stacks, "'encoder' or 'decoder'"),
        (quantised, r"'layers\.1\.weight' is quantised"),
    )
    for model, message in cases:
        with pytest.raises(UserError, match=message):
            LISA(model, torch.optim.SGD([torch.zeros(1)], 0.1), active=1)
    for step in (-1, 1.5, "2"):
        with pytest.raises(UserError, match="on_step"):
            schedule(4).on_step(step)
