"""CorDA against its definition and against peft: products, balance, limits, damping, refusals."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
import torch
from helpers.language_models import LMS, relative, tiny_lm, tokens
from helpers.tiny import holds, images, shake, snapshot, tiny_vit
from torch import nn

import vismt
from vismt.base.errors import UserError
from vismt.llm import collect_covariance, save_covariances
from vismt.llm.corda import method as corda_method
from vismt.llm.corda.method import corda_factors, damped, last_left
from vismt.lowrank.layers.base import adapter_layers
from vismt.lowrank.svd import principal
from vismt.methods import METHODS, Calibration

MODES = ("ipm", "kpm")
SHAPES = [(6, 9), (9, 6), (8, 8)]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(shape: tuple[int, int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight (o, i) and a covariance (i, i) far from the identity, fp64."""
    weight = torch.randn(*shape, generator=generator(seed), dtype=torch.float64)
    rows = torch.randn(3 * shape[1], shape[1], generator=generator(seed + 1), dtype=torch.float64)
    rows = rows * torch.logspace(0, -1, shape[1], dtype=torch.float64)
    return weight, rows.T @ rows


def start(weight, covariance, rank: int, mode: str, scale: float = 1.0, **options):
    options = {"balanced": False, **options}
    return corda_factors(weight, covariance, rank, scale, smallest=mode == "kpm", generator=generator(), **options)


