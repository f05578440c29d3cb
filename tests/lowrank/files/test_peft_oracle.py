"""peft computes the same logits from exported folders: every method with factors, on three language models and a ViT."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from helpers.amt_parts import backbone, saved
from helpers.language_models import LMS, run, stock, tiny_lm, tokens
from helpers.tiny import images, shake, tiny_vit
from torch import Tensor, nn

import vismt
from vismt.base.errors import UserError
from vismt.llm import collect_covariance, instance_gates
from vismt.lowrank import combine
from vismt.lowrank.layers.base import adapter_layers
from vismt.metatune.amt.pool import ExpertPool
from vismt.multitask.emtal.method import set_fade

peft = pytest.importorskip("peft")

KINDS = (*LMS, "vit")
HEAD = {"llama": "lm_head", "qwen2": "lm_head", "gpt2": "ln_f", "vit": "head"}  # GPT-2's head is tied
METHODS = {
    "lora": {"alpha": 6},
    "rslora": {"alpha": 5, "rslora": True},
    "pissa": {"alpha": 3},
    "amt": {"split_qkv": False},
    "corda ipm": {"mode": "ipm"},
    "corda kpm": {"mode": "kpm"},
    "polar": {"alpha": 4},
    "ilora": {"n_experts": 2, "rank": 4},
    "s2ft": {"ratio": 0.25},
    "emtal": {"n_experts": 4},
}


def trained(name: str, kind: str, **more: object) -> nn.Module:
    """Return a model with all trainable tensors changed."""
    model, method = stock(kind), "lora" if name == "rslora" else name.split()[0]
    options = {"rank": 2, **METHODS[name], **more}
    if method == "corda":
        options["covariances"] = collect_covariance(model, [images() if kind == "vit" else tokens()])
    if method == "s2ft":
        options.pop("rank")
    vismt.adapt(model, method, **options)
    if method == "emtal":
        set_fade(model, 1.0)
    return shake(model)


def read_by_peft(model: nn.Module, folder: Path) -> nn.Module:
    """Return a stock model with the folder loaded by peft; warnings about keys are errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        return peft.PeftModel.from_pretrained(model, str(folder)).eval()


CASES = [(name, kind) for name in METHODS for kind in KINDS if name != "emtal" or kind == "vit"]


@pytest.mark.parametrize("name,kind", CASES)
def test_peft_gives_the_same_logits(name: str, kind: str, tmp_path: Path) -> None:
    gates = torch.tensor([0.2, 0.8])
    with instance_gates(gates):
        model = trained(name, kind, also_train=[HEAD[kind]])
        expected, before = run(model, kind), run(stock(kind), kind)
        folders = [vismt.export_peft(model, tmp_path / str(compact), compact=compact) for compact in (False, True)]
    assert (expected - before).abs().max() > 1e-3
    scale = max(1.0, float(expected.abs().max()))
    ranks = []
    for folder in folders:
        theirs = read_by_peft(stock(kind), folder)
        assert (run(theirs, kind) - expected).abs().max() < 1e-5 * scale
        with theirs.disable_adapter():
            assert torch.equal(run(theirs, kind), before)  # the base is unchanged
        assert (run(vismt.import_peft(stock(kind), folder), kind) - expected).abs().max() < 1e-5 * scale
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["init_lora_weights"] is True and config["modules_to_save"] and not config["use_rslora"]
        assert config["task_type"] == (None if kind == "vit" else "CAUSAL_LM")
        ranks.append(config["r"])
    if name != "s2ft":
        assert ranks[0] == (4 if name.split()[0] in ("pissa", "corda", "amt", "ilora") else 2) >= ranks[1]


def test_what_is_combined_is_one_adapter_of_peft(tmp_path: Path) -> None:
    models = [trained(name, "llama") for name in ("pissa", "polar", "rslora")]
    put = combine(models, [0.5, -1.0, 2.0], "svd").put_on(stock("llama"))
    theirs = read_by_peft(stock("llama"), vismt.export_peft(put, tmp_path))
    assert (run(theirs, "llama") - run(put, "llama")).abs().max() < 1e-5
    weights = [vismt.merge(model).state_dict() for model in models]
    base = stock("llama")
    base.load_state_dict(
        {
            key: value + sum(w * (state[key] - value) for w, state in zip((0.5, -1.0, 2.0), weights))
            for key, value in stock("llama").state_dict().items()
        }
    )
    assert (run(put, "llama") - run(base, "llama")).abs().max() < 2e-5


