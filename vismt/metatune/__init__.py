"""Few-shot episodes and prototypes, AMT's attacks, pool and merging, MAML, fine-tuning, probes, and the evaluation protocol."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vismt.base.exports import exports

if TYPE_CHECKING:
    from vismt.metatune.amt.input_attack import pyramid_attack as pyramid_attack
    from vismt.metatune.amt.merging import PoolNet as PoolNet
    from vismt.metatune.amt.pool import Expert as Expert
    from vismt.metatune.amt.pool import ExpertPool as ExpertPool
    from vismt.metatune.amt.pool import assemble as assemble
    from vismt.metatune.amt.pool import read_pool as read_pool
    from vismt.metatune.amt.selection_rules import MergeSettings as MergeSettings
    from vismt.metatune.amt.selection_rules import expert_scores as expert_scores
    from vismt.metatune.amt.selection_rules import mixture_weights as mixture_weights
    from vismt.metatune.amt.weight_attack import weight_perturbation as weight_perturbation
    from vismt.metatune.finetuning.finetune import FineTuned as FineTuned
    from vismt.metatune.finetuning.finetune import finetune as finetune
    from vismt.metatune.maml import LinearLearner as LinearLearner
    from vismt.metatune.maml import MamlNet as MamlNet
    from vismt.metatune.maml import MamlObjective as MamlObjective
    from vismt.metatune.probes.linear import LogisticProbe as LogisticProbe
    from vismt.metatune.probes.linear import RidgeProbe as RidgeProbe
    from vismt.metatune.protocol.episodes import Episode as Episode
    from vismt.metatune.protocol.episodes import EpisodeSampler as EpisodeSampler
    from vismt.metatune.protocol.episodes import VariableSampler as VariableSampler
    from vismt.metatune.protocol.protocol import run_protocol as run_protocol
    from vismt.metatune.protonet import ProtoNet as ProtoNet
    from vismt.metatune.protonet import cosine_logits as cosine_logits
    from vismt.metatune.protonet import prototypes as prototypes
    from vismt.metatune.settings import HEADS as HEADS
    from vismt.metatune.settings import FineTuneSettings as FineTuneSettings
    from vismt.metatune.settings import MamlSettings as MamlSettings
    from vismt.uncertainty.intervals import mean_interval as mean_interval

__getattr__, __dir__ = exports(__name__)