def published(weight, covariance, rank: int, mode: str, scale: float = 1.0):
    """Return A and B by the formulas of the paper, with an explicit inverse."""
    spread = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
    U, S, Vh = torch.linalg.svd(weight @ spread, full_matrices=False)
    V = Vh @ torch.linalg.inv(spread)
    part = slice(0, rank) if mode == "ipm" else slice(len(S) - rank, len(S))
    root = (S[part] / scale).sqrt()
    return root[:, None] * V[part], U[:, part] * root


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_raw_factors_are_the_published_ones(mode: str, shape, scale: float) -> None:
    weight, covariance = pair(shape)
    A, B = start(weight, covariance, 2, mode, scale)
    A_paper, B_paper = published(weight, covariance, 2, mode, scale)
    assert relative(B @ A, B_paper @ A_paper) < 1e-9
    assert relative(A.abs(), A_paper.abs()) < 1e-8 and relative(B.abs(), B_paper.abs()) < 1e-8  # signs are arbitrary
    cross = B.T @ B
    assert (cross - torch.diag(cross.diagonal())).abs().max() < 1e-9 * cross.max()
    assert not relative(A @ A.T, torch.diag((A @ A.T).diagonal())) < 1e-3  # the rows of A are not orthogonal
    undamped = torch.linalg.svd(weight @ covariance)[0]
    assert relative(B @ A, undamped[:, :2] @ undamped[:, :2].T @ weight) > 1e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_scale_of_the_covariance_moves_the_balance_of_raw_factors_alone(mode: str, shape) -> None:
    weight, covariance = pair(shape)
    base, scaled = start(weight, covariance, 2, mode), start(weight, 9 * covariance, 2, mode)
    assert relative(scaled[1] @ scaled[0], base[1] @ base[0]) < 1e-9
    assert relative(scaled[1].abs(), 3 * base[1].abs()) < 1e-9 and relative(scaled[0].abs(), base[0].abs() / 3) < 1e-9
    for times in (1, 9):
        A, B = start(weight, times * covariance, 2, mode, 2.0, balanced=True)
        assert relative(2 * B @ A, base[1] @ base[0]) < 1e-9
        assert relative(A @ A.T, B.T @ B) < 1e-9
        assert relative(A @ A.T, torch.diag(torch.linalg.svdvals(base[1] @ base[0])[:2] / 2)) < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_first_and_last_components_share_the_weight_out(shape) -> None:
    weight, covariance = pair(shape)
    half = min(shape) // 2
    (A1, B1), (A2, B2) = start(weight, covariance, half, "ipm"), start(weight, covariance, min(shape) - half, "kpm")
    assert relative(B1 @ A1 + B2 @ A2, weight) < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_a_white_covariance_gives_the_ends_of_the_plain_spectrum(shape) -> None:
    weight, _ = pair(shape)
    white = 5 * torch.eye(shape[1], dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    A, B = start(weight, white, 2, "ipm")
    A_pissa, B_pissa = principal(weight, 2, 1.0, generator=generator())
    assert relative(B @ A, B_pissa @ A_pissa) < 1e-9
    A, B = start(weight, white, 2, "kpm")
    assert relative(B @ A, (U[:, -2:] * S[-2:]) @ Vh[-2:]) < 1e-9
    zero = start(weight, torch.zeros_like(white), 2, "kpm")  # an input of zeros gives the plain spectrum
    assert relative(zero[1] @ zero[0], B @ A) < 1e-9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", ["exact", "randomized"])
def test_ipm_is_the_best_of_its_rank_on_the_inputs(shape, solver: str) -> None:
    weight, covariance = pair(shape)
    spread = damped(covariance)
    A, B = start(weight, covariance, 2, "ipm", solver=solver)
    error = ((weight - B @ A) @ spread).norm()
    tail = torch.linalg.svdvals(weight @ spread)[2:].norm()  # Eckart-Young: the minimum
    assert abs(error - tail) < 1e-6 * tail
    A, B = principal(weight, 2, 1.0, generator=generator())
    assert ((weight - B @ A) @ spread).norm() > 1.01 * tail


def scales(covariance: torch.Tensor, orientation: str) -> torch.Tensor:
    """Return the matrix beside the weight by its definition."""
    if orientation == "none":
        return torch.eye(len(covariance), dtype=covariance.dtype)
    if orientation == "activations":
        return torch.diag(covariance.diagonal().sqrt().sqrt())
    return covariance


@pytest.mark.parametrize("orientation", ["covariance", "activations", "none"])
def test_cut_leaves_out_the_last_components_in_the_coordinates_of_the_orientation(orientation: str) -> None:
    model, stock = nn.Sequential(nn.Linear(9, 6).double()), nn.Linear(9, 6).double()
    stock.load_state_dict(model[0].state_dict())
    _, covariance = pair((6, 9))
    options = {"mode": "cut", "orientation": orientation, "covariances": {"0": covariance}}
    vismt.adapt(model, "corda", ["0"], rank=4, alpha=8, **options)
    weight, spread = stock.weight.detach(), damped(scales(covariance, orientation))
    U, S, Vh = torch.linalg.svd(weight @ spread, full_matrices=False)
    kept = (U[:, :2] * S[:2]) @ Vh[:2] @ torch.linalg.inv(spread)
    vismt.merge(model)
    assert relative(model[0].weight, kept) < 1e-6 and torch.linalg.matrix_rank(model[0].weight, rtol=1e-6) == 2
    for other in {"covariance", "activations", "none"} - {orientation}:
        error, least = (((weight - W) @ spread).norm() for W in (truncated(weight, covariance, other), kept))
        assert error > 1.001 * least  # the best of its rank in its own coordinates alone


def truncated(weight: torch.Tensor, covariance: torch.Tensor, orientation: str) -> torch.Tensor:
    """Return the weight without all but its first two components."""
    U = torch.linalg.svd(weight @ damped(scales(covariance, orientation)))[0][:, :2]
    return U @ U.T @ weight


def test_smallest_components_of_an_ill_conditioned_product_are_exact() -> None:
    left, right = (torch.linalg.qr(torch.randn(24, 24, generator=generator(s), dtype=torch.float64)).Q for s in (1, 2))
    weight = ((left * torch.logspace(0, -3, 24, dtype=torch.float64)) @ right).float()
    rows = torch.randn(100, 24, generator=generator(3)) * torch.logspace(0, -2, 24)
    covariance = rows.T @ rows
    A, B = start(weight, covariance, 3, "kpm")
    A_paper, B_paper = published(weight.double(), covariance.double(), 3, "kpm")
    assert relative(B @ A, B_paper @ A_paper) < 1e-4


def test_damping_always_ends() -> None:
    weight, covariance = pair((6, 9))
    assert torch.equal(
        damped(covariance), covariance + 0.01 * covariance.diagonal().mean() * torch.eye(9, dtype=torch.float64)
    )
    # One token: rank 1, trace 9, mean of the diagonal 1; the damped matrix is invertible.
    singular = torch.ones(9, 9)
    assert torch.allclose(damped(singular), singular + 0.01 * torch.eye(9))
    assert torch.equal(damped(torch.zeros(9, 9)), torch.eye(9))
    # Eigenvalues 1 and -0.5 (mean of the diagonal 1/4) need d / 4 > 0.5: d = 0.01 * 2^8 = 2.56 is the first.
    assert torch.allclose(damped(torch.diag(torch.tensor([1.0, -0.5]))), torch.diag(torch.tensor([1.64, 0.14])))
    for broken, words in ((torch.full((9, 9), float("nan")), "infinite or NaN"), (-torch.eye(9), "no damping")):
        with pytest.raises(UserError, match=words):
            damped(broken)
    for mode in MODES:
        A, B = start(weight.float(), singular, 2, mode)
        assert A.isfinite().all() and B.isfinite().all() and B.abs().max() > 0


@pytest.mark.parametrize("kind", LMS)
@pytest.mark.parametrize("mode", MODES)
def test_peft_starts_at_the_same_product(kind: str, mode: str) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("attr")
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    # More tokens than the widest input, or the error of peft's fp32 inverse dominates.
    sample = {"input_ids": tokens(1, 250)}
    ours = tiny_lm(kind)
    # One sample: the divisor of peft (the signed maximum) cancels in B A.
    covariances = collect_covariance(ours, [sample])
    options = {"mode": mode, "balanced": False, "solver": "exact"}
    report = vismt.adapt(ours, "corda", rank=4, alpha=8, covariances=covariances, **options)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=[site.path for site in report.specs],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
        fan_in_fan_out=kind == "gpt2",
    )
    stock = tiny_lm(kind)
    preprocess_corda(stock, config, run_model=lambda: stock(**sample))
    theirs = dict(peft.get_peft_model(stock, config).base_model.model.named_modules())
    for path, host in adapter_layers(ours).items():
        layer = theirs[path]
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        # The tolerance covers peft's fp32 inverse and SVD; in fp64 the formulas agree to 1e-9, see above.
        assert relative(host.lora_B @ host.lora_A, product) < 5e-4, path


