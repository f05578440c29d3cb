"""The models that a few-shot configuration can evaluate, by name, each made from the files of its run folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from vismt.backbones.vit import Backbone
from vismt.data.pixels import Pixels
from vismt.engine import runtime
from vismt.errors import UserError
from vismt.jobs.fewshot.config import TUNED, FewShotConfig
from vismt.jobs.fewshot.merge_settings import Selection
from vismt.jobs.fewshot.pool_training import CLEAN, load_own, trained
from vismt.lowrank.inject import merge
from vismt.lowrank.store import fingerprint, load_adapter
from vismt.metatune.finetune import FineTuned
from vismt.metatune.maml import LinearLearner, MamlNet
from vismt.metatune.merging import MergeSettings, PoolNet
from vismt.metatune.pool import ExpertPool, read_pool
from vismt.metatune.protonet import ProtoNet
from vismt.seeds import digest


class Models:
    """Tasks of the protocol by model name and evaluated set; frozen, in eval mode, on the process's device, kept once made."""

    def __init__(
        self, config: FewShotConfig, folder: Path, backbone: Callable[[], Backbone], opened: Callable[[str], Pixels]
    ) -> None:
        self.config, self.folder, self._backbone = config, folder, backbone
        self.selection = Selection(config, folder, self.pool, opened)
        self._made: dict[str, nn.Module] = {}
        self._pool: ExpertPool | None = None

    def task(self, name: str, data: str) -> nn.Module:
        """The model called `name` as it is evaluated on the set `data`."""
        stem = name.removesuffix(TUNED)
        chosen = self.selection.settings(data) if stem == "merged" else (self.config.merging, self.config.finetune)
        key = f"{name} {chosen if stem == 'merged' else ''}"
        if key not in self._made:
            made = self._pooled(stem, chosen[0]) if self._is_pooled(stem) else self._single(stem)
            made = made if name == stem else FineTuned(made, chosen[1])
            self._made[key] = made.requires_grad_(False).eval().to(runtime.processes().device)
        return self._made[key]

    def fingerprint(self, name: str, data: str) -> str:
        """What tells this model's records from another's: base weights, adapters, and settings of merging and tuning."""
        model = self.task(name, data)
        settings = f"{model.settings}" if isinstance(model, FineTuned) else ""
        model = model.proto if isinstance(model, FineTuned) else model
        if isinstance(model, PoolNet):
            text = f"{model.pool.labels} {model.pool.scale} {model.settings} {_values(model.pool.banks.state_dict())}"
        elif isinstance(model, MamlNet):
            text = f"{model.settings} {_values(dict(model.learner.named_parameters()) | model.own_tensors())}"
        else:
            text = f"{float(model.scale):.6g}"
        vit = next(part for part in model.modules() if isinstance(part, Backbone)).vit
        linears = [path for path, module in vit.named_modules() if isinstance(module, nn.Linear)]
        return f"{fingerprint(vit, linears)}-{digest((text + settings).encode())}"

    def pool(self) -> ExpertPool:
        """The run's own pool, or the assembled one that the configuration names."""
        if self._pool is None:
            named = self.config.pool.folder
            self._pool = ExpertPool(self._backbone(), read_pool(Path(named) if named else self.folder / "pool"))
        return self._pool

    def one(self, expert: str | None) -> nn.Module:
        """The stock timm model with one update folded in: the run's adapter, or of a pool the expert called `expert`.

        "average" is the pool with equal weights. Raises UserError when a pool is not told which.
        """
        backbone = self._backbone()
        if expert == "average" and self.config.pool is not None:
            pool = self.pool()
            backbone.load_state_dict(pool.weights(pool.uniform()), strict=False)
            return backbone.vit
        return merge(load_adapter(backbone.vit, self.adapter(expert)))

    def adapter(self, expert: str | None) -> Path:
        """The folder of the run's adapter, or of the expert called `expert`; UserError when a pool is not told which."""
        if self.config.pool is None:
            if expert is not None:
                raise UserError(f"--expert {expert}: this run has no pool; leave it out.")
            return self.folder / "adapter"
        named = self.config.pool.folder
        experts = {one.label: one.folder for one in read_pool(Path(named) if named else self.folder / "pool")}
        if expert not in experts:
            why = "a pool is merged anew for every task" if expert is None else f"there is no single adapter '{expert}'"
            raise UserError(
                f"run '{self.folder}': {why}; name one with --expert: {', '.join(experts)}, or average to merge all."
            )
        return experts[expert]

    def _is_pooled(self, stem: str) -> bool:
        return self.config.pool is not None and stem not in ("frozen", CLEAN)

    def _pooled(self, stem: str, settings: MergeSettings) -> PoolNet:
        strategy, _, label = re.sub("^merged(:default)?$", "merge", stem).partition(":")
        return PoolNet(self.pool(), replace(settings, strategy=strategy, expert=label or None))

    def _single(self, stem: str) -> ProtoNet | MamlNet:
        backbone = self._backbone()
        if stem == "frozen":
            return ProtoNet(backbone)
        folder = trained(self.folder, stem)
        load_adapter(backbone.vit, folder / "adapter")
        if self.config.meta is not None:  # the inner loop moves the factors, so they are not folded in
            learner = LinearLearner(backbone, self.config.source.ways, seed=self.config.seed)
            net: ProtoNet | MamlNet = MamlNet(learner, self.config.meta)
        else:
            merge(backbone.vit)
            net = ProtoNet(backbone)
        load_own(net, folder)
        return net


def _values(tensors: Mapping[str, Tensor]) -> str:
    """A digest of every value."""
    return digest(b"".join(tensors[name].detach().cpu().float().numpy().tobytes() for name in sorted(tensors)))
