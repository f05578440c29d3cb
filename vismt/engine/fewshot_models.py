"""The models that a few-shot configuration can evaluate, by name, each made from the files of its run folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from vismt.backbones.vit import Backbone
from vismt.engine import runtime
from vismt.engine.experts import CLEAN, read_scale
from vismt.engine.fewshot_config import TUNED, FewShotConfig
from vismt.lowrank.inject import merge
from vismt.lowrank.store import fingerprint, load_adapter
from vismt.metatune.finetune import FineTuned
from vismt.metatune.labelled import digest
from vismt.metatune.merging import PoolNet
from vismt.metatune.pool import ExpertPool, read_pool
from vismt.metatune.protonet import ProtoNet


class Models:
    """Tasks of the protocol by model name, made once; frozen, in eval mode, on the process's device."""

    def __init__(self, config: FewShotConfig, folder: Path, backbone: Callable[[], Backbone]) -> None:
        self.config, self.folder, self._backbone = config, folder, backbone
        self._made: dict[str, nn.Module] = {}
        self._pool: ExpertPool | None = None

    def __getitem__(self, name: str) -> nn.Module:
        if name not in self._made:
            made = self._tuned(name.removesuffix(TUNED)) if name.endswith(TUNED) else self._make(name)
            self._made[name] = made.requires_grad_(False).eval().to(runtime.processes().device)
        return self._made[name]

    def fingerprint(self, name: str) -> str:
        """What tells this model's records from another's: base weights, adapters, and settings of merging and tuning."""
        stem = name.removesuffix(TUNED)
        model = self[stem]
        base = model.pool.backbone if isinstance(model, PoolNet) else model.backbone
        linears = [path for path, module in base.vit.named_modules() if isinstance(module, nn.Linear)]
        text = fingerprint(base.vit, linears)
        if isinstance(model, PoolNet):
            corners = [[float(part.flatten()[0]) for part in bank.parameters()] for bank in model.pool.banks]
            text = digest(f"{text} {corners} {model.pool.labels} {model.settings}".encode())
        if name != stem:
            text = digest(f"{text} {self.config.finetune}".encode())
        return f"{text}-{float(model.pool.scale if isinstance(model, PoolNet) else model.scale):.6g}"

    def pool(self) -> ExpertPool:
        """The run's own pool, or the assembled one that the configuration names."""
        if self._pool is None:
            named = self.config.pool.folder
            self._pool = ExpertPool(self._backbone(), read_pool(Path(named) if named else self.folder / "pool"))
        return self._pool

    def _make(self, name: str) -> nn.Module:
        if name in ("frozen", "adapted", CLEAN):
            proto = ProtoNet(self._backbone())
            if name != "frozen":
                folder = self.folder / "experts" / CLEAN if name == CLEAN else self.folder
                merge(load_adapter(proto.backbone.vit, folder / "adapter"))
                with torch.no_grad():
                    proto.scale.fill_(read_scale(folder))
            return proto
        strategy, _, label = name.partition(":")
        chosen = {"strategy": "merge" if strategy == "merged" else strategy, "expert": label or None}
        return PoolNet(self.pool(), replace(self.config.merging, **chosen))

    def _tuned(self, name: str) -> nn.Module:
        return FineTuned(self[name], self.config.finetune)
