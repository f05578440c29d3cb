"""Balancing: each method compared with numbers by hand, other solvers and torchjd; partial labels, state, two processes."""

import math
import sys
from importlib.util import find_spec

import pytest
import torch
from helpers.balancing_parts import CASES, TASKS, Net, batch_of, direction, matrix, problem, train, whole_batch
from helpers.ranks import HELPERS, run_two

from vismt.base.errors import UserError
from vismt.multitask.balancing import torchjd_methods
from vismt.multitask.balancing.base import BALANCERS, make_balancer
from vismt.multitask.balancing.gradients import GradientBalancer, gram_matrix

HOSTED = (
    tuple(f"torchjd:{name}" for name in ("AlignedMTL", "GeometricMean", "MGDA", "PCGrad", "Random"))
    if find_spec("torchjd")
    else ()
)
METHODS = (*BALANCERS, *HOSTED)
BY_GRADIENT = tuple(name for name in METHODS if issubclass(BALANCERS[name], GradientBalancer))
SEEDED = tuple(name for name in HOSTED if name in ("torchjd:PCGrad", "torchjd:Random"))


def make(name, **options):
    return make_balancer(name, TASKS, **options)


def alpha_of(name, gradients, values=None, tasks=None, **options):
    """Return alpha (T,) of a single call."""
    names = TASKS if tasks is None else tasks
    balancer = make_balancer(name, names, **options).double()
    direction(balancer, gradients, values)
    return balancer.alpha


def close(actual, expected, tolerance=1e-9):
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    return torch.allclose(actual, expected, rtol=tolerance, atol=tolerance)


# ---- loss weighting: numbers by hand -----------------------------------------------------------------------------------
def test_equal_weighting_sums_with_fixed_weights():
    g = matrix()
    assert close(direction(make("ew"), g), g.sum(0))
    assert close(direction(make("ew", weights={"edges": 3.0}), g), g[0] + 3 * g[1] + g[2])


def test_uncertainty_is_half_the_loss_at_the_start_and_learns_s():
    losses, parameters = problem(matrix(), [1.0, 4.0, 0.5])
    balancer = make("uncertainty", init=math.log(2)).double()
    scalar = balancer.combine(losses, parameters)
    scalar.backward()
    # exp(-log 2) / 2 = 1/4 of the losses' 5.5, and 3 log(2) / 2
    assert scalar.item() == pytest.approx(5.5 / 4 + 1.5 * math.log(2))
    # d/ds = (1 - exp(-s) L) / 2: (1 - 1/2) / 2, (1 - 2) / 2, (1 - 1/4) / 2
    assert close(balancer.log_variance.grad, [0.25, -0.5, 0.375], 1e-6)
    assert close(parameters[0].grad, matrix().sum(0)[:2] / 4, 1e-6)


def test_dwa_by_hand_over_two_windows():
    balancer, g = make("dwa", window=2, temperature=2.0), matrix()
    for values in ([1, 2, 4], [3, 2, 4], [1, 1, 4], [1, 1, 4]):  # window means 2, 2, 4 and 1, 1, 4
        assert close(direction(balancer, g, values), g.sum(0))
    direction(balancer, g, [9, 9, 9])
    e = [math.exp(0.25), math.exp(0.25), math.exp(0.5)]  # ratios 1/2, 1/2, 1, over the temperature
    assert close(balancer.alpha, [3 * x / sum(e) for x in e], 1e-6)


def test_dwa_passes_over_absent_tasks():
    balancer, g = make("dwa", window=2), matrix()
    for values, keep in (
        ([1, 2, 4], TASKS),
        ([3, 9, 4], ("depth", "normals")),
        ([1, 1, 4], ("depth",)),
        ([1, 1, 4], ("depth",)),
    ):
        direction(balancer, g, values, keep)
    assert balancer.means[1].tolist() != balancer.means[0].tolist()
    direction(balancer, g, [1, 1, 1], ("depth", "edges"))
    e = [math.exp(0.25), math.exp(0.5), math.exp(0.5)]  # depth 2 -> 1; the others lack the last window: 1
    assert close(balancer.alpha, [3 * e[0] / sum(e), 3 * e[1] / sum(e), 0.0], 1e-6)
    assert balancer.means[0].tolist() == [2.0, 2.0, 4.0]  # edges: the mean of its one call, not 2 / 2