@pytest.mark.parametrize(
    "zeta", [(0.0, 1.0, 0.0), (0.2, 0.5, 0.3), (1 / 3, 1 / 3, 1 / 3)], ids=["expert", "merged", "average"]
)
@pytest.mark.parametrize("options", [{"split_qkv": False}, {}], ids=["fused", "blocks"])
def test_a_pool_is_one_adapter_of_peft(zeta: tuple[float, ...], options: dict, tmp_path: Path) -> None:
    pool, mixture = ExpertPool(backbone(), saved(tmp_path, (3, 4, 5), **options)), torch.tensor(zeta)
    updates = pool.mixture(mixture)
    blocks = 1 if options else 3  # AMT's default splits q, k and v
    # two ranks of each expert with a weight above 0, and two of the start
    assert {update.rank for path, update in updates.low_rank.items() if "qkv" in path} == {
        blocks * 2 * (int((mixture != 0).sum()) + 1)
    }
    whole = backbone()
    whole.load_state_dict(pool.weights(mixture), strict=False)
    put = updates.put_on(backbone().vit)
    theirs = read_by_peft(backbone().vit, vismt.export_peft(put, tmp_path / "peft", compact=True))
    x = images(3, whole.img_size[0])
    with torch.no_grad():
        assert (theirs(x) - whole.vit(x)).abs().max() < 1e-5 and (put(x) - whole.vit(x)).abs().max() < 1e-5
        assert not torch.allclose(put(x), backbone().vit(x), atol=1e-4)


def test_an_expert_of_a_pool_is_an_adapter(tmp_path: Path) -> None:
    experts = saved(tmp_path, (3, 4))
    expert = vismt.load_adapter(backbone().vit, experts[1].folder)
    mixed = ExpertPool(backbone(), experts).mixture(torch.tensor([0.0, 1.0])).put_on(backbone().vit)
    x = images(3, expert.patch_embed.img_size[0])
    assert torch.allclose(expert(x), mixed(x), atol=1e-6)


# ---- further trained parameters


