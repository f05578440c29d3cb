"""Few-shot episodes, cosine prototypes and the evaluation protocol."""

from vismt.metatune.episodes import Episode, EpisodeSampler, VariableSampler
from vismt.metatune.intervals import domain_average, domain_table, mean_interval, paired_bootstrap
from vismt.metatune.protocol import run_protocol
from vismt.metatune.protonet import ProtoNet, cosine_logits, prototypes

__all__ = [
    "Episode", "EpisodeSampler", "ProtoNet", "VariableSampler", "cosine_logits", "domain_average", "domain_table",
    "mean_interval", "paired_bootstrap", "prototypes", "run_protocol",
]