def famo_reference(losses, after, lr, gamma, least):
    """Return the weights of each step by torch's Adam and softmax."""
    xi = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer, weights = torch.optim.Adam([xi], lr=lr, weight_decay=gamma), []
    for before, then in zip(losses, after):
        distance = before - least + 1e-8
        share = xi.softmax(0).detach() / distance
        weights.append(share / share.sum())
        gain = distance.log() - (then - least + 1e-8).log()
        xi.grad = torch.autograd.grad(xi.softmax(0), xi, gain)[0]
        optimizer.step()
    return torch.stack(weights)


@pytest.mark.parametrize("same_batch", [True, False])
def test_famo_against_torchs_adam(same_batch):
    generator, least = torch.Generator().manual_seed(0), torch.tensor([0.0, 0.1, 0.0]).double()
    losses = 0.2 + torch.rand(8, 3, generator=generator, dtype=torch.float64)
    after = 0.2 + torch.rand(8, 3, generator=generator, dtype=torch.float64) if same_batch else losses.roll(-1, 0)
    expected = famo_reference(losses, after, 0.1, 0.01, least)
    balancer = make("famo", lr=0.1, gamma=0.01, least={"edges": 0.1}).double()
    for values, then, weights in zip(losses, after, expected):
        assert close(direction(balancer, matrix(), values), weights @ matrix(), 1e-6)
        if same_batch:
            balancer.update(dict(zip(TASKS, then)))
    assert (expected[-1] - expected[0]).abs().max() > 0.05


def test_famo_turns_to_the_task_that_improves_least():
    balancer = make("famo")
    for step in range(30):
        direction(balancer, matrix(), [0.9**step, 1.0, 0.8**step])
    assert balancer.xi.argmax() == 1 and balancer.xi.argmin() == 2


def test_famo_leaves_absent_tasks_out_of_weights_and_signal():
    two, three = make_balancer("famo", TASKS[:2], gamma=0.0), make("famo", gamma=0.0)
    for step in range(5):
        values = [0.9**step, 1.0, 7.0]
        expected = direction(two, matrix()[:2], values[:2])
        assert close(direction(three, matrix(), values, TASKS[:2]), expected, 1e-6)
    assert three.xi[2] == 0 and three.alpha[2] == 0


# ---- gradient balancing: other solvers ----------------------------------------------------------------------------------------


def scaled(seed, tasks=4, size=6, spread=1.0):
    """Return gradients with lengths that differ by powers of 10."""
    return matrix(seed, tasks, size) * torch.logspace(-spread, spread, tasks, dtype=torch.float64)[:, None]


def test_mgda_of_torchjd_by_hand():
    pytest.importorskip("torchjd.aggregation")
    g = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]]).double()  # orthogonal: alpha_t ~ 1 / |g_t|^2
    settings = {"epsilon": 1e-7, "max_iters": 10000}
    assert close(alpha_of("torchjd:MGDA", g, tasks=TASKS[:2], **settings), [0.1, 0.9], 1e-6)


@pytest.mark.parametrize("c", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_cagrad_of_torchjd_against_the_primal_in_cvxpy(seed, c):
    pytest.importorskip("torchjd.aggregation")
    cp = pytest.importorskip("cvxpy")
    g = matrix(seed, 4, 5)
    mean = g.mean(0)
    d = cp.Variable(5)
    ball = cp.norm(d - mean.numpy(), 2) <= c * float(mean.norm())
    cp.Problem(cp.Maximize(cp.min(g.numpy() @ d)), [ball]).solve(solver=cp.CLARABEL)
    assert close(direction(make_balancer("torchjd:CAGrad", [*TASKS, "task3"], c=c), g), d.value, 1e-3)


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(3))
def test_nash_solves_its_equation_whatever_the_sizes(seed, spread):
    g = scaled(seed, spread=spread)
    tasks = [*TASKS, "task3"]
    alpha = alpha_of("nash", g, tasks=tasks)
    assert (alpha > 0).all() and close(alpha * (g @ g.T @ alpha), torch.ones(4), 1e-8)
    d = direction(make_balancer("nash", tasks), g)
    assert d.norm().item() == pytest.approx(2.0)  # sqrt(T)
    rescaled = g * torch.tensor([[2.0], [5.0], [0.1], [1.0]]).double()
    assert close(direction(make_balancer("nash", tasks), rescaled), d, 1e-6)