@pytest.mark.parametrize(
    "kind,targets,also,saved_whole,bias",
    [
        ("gpt2", None, ["wte"], ["lm_head", "transformer.wte"], "none"),  # tied: peft copies one, so both are written
        ("gpt2", ["c_attn"], ["bias"], None, "all"),
        ("gpt2", ["c_attn"], ["c_attn.bias"], None, "lora_only"),
        ("qwen2", ["q_proj"], ["q_proj.bias", "embed_tokens"], ["model.embed_tokens"], "lora_only"),
        ("llama", None, ["model.norm", "embed_tokens"], ["model.embed_tokens", "model.norm"], "none"),
        ("vit", ["qkv"], ["qkv.bias", "head"], ["head"], "lora_only"),
        ("vit", ["qkv"], ["norm1", "norm"], ["blocks.0.norm1", "blocks.1.norm1", "norm"], "none"),
    ],
)
def test_whole_modules_and_biases_go_to_peft_and_back(
    kind: str, targets, also, saved_whole, bias: str, tmp_path: Path
) -> None:
    model = stock(kind)
    vismt.adapt(model, "pissa", targets, rank=2, also_train=also)
    expected = run(shake(model), kind)
    config = json.loads((vismt.export_peft(model, tmp_path) / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["bias"]) == (saved_whole, bias)
    assert (run(read_by_peft(stock(kind), tmp_path), kind) - expected).abs().max() < 1e-5
    ours = vismt.import_peft(stock(kind), tmp_path)
    assert (run(ours, kind) - expected).abs().max() < 1e-5
    assert set(ours.vismt_record.also_train) == set(model.vismt_record.also_train)


@pytest.mark.parametrize("name", ["cls_token", "head.bias"])
def test_a_parameter_that_peft_cannot_save_is_named(name: str, tmp_path: Path) -> None:
    model = tiny_vit()
    vismt.adapt(model, "lora", ["qkv"], rank=2, also_train=[name])
    with pytest.raises(UserError, match=f"'{name}' is trained without the rest of its module"):
        vismt.export_peft(model, tmp_path)


class Towers(nn.Module):
    """A model in which a path is the suffix of another: `fc`, `inner.fc`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.ModuleDict({"fc": nn.Linear(6, 6), "gate": nn.Linear(6, 6)})
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.inner["gate"](x) + self.inner["fc"](x).relu())


@pytest.mark.parametrize("targets,clamp", [(["fc", "gate"], True), (r"fc|inner\.gate", False)])
def test_a_path_is_not_taken_for_a_suffix(targets, clamp: bool, tmp_path: Path) -> None:
    """peft would match 'fc' with 'inner.fc' too: adapt it, or give it the rank of 'fc'."""
    model, x = Towers(), torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    vismt.adapt(model, "lora", targets, rank=4 if clamp else 2, clamp_rank=clamp)
    expected = shake(model)(x)
    theirs = read_by_peft(Towers(), vismt.export_peft(model, tmp_path))
    assert torch.allclose(theirs(x), expected, atol=1e-6)
    assert sum("lora_A" in name for name, _ in theirs.named_parameters()) == len(adapter_layers(model))
    assert torch.allclose(vismt.import_peft(Towers(), tmp_path)(x), expected, atol=1e-6)


def test_whole_modules_whose_names_are_endings(tmp_path: Path) -> None:
    """When peft saves 'fc' whole, it saves 'inner.fc' as well and adapts neither."""
    model = Towers()
    vismt.adapt(model, "lora", ["gate"], rank=2, also_train=["^fc$"])
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    expected = shake(model)(x)
    assert torch.allclose(read_by_peft(Towers(), vismt.export_peft(model, tmp_path))(x), expected, atol=1e-6)
    assert torch.allclose(vismt.import_peft(Towers(), tmp_path)(x), expected, atol=1e-6)
    model = Towers()
    vismt.adapt(model, "lora", ["inner.fc"], rank=2, also_train=["^fc$"])
    with pytest.raises(UserError, match=r"peft cannot save 'fc' whole and adapt 'inner\.fc'"):
        vismt.export_peft(model, tmp_path)


def test_rates_are_lora_plus() -> None:
    """LoRA+ (arXiv 2402.12354) is another rate for B, which train.rates gives: the groups of peft's own optimiser."""
    from peft.optimizers import create_loraplus_optimizer

    from vismt.config.sections import TrainConfig
    from vismt.engine.optimizer import make_optimizer

    model = tiny_lm("llama")
    vismt.adapt(model, "lora", ["q_proj"], rank=2)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    ours = make_optimizer(trained, TrainConfig(lr=1e-3, rates={"lora_B": 16}, weight_decay=0.01))
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    theirs = peft.get_peft_model(tiny_lm("llama"), config)
    other = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)

    def rates(optimizer: torch.optim.Optimizer, named: nn.Module) -> dict[str, float]:
        of = {id(p): name.replace("base_model.model.", "").split(".default")[0] for name, p in named.named_parameters()}
        return {of[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    assert rates(ours, model) == rates(other, theirs) and set(rates(ours, model).values()) == {1e-3, 16e-3}


class Shared(nn.Module):
    """Two linears, of which one, or a block around one, is called at two places."""

    def __init__(self, block: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(8, 8)) if block else nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_a_layer_at_two_places_is_not_exported_as_peft_would_adapt_the_first_alone(tmp_path: Path) -> None:
    peft, x = pytest.importorskip("peft"), torch.rand(3, 8)
    model = Shared(block=False)
    vismt.adapt(model, "lora", rank=2)
    with pytest.raises(UserError, match="export_peft: 'first' and 'second' are one module"):
        vismt.export_peft(shake(model), tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    model = Shared(block=True)  # a block that is shared is one place
    vismt.adapt(model, "lora", rank=2)
    vismt.export_peft(shake(model), tmp_path / "block")
    theirs = peft.PeftModel.from_pretrained(Shared(block=True), str(tmp_path / "block"))
    assert torch.allclose(theirs(x), model(x), atol=1e-6)
