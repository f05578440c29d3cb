"""Few-shot episodes and prototypes, AMT's attacks, pool and merging, MAML, fine-tuning, probes, and the evaluation protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vismt.base.exports import exports

if TYPE_CHECKING:
    from vismt.metatune.amt.input_attack import pyramid_attack
    from vismt.metatune.amt.merging import PoolNet
    from vismt.metatune.amt.pool import Expert, ExpertPool, assemble, read_pool
    from vismt.metatune.amt.selection_rules import MergeSettings, expert_scores, mixture_weights
    from vismt.metatune.amt.weight_attack import weight_perturbation
    from vismt.metatune.finetuning.finetune import FineTuned, FineTuneSettings, finetune
    from vismt.metatune.maml import LinearLearner, MamlNet, MamlObjective, MamlSettings
    from vismt.metatune.probes.linear import LogisticProbe, RidgeProbe
    from vismt.metatune.protocol.episodes import Episode, EpisodeSampler, VariableSampler
    from vismt.metatune.protocol.protocol import run_protocol
    from vismt.metatune.protonet import ProtoNet, cosine_logits, prototypes
    from vismt.uncertainty.intervals import mean_interval

__all__ = [
    "Episode",
    "EpisodeSampler",
    "Expert",
    "ExpertPool",
    "FineTuneSettings",
    "FineTuned",
    "LinearLearner",
    "LogisticProbe",
    "MamlNet",
    "MamlObjective",
    "MamlSettings",
    "MergeSettings",
    "PoolNet",
    "ProtoNet",
    "RidgeProbe",
    "VariableSampler",
    "assemble",
    "cosine_logits",
    "expert_scores",
    "finetune",
    "mean_interval",
    "mixture_weights",
    "prototypes",
    "pyramid_attack",
    "read_pool",
    "run_protocol",
    "weight_perturbation",
]

__getattr__, __dir__ = exports(__name__)