def test_nash_against_cvxpy_and_where_gradients_cancel():
    cp = pytest.importorskip("cvxpy")
    g = matrix(4)
    a = cp.Variable(3)
    cp.Problem(cp.Minimize(cp.sum_squares(g.numpy().T @ a) / 2 - cp.sum(cp.log(a)))).solve(solver=cp.CLARABEL)
    assert close(alpha_of("nash", g), a.value, 1e-4)
    opposed = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]).double()
    assert direction(make_balancer("nash", TASKS[:2]), opposed).isfinite().all()


@pytest.mark.parametrize("spread", [0.0, 2.0])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fairgrad_solves_its_equation_whatever_the_sizes(alpha, spread):
    tasks = [*TASKS, "task3"]
    for seed in range(2):
        g = scaled(seed, spread=spread)
        w = alpha_of("fairgrad", g, tasks=tasks, alpha=alpha)
        assert (w > 0).all() and close((g @ g.T @ w) * w ** (1 / alpha), torch.ones(4), 1e-7)
    if alpha == 1:
        assert close(w, alpha_of("nash", g, tasks=tasks))


def test_fairgrad_by_hand_and_where_gradients_cancel():
    g = torch.tensor([[2.0, 0, 0], [0, 0.5, 0]]).double()
    # Orthogonal: |g|^2 w = w^(-1/2), so w = |g|^(-4/3), and the decreases |g|^2 w are |g|^(2/3).
    assert close(alpha_of("fairgrad", g, tasks=TASKS[:2]), [2 ** (-4 / 3), 2 ** (4 / 3)])
    # Their ratio is 4^(2 / (1 + alpha)), 4^(2/3) here; for large alpha they become equal.
    decreases = [g @ g.T @ alpha_of("fairgrad", g, tasks=TASKS[:2], alpha=alpha) for alpha in (2.0, 10.0)]
    assert [float(d[0] / d[1]) for d in decreases] == pytest.approx([4 ** (2 / 3), 4 ** (2 / 11)])
    opposed = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]]).double()
    assert direction(make_balancer("fairgrad", TASKS[:2]), opposed).isfinite().all()


TORCHJD = {
    "fairgrad": ("FairGrad", {}, {"alpha": 2.0}, 1e-8),
    "ew": ("Sum", {}, {}, 1e-9),
    "torchjd:AlignedMTL": ("AlignedMTL", {"scale_mode": "rmse"}, {"scale_mode": "rmse"}, 1e-12),
    "torchjd:CAGrad": ("CAGrad", {"c": 0.3}, {"c": 0.3}, 1e-12),
    "torchjd:DualProj": ("DualProj", {}, {}, 1e-12),
    "torchjd:IMTLG": ("IMTLG", {}, {}, 1e-12),
    "torchjd:Krum": ("Krum", {"n_byzantine": 1}, {"n_byzantine": 1}, 1e-12),
    "torchjd:MGDA": ("MGDA", {}, {}, 1e-12),
    "torchjd:UPGrad": (
        "UPGrad",
        {"pref_vector": [1, 2, 3, 4]},
        {"pref_vector": torch.arange(1.0, 5.0).double()},
        1e-12,
    ),
}


@pytest.mark.parametrize("name", TORCHJD)
@pytest.mark.filterwarnings("ignore")
def test_against_torchjd(name):
    jd = pytest.importorskip("torchjd.aggregation")
    theirs, options, their_options, tolerance = TORCHJD[name]
    try:
        aggregate = getattr(jd, theirs)(**their_options)
    except ImportError as error:  # of an aggregator whose solver is not installed
        pytest.skip(str(error))
    g = matrix(5, 4, 6)
    expected = aggregate(g)
    actual = direction(make_balancer(name, [*TASKS, "task3"], **options), g)
    assert (actual - expected).norm() <= tolerance * expected.norm()


# ---- all methods ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", METHODS)
def test_one_task_alone_keeps_its_direction(name):
    g = matrix(0, tasks=1)
    d = direction(make_balancer(name, TASKS[:1]), g)
    assert torch.cosine_similarity(d, g[0], 0) > 1 - 1e-9


