"""Few-shot episodes and prototypes, AMT's attacks, pool and merging, MAML, fine-tuning, probes, and the evaluation protocol."""

from vismt.metatune.episodes import Episode, EpisodeSampler, VariableSampler
from vismt.metatune.finetune import FineTuned, FineTuneSettings, finetune
from vismt.metatune.input_attack import pyramid_attack
from vismt.metatune.logistic_probe import LogisticProbe
from vismt.metatune.maml import LinearLearner, MamlNet, MamlObjective, MamlSettings
from vismt.metatune.merging import MergeSettings, PoolNet
from vismt.metatune.pool import Expert, ExpertPool, assemble, read_pool
from vismt.metatune.protocol import run_protocol
from vismt.metatune.protonet import ProtoNet, cosine_logits, prototypes
from vismt.metatune.ridge_probe import RidgeProbe
from vismt.metatune.selection_rules import expert_scores, mixture_weights
from vismt.metatune.weight_attack import weight_perturbation
from vismt.stats import domain_average, domain_table, mean_interval, paired_bootstrap

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
    "domain_average",
    "domain_table",
    "expert_scores",
    "finetune",
    "mean_interval",
    "mixture_weights",
    "paired_bootstrap",
    "prototypes",
    "pyramid_attack",
    "read_pool",
    "run_protocol",
    "weight_perturbation",
]
