"""The models that a few-shot configuration can evaluate, each built from the trainings of one seed, and experts in folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vismt.backbones.vit import PixelBackbone
from vismt.base.errors import UserError
from vismt.base.identity import Identity, weights_digest
from vismt.base.seeds import digest
from vismt.config.sections import RESOLVED
from vismt.config.yaml_text import read_yaml
from vismt.engine import runtime, training_files
from vismt.engine.study import ALONE, ARMS, CHOSEN, FROZEN, Study, Training, chosen_trainings
from vismt.engine.training_files import ADAPTER, DONE, check_files
from vismt.jobs.fewshot.arms import split_head, strategy_of, untrained_arms
from vismt.jobs.fewshot.config import CLEAN_EXPERT, EXPERT, MERGED, FewShotConfig
from vismt.jobs.fewshot.data import FewShotData
from vismt.lowrank.files.description import DESCRIPTION, check_tensors
from vismt.lowrank.model.merge import merge
from vismt.metatune.amt.merging import PoolNet
from vismt.metatune.amt.pool import POOL_FILE, Expert, ExpertPool, read_pool
from vismt.metatune.amt.selection_rules import MergeSettings
from vismt.metatune.finetuning.finetune import FineTuned
from vismt.metatune.maml import LinearLearner, MamlNet
from vismt.metatune.probes.linear import LinearProbe
from vismt.metatune.protocol.episode_runner import FewShotModel
from vismt.metatune.protonet import ProtoNet
from vismt.metatune.settings import HEADS, FineTuneSettings
from vismt.storage.files import read_sealed, read_tensors

SELECTION = "selection.json"  # in the folder of a pool, by scripts/merge_settings.py
# Entries of this file: the settings, and in them the identity of the experts.
SELECTED_SETTINGS, SELECTED_FOR = "all", ":pool"
OWN_FILE = "classifier.safetensors"  # the classifier's trained tensors besides the adapter
EvaluatedModel = ProtoNet | MamlNet | PoolNet | FineTuned | LinearProbe


def make_net(backbone: PixelBackbone, config: FewShotConfig) -> ProtoNet | MamlNet:
    """Return the classifier of episodes on a backbone. An inner loop updates the parameters that are trainable now."""
    if config.meta is None:
        return ProtoNet(backbone, config.source.scale)
    return MamlNet(LinearLearner(backbone, config.source.ways, seed=config.seed), config.meta)


class Models:
    """Evaluated models by name: frozen, in eval mode, on the device of the process, built once.

    seed: Seed of the trainings from which the models are built.
    """

    def __init__(self, data: FewShotData, study: Study[FewShotConfig], seed: int) -> None:
        self.data = data
        self.config = data.config
        self.study = study
        self.seed = seed
        self.pool_folder = study.folder / "pool" / f"seed-{seed}"
        self._models: dict[str, EvaluatedModel] = {}
        self._pool: ExpertPool | None = None

    def task(self, name: str) -> EvaluatedModel:
        """Return the model `name`."""
        stem, head = split_head(name)
        chosen = self.chosen_settings() if stem == MERGED else (MergeSettings(), self.config.finetune)
        if name not in self._models:
            model: EvaluatedModel
            if head:
                net = self.task(stem)
                options = self.config.head.options if head == self.config.head.name else {}
                kind = HEADS[head]
                model = FineTuned(net, chosen[1]) if kind is FineTuned else kind(net, **options)
            elif self.config.pool is None or stem in (FROZEN, CLEAN_EXPERT, *self.config.arms):
                model = self._single(stem)
            else:
                expert = stem.removeprefix(EXPERT) if stem.startswith(EXPERT) else None
                strategy = strategy_of(self.config, stem)
                model = PoolNet(self.pool(), replace(chosen[0], strategy=strategy, expert=expert))
            self._models[name] = model.requires_grad_(False).eval().to(runtime.processes().device)
        return self._models[name]

    def fingerprint(self, name: str) -> str:
        """Return the fingerprint of the model `name` with its settings."""
        return self.fingerprint_of(self.task(name))

    def fingerprint_of(self, model: EvaluatedModel) -> str:
        """Return a digest of base weights, adapters, and settings of merging and fine-tuning."""
        text = _describe(model)
        vit = next(part for part in model.modules() if isinstance(part, PixelBackbone)).vit
        return f"{weights_digest(vit)}-{digest(text.encode())}"

    def pool(self) -> ExpertPool:
        """Return the assembled pool that the configuration names, or else the pool of the seed's trainings."""
        if self._pool is None:
            assembled = self.config.pool.folder if self.config.pool is not None else None
            self._pool = ExpertPool(self.data.backbone(), read_pool(Path(assembled) if assembled else self.pool_folder))
        return self._pool

    def chosen_settings(self) -> tuple[MergeSettings, FineTuneSettings]:
        """Return the settings of the model "merged". Raises UserError for settings that were chosen for other experts."""
        path, what = self.pool_folder / SELECTION, f"run '{self.pool_folder}'"
        saved = read_sealed(path, what).get(SELECTED_SETTINGS) if path.exists() else None
        if saved is None:
            return MergeSettings(), self.config.finetune
        if saved.get(SELECTED_FOR) != str(self.pool().identity()):
            raise UserError(f"{what}: {SELECTION} was chosen for other experts; delete it, or choose again.")
        return MergeSettings(**saved["merging"]), replace(self.config.finetune, lr=saved["lr"])

    def trained(self, training: Training, *, merged: bool) -> ProtoNet | MamlNet:
        """Return a trained classifier, merged on request, but for a classifier with an inner loop, which updates factors."""
        backbone, config = self.data.backbone(), self.study.arms[training.arm]
        what = training_files.restore(backbone.vit, training)
        if merged and config.meta is None:
            merge(backbone.vit)
        net = make_net(backbone, config)
        what = f"{what}: {OWN_FILE}"
        net.load_own_tensors(read_tensors(training.folder / OWN_FILE, what)[1], what)
        return net

    def _single(self, stem: str) -> ProtoNet | MamlNet:
        if stem == FROZEN or stem in untrained_arms(self.study.config):
            return make_net(self.data.backbone(), replace(self.config, meta=None))
        arm = stem if stem in self.study.arms else ALONE
        if arm not in self.study.arms:
            raise UserError(f"run '{self.study.folder}': nothing was trained for the model '{stem}'.")
        training = next(training for training in self.study.trainings(arm) if training.seed == self.seed)
        return self.trained(training, merged=True)