@pytest.mark.parametrize("name", METHODS)
def test_an_absent_task_is_as_if_it_were_unknown(name):
    if name == "dwa":
        pytest.skip("a softmax over all tasks: tested separately")
    g, values = matrix(2), [0.5, 2.0, 1.0]
    without = direction(make_balancer(name, TASKS[:2]), g[:2], values)
    assert close(direction(make(name), g, values, TASKS[:2]), without)
    balancer = make(name)
    parameters = problem(g)[1]
    balancer.combine({}, parameters).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in parameters)
    assert close(direction(balancer, g, values, ()), torch.zeros(7))


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_a_task_that_does_not_reach_the_parameters_is_passed_over(name):
    g, values = matrix(2), [0.5, 2.0, 1.0]
    without = direction(make_balancer(name, TASKS[:2]), g[:2], values)
    g[2] = 0
    assert close(direction(make(name), g, values), without)


@pytest.mark.parametrize("name", METHODS)
def test_eval_and_no_grad_sum_the_losses_and_move_nothing(name):
    balancer = make(name, weights={"edges": 2.0})
    direction(balancer, matrix())
    before = {key: value.clone() for key, value in balancer.state_dict().items()}
    losses, parameters = problem(matrix(), [1.0, 2.0, 3.0])
    with torch.no_grad():
        assert balancer.combine(losses, parameters).item() == 8.0
    assert balancer.eval().combine(losses, parameters).item() == 8.0
    assert all(
        torch.equal(value.nan_to_num(), before[key].nan_to_num()) for key, value in balancer.state_dict().items()
    )


@pytest.mark.parametrize("name", METHODS)
def test_state_round_trip_goes_on_as_if_never_interrupted(name):
    def steps(net, start, stop):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(start, stop):
            net(batch_of(step, 1, ("edges",) if step % 2 else ())).backward()
            optimizer.step()
            optimizer.zero_grad()

    options = {"dwa": {"window": 2}}.get(name, {})
    straight, first, second = Net(name, **options), Net(name, **options), Net(name, **options)
    steps(straight, 0, 8)
    steps(first, 0, 5)
    second.load_state_dict(first.state_dict())
    steps(second, 5, 8)
    for key, value in straight.state_dict().items():
        assert torch.equal(value.nan_to_num(), second.state_dict()[key].nan_to_num()), key


@pytest.mark.parametrize("name", SEEDED)
def test_seeded_methods_are_functions_of_seed_and_call(name):
    g = matrix(7, 3, 3)
    g -= 1.2 * g.mean(0)  # conflicts, so that the order matters
    runs = []
    for seed in (0, 0, 1):
        balancer = make(name, seed=seed)
        torch.manual_seed(seed + len(runs))
        state = torch.get_rng_state()
        runs.append(torch.stack([direction(balancer, g) for _ in range(6)]))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(runs[0], runs[1]) and not torch.allclose(runs[0], runs[2])
    assert not torch.allclose(runs[0][0], runs[0][1:].mean(0))  # the order changes from call to call


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_heads_get_the_plain_or_the_weighted_gradient(name):
    def head_gradients(**options):
        net = Net(name, **options)
        net(batch_of(0, 0)).backward()
        return [net.heads[task].weight.grad for task in TASKS], net.shared.weight.grad, net.balancer.alpha

    plain, shared, alpha = head_gradients(heads="plain")
    weighted, same_shared, _ = head_gradients(heads="weighted")
    net = Net("ew")
    net(batch_of(0, 0)).backward()
    assert (alpha - 1).abs().max() > 1e-3 and close(shared, same_shared, 1e-5)
    for task, plain_gradient, weighted_gradient, factor in zip(TASKS, plain, weighted, alpha):
        assert close(plain_gradient, net.heads[task].weight.grad, 1e-6)
        assert close(weighted_gradient, factor * plain_gradient, 1e-5)
    assert make(name).heads == ("weighted" if name == "nash" else "plain")


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_the_graph_of_the_losses_is_kept_unless_it_is_given_up(name):
    found = []
    for retain in (True, False):
        losses, parameters = problem(matrix())
        make(name).combine(losses, parameters, retain_graph=retain).backward()
        found.append(torch.cat([p.grad.flatten() for p in parameters]))
        if retain:
            losses[TASKS[-1]].backward()
        else:
            with pytest.raises(RuntimeError, match="second time"):
                losses[TASKS[-1]].backward()
    assert torch.equal(*found)


@pytest.mark.parametrize("name", BY_GRADIENT)
def test_gradients_that_are_not_finite_end_in_a_gradient_that_is_not(name):
    g = matrix()
    g[1, 0] = torch.inf
    balancer = make(name)
    before = {key: value.clone() for key, value in balancer.state_dict().items() if key != "calls"}
    assert not direction(balancer, g).isfinite().all()
    assert all(torch.equal(balancer.state_dict()[key], value) for key, value in before.items())