@pytest.mark.parametrize("kind", LMS)
@pytest.mark.parametrize("options", [{}, {"balanced": False}, {"rslora": True, "alpha": 6}, {"solver": "exact"}])
@pytest.mark.parametrize("mode", MODES)
def test_language_models_start_unchanged_and_reach_peft(kind: str, options: dict, mode: str, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    ids = tokens()
    covariances = collect_covariance(tiny_lm(kind), [{"input_ids": tokens(4, 12)}])
    model, stock = tiny_lm(kind), tiny_lm(kind)
    before = snapshot(model)
    wanted = stock(ids).logits
    vismt.adapt(model, "corda", rank=4, mode=mode, covariances=covariances, **options)
    assert (model(ids).logits - wanted).abs().max() <= 3e-6 * wanted.abs().max()
    shake(model)
    trained = model(ids).logits
    vismt.export_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(stock, str(tmp_path)).eval()
    assert (theirs(ids).logits - trained).abs().max() <= 1e-5 * trained.abs().max()
    vismt.save_adapter(model, tmp_path / "own")
    # peft cannot load a trained CorDA adapter that it saved.
    again = vismt.load_adapter(tiny_lm(kind), tmp_path / "own")
    assert torch.equal(again(ids).logits, trained)
    vismt.unadapt(model)
    assert holds(model, before)


def test_kpm_is_balanced_by_default_and_ipm_is_not() -> None:
    covariances = collect_covariance(tiny_lm("llama"), [{"input_ids": tokens(4, 12)}])

    def imbalance(**options: object) -> float:
        model = tiny_lm("llama")
        vismt.adapt(model, "corda", rank=4, covariances=covariances, **options)
        return max(float(host.lora_A.norm() / host.lora_B.norm()) for host in adapter_layers(model).values())

    assert abs(imbalance(mode="kpm") - 1) < 1e-4 and abs(imbalance(balanced=True) - 1) < 1e-4
    assert imbalance(mode="kpm", balanced=False) > 3 and abs(imbalance() - 1) > 0.1


def test_given_covariances_are_not_replaced_by_those_of_a_calibration(tmp_path) -> None:
    options = {"covariances": str(tmp_path)}
    calibration = Calibration(lambda labels=False: [{"input_ids": tokens()}], tmp_path)
    assert METHODS["corda"].calibrate(tiny_lm("llama"), calibration, targets=None, options=options) == {}


def test_processes_that_share_a_run_folder_collect_one_after_the_other(tmp_path, monkeypatch, capsys) -> None:
    """As the parts of a study do."""
    running, together, started = [], [], Event()

    def collect(*args: object, **options: object) -> dict:
        together.append(len(running))
        running.append(1)
        started.set()
        time.sleep(0.2)
        running.pop()
        return {"a": torch.eye(2)}

    monkeypatch.setattr(corda_method, "collect_covariance", collect)

    def calibrate() -> dict:
        calibration = Calibration(lambda labels=False: [{"input_ids": tokens()}], tmp_path)
        return METHODS["corda"].calibrate(tiny_lm("llama"), calibration, targets=None, options={})

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(calibrate)
        started.wait()
        both = pool.submit(calibrate).result()["covariances"], first.result()["covariances"]
    assert together == [0] and all(torch.equal(found["a"], torch.eye(2)) for found in both)
    assert "another process collects the covariances" in capsys.readouterr().out


def test_a_folder_of_covariances_and_the_variants_of_a_vit(tmp_path) -> None:
    covariances = collect_covariance(tiny_vit(), [images()], ["qkv", "proj", "head", "patch_embed.proj"])
    save_covariances(covariances, tmp_path)
    from_memory, from_folder = tiny_vit(), tiny_vit()
    options = {"targets": ["qkv", "head", "patch_embed.proj"], "rank": 4, "split_qkv": True, "mode": "kpm"}
    vismt.adapt(from_memory, "corda", covariances=covariances, **options)
    vismt.adapt(from_folder, "corda", covariances=tmp_path, **options)
    assert torch.allclose(from_memory(images()), tiny_vit()(images()), atol=1e-6)
    assert torch.equal(from_memory.blocks[0].attn.qkv.lora_B, from_folder.blocks[0].attn.qkv.lora_B)


def test_a_half_precision_base_starts_where_it_was() -> None:
    model = tiny_lm("llama").to(torch.bfloat16)
    covariances = collect_covariance(model, [{"input_ids": tokens(4, 12)}])
    assert all(value.dtype == torch.float32 for value in covariances.values())
    before = snapshot(model)
    vismt.adapt(model, "corda", rank=4, covariances=covariances)
    vismt.merge(model)
    assert holds(model, before)


def test_vanishing_components_are_reported() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False))
    with torch.no_grad():
        model[0].weight[3:] = model[0].weight[:3]  # rank 3: the last two components are zero
    covariances = {"0": pair((6, 6))[1].float()}
    with pytest.warns(UserWarning, match=r"kpm components of '0' \(1 of 1 modules\) vanish"):
        vismt.adapt(model, "corda", "0", rank=2, mode="kpm", covariances=covariances)
    assert model[0].lora_A.isfinite().all() and model[0].lora_B.isfinite().all()