def _describe(model: FewShotModel) -> str:
    """Return a text of everything that a model adds to the weights of its ViT."""
    if isinstance(model, FineTuned):
        return f"{_describe(model.proto)}{model.settings}"
    if isinstance(model, LinearProbe):
        return f"{_describe(model.proto)}{model.describe()}"
    if isinstance(model, PoolNet):
        pool = model.pool
        return f"{pool.labels} {pool.scale} {model.settings} {pool.identity()}"
    if isinstance(model, MamlNet):
        return f"{model.settings} {weights_digest(model.learner)} {Identity(sorted(model.own_tensors().items()))}"
    if isinstance(model, ProtoNet):
        return f"{float(model.scale):.6g}"
    raise UserError(
        f"head: {type(model).__name__} is not a vismt.metatune.probes.linear.LinearProbe; derive it from this class."
    )


def read_scale(folder: Path) -> float:
    """Return the scale of the cosine classifier that was trained with an adapter."""
    check_files(folder)
    tensors = read_tensors(folder / OWN_FILE, f"run '{folder}'")[1]
    check_tensors(f"run '{folder}': {OWN_FILE}", {"scale": ()}, tensors)
    return float(tensors["scale"])


def find_experts(folder: Path) -> list[Expert]:
    """Return the trained experts in a run folder (its lowest seed), a pool folder, a training's folder or an adapter folder."""
    if (folder / POOL_FILE).exists():
        return read_pool(folder)
    arms = sorted(path.parent for path in (folder / ARMS).glob(f"*/{CHOSEN}"))
    pooled = {expert.label for index in folder.glob(f"pool/*/{POOL_FILE}") for expert in read_pool(index.parent)}
    resolved = read_yaml(folder / RESOLVED, f"run '{folder}'") if (folder / RESOLVED).is_file() else {}
    # Trainings beside a pool do not join it.
    beside = {CLEAN_EXPERT, *resolved.get("arms", {})} if resolved.get("pool", {}) is not None else set()
    experts = []
    for arm in arms:
        if arm.name in beside - pooled:
            continue
        finished = {seed: path for seed, path in chosen_trainings(folder, arm.name).items() if (path / DONE).exists()}
        if finished:
            training = finished[min(finished)]
            label = folder.name if arm.name == ALONE else arm.name
            experts.append(Expert(label, training / ADAPTER, read_scale(training)))
    if experts:
        return experts
    adapter = folder if (folder / DESCRIPTION).exists() else folder / ADAPTER
    if (adapter / DESCRIPTION).exists():
        training = adapter.parent
        label = training.name if adapter.name == ADAPTER else adapter.name
        if adapter.name == ADAPTER and training.parent.parent.name == ARMS:
            label = training.parent.name
        trained = adapter != folder or (training / OWN_FILE).exists()
        return [Expert(label, adapter, read_scale(training) if trained else 10.0)]
    raise UserError(f"pool: '{folder}' holds no trained expert; give run folders, adapter folders or pools.")