def test_loss_scale_saves_small_gradients_in_half_precision():
    right = alpha_of("fairgrad", matrix().half().double() * 1e-6).float()
    errors = []
    for loss_scale in (1.0, 2.0**12):
        losses, parameters = problem(matrix().half())
        balancer = make("fairgrad", loss_scale=loss_scale)
        # Gradients of 1e-6 have four bits in float16.
        balancer.combine({name: loss * 1e-6 for name, loss in losses.items()}, parameters)
        errors.append(((balancer.alpha - right) / right).abs().max().item())
    assert errors[1] < 1e-3 < errors[0]


def test_autocast_of_the_caller_does_not_round_the_balance():
    net, reference = Net("fairgrad").float(), Net("fairgrad").float()
    batch = batch_of(0, 0)
    batch = (batch[0].float(), {task: y.float() for task, y in batch[1].items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scalar = net(batch)
    scalar.backward()
    reference(batch).backward()
    assert scalar.dtype == torch.float32
    assert torch.allclose(net.shared.weight.grad, reference.shared.weight.grad, rtol=0.1, atol=0.02)


def test_gram_of_wide_gradients_in_parts_is_exact(monkeypatch):
    monkeypatch.setattr("vismt.multitask.balancing.gradients.COLUMNS_AT_ONCE", 4)
    g = matrix(0, 3, 11, dtype=torch.float32)
    gram = gram_matrix(g)
    assert torch.equal(gram.float(), (g.double() @ g.double().T).float()) and gram.dtype == torch.float64


def test_parameters_of_the_balancer_are_never_balanced():
    losses, parameters = problem(matrix(), [1.0, 2.0, 3.0])
    balancer = make("uncertainty").double()
    balancer.combine(losses, [*parameters, *balancer.parameters()]).backward()
    assert close(balancer.log_variance.grad, [0.0, -0.5, -1.0])
    assert close(parameters[0].grad, matrix().sum(0)[:2] / 2)
    assert balancer.balanced([*parameters, *balancer.parameters()]) == parameters


def test_last_alpha_by_name():
    balancer = make("ew", weights={"edges": 2.0})
    direction(balancer, matrix(), keep=TASKS[:2])
    assert {task: value.item() for task, value in balancer.last_alpha().items()} == {
        "depth": 1,
        "edges": 1,
        "normals": 0,
    }


# ---- errors --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fairgrd", {}, "no method 'fairgrd'. Near: 'fairgrad'"),
        ("pcgrad", {}, "no method 'pcgrad'. Give torchjd:PCGrad"),
        ("fairgrad", {"alfa": 1}, "'fairgrad' has no option 'alfa'. Near: 'alpha'"),
        ("ew", {"heads": "plain"}, "'ew' has no option 'heads'"),
        ("nash", {"heads": "plan"}, "balancing.heads: 'plan'. Near: 'plain'"),
        ("nash", {"loss_scale": 0.0}, "balancing.loss_scale: 0.0"),
        ("dwa", {"temperature": 0.0}, "balancing.temperature: 0.0"),
        ("dwa", {"window": 0}, "balancing.window: 0"),
        ("uncertainty", {"init": math.inf}, "balancing.init: inf"),
        ("fairgrad", {"alpha": 0.0}, "balancing.alpha: 0.0"),
        ("fairgrad", {"alpha": 11.0}, "balancing.alpha: 11.0"),
        ("famo", {"lr": 0.0}, "balancing.lr: 0.0"),
        ("famo", {"gamma": -1.0}, "balancing.gamma: -1.0"),
        ("famo", {"least": {"edge": 0.0}}, "balancing.least: no task 'edge'. Near: 'edges'"),
        ("ew", {"weights": {"edge": 1.0}}, "balancing.weights: no task 'edge'. Near: 'edges'"),
        ("ew", {"weights": {"edges": 0.0}}, "balancing.weights.edges: 0.0"),
    ],
)
def test_errors_of_names_and_options(name, options, message):
    with pytest.raises(UserError) as caught:
        make(name, **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_errors_of_tasks_losses_and_parameters():
    for tasks in ((), ("a", "a"), "depth"):
        with pytest.raises(UserError, match="need one or more different names"):
            make_balancer("ew", tasks)
    balancer, (losses, parameters) = make("ew"), problem(matrix())
    with pytest.raises(UserError, match=r"no task 'dept'. Near: 'depth'"):
        balancer.combine({"dept": losses["depth"]}, parameters)
    with pytest.raises(UserError, match=r"the loss of 'depth' has shape \(2,\)"):
        balancer.combine({"depth": losses["depth"].expand(2)}, parameters)
    with pytest.raises(UserError, match="the loss of 'depth' has no graph"):
        balancer.combine({"depth": torch.tensor(1.0)}, parameters)
    with pytest.raises(UserError, match="none of the parameters to balance is trainable"):
        balancer.combine(losses, [p.detach() for p in parameters])
    with pytest.raises(UserError, match="'famo' takes logarithms of losses, and the loss of 'edges' is -2"):
        direction(make("famo"), matrix(), [1.0, -2.0, 1.0])
    assert set(BALANCERS["fairgrad"].options()) == {"weights", "heads", "loss_scale", "alpha"}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("UpGrad", {}, "balancing: torchjd has no method 'UpGrad'. Near: 'UPGrad'"),
        ("GradVac", {}, "torchjd has no method 'GradVac'"),  # it has state, which no checkpoint would hold
        ("ConFIG", {}, "torchjd has no method 'ConFIG'"),  # no weighted sum of the gradients
        ("CAGrad", {"cc": 1}, "balancing: 'torchjd:CAGrad' has no option 'cc'. Near: 'c'"),
        ("CAGrad", {}, "balancing: 'torchjd:CAGrad': CAGrad.__init__() missing 1 required positional argument: 'c'"),
        ("Krum", {"n_byzantine": -1}, "balancing: 'torchjd:Krum': n_byzantine must be non-negative"),
        ("Mean", {"heads": "plain"}, "'torchjd:Mean' has no option 'heads'"),
        ("IMTLG", {"heads": "plan"}, "balancing.heads: 'plan'. Near: 'plain'"),
        ("Random", {"seed": -1}, "balancing.seed: -1"),
    ],
)
def test_errors_of_methods_of_torchjd(name, options, message):
    pytest.importorskip("torchjd.scalarization")
    with pytest.raises(UserError) as caught:
        make(f"torchjd:{name}", **options)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_torchjd_objects_to_a_batch_with_one_line():
    pytest.importorskip("torchjd.scalarization")
    with pytest.raises(UserError, match="balancing: 'torchjd:Krum': "):
        direction(make("torchjd:Krum", n_byzantine=1), matrix(), keep=TASKS[:2])
    with pytest.raises(UserError, match="balancing: 'torchjd:GeometricMean': GeometricMean is only defined for"):
        direction(make("torchjd:GeometricMean"), matrix(), [1.0, -2.0, 1.0])