NAN, EYE = torch.full((32, 32), float("nan")), torch.eye(32)


@pytest.mark.parametrize(
    "options,words",
    [
        ({}, "NoneType for 'corda'; give what vismt.llm.collect_covariance returns"),
        ({"covariances": {}}, "none for 'blocks.0.attn.qkv'"),
        ({"covariances": {"blocks.0.attn.qkv": EYE}}, "none for 'blocks.1.attn.qkv'.* Near: 'blocks.0.attn.qkv'"),
        ({"covariances": {f"blocks.{n}.attn.qkv": torch.eye(5) for n in (0, 1)}}, r"\(5, 5\), needed \(32, 32\)"),
        ({"covariances": {f"blocks.{n}.attn.qkv": NAN for n in (0, 1)}}, "infinite or NaN"),
        ({"covariances": {f"blocks.{n}.attn.qkv": EYE.cumsum(1) for n in (0, 1)}}, "not symmetric"),
        (
            {"covariances": {f"blocks.{n}.attn.qkv": -EYE if n else EYE for n in (0, 1)}},
            r"\['blocks.1.attn.qkv'\].*no damping",
        ),
        ({"mode": "kmp"}, "'kmp'.*'kpm'"),
        ({"mode": "kpm", "solver": "randomized"}, "kpm needs the smallest"),
        ({"solver": "svd"}, "no solver 'svd'"),
        ({"dropout": 0.1}, "dropout: 0.1 with 'corda'"),
    ],
)
def test_mistakes_are_one_clear_line_and_change_nothing(options: dict, words: str) -> None:
    model = tiny_vit()
    before = snapshot(model)
    with pytest.raises(UserError, match=words) as error:
        vismt.adapt(model, "corda", ["qkv"], rank=2, **options)
    assert "\n" not in str(error.value)
    assert holds(model, before) and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (12, 12)])
def test_last_left_vectors(shape: tuple[int, int]) -> None:
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    wanted = torch.linalg.svd(weight.double(), full_matrices=False)
    U, S = last_left(weight, 3)
    # The last of the min(o, i) components, not of all o directions.
    assert torch.allclose(S, wanted.S[-3:]) and torch.allclose(U @ U.T, wanted.U[:, -3:] @ wanted.U[:, -3:].T)
    U, S = last_left(torch.ones(4, 3), 2)
    assert not U.any() and S.abs().max() < 1e-7