def test_scalarizers_of_torchjd_weigh_losses():
    pytest.importorskip("torchjd.scalarization")
    g = matrix()
    assert close(alpha_of("torchjd:GeometricMean", g, [1.0, 4.0, 2.0]), [2 / 3, 2 / 12, 2 / 6])  # (1 * 4 * 2)^(1/3) = 2
    balancer = make("torchjd:GeometricMean")
    direction(balancer, g, [1.0, 4.0, 2.0], ("depth", "edges"))
    assert close(balancer.alpha, [2 / 2, 2 / 8, 0.0], 1e-6)  # (1 * 4)^(1/2) = 2
    assert alpha_of("torchjd:Random", g, seed=5).sum().item() == pytest.approx(1)


def test_without_torchjd_its_methods_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    torchjd_methods.host_balancer.cache_clear()
    with pytest.raises(UserError, match=r'need torchjd 0.18 \(.*\): pip install "vismt\[torchjd\]"'):
        make("torchjd:UPGrad")


# ---- several processes ---------------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_two_processes_are_one_on_the_concatenated_batch(tmp_path):
    run_two(HELPERS / "balancing_parts.py", tmp_path, ",".join(METHODS))
    for method in METHODS:
        for lacking, accumulate in CASES:
            net = Net(method)
            alone = train(net, net, lambda step, lacking=lacking: whole_batch(step, lacking), accumulate)
            both = [torch.load(tmp_path / f"{method}-{len(lacking)}-{accumulate}-{rank}.pt") for rank in range(2)]
            for name, value in alone.items():
                assert torch.equal(both[0][name].nan_to_num(), both[1][name].nan_to_num()), (method, name)
                fits = torch.allclose(both[0][name], value, rtol=1e-5, atol=1e-6, equal_nan=True)
                assert fits, (method, lacking, accumulate, name)
