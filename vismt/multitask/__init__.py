"""Multi-task learning: EMTAL's routed experts, router fading and quality retaining; task balancing; dense tasks and heads."""

from vismt.multitask.balancing import Balancer, make_balancer
from vismt.multitask.experts import cluster_model, cluster_neurons, permute_experts
from vismt.multitask.fading import FadeState, RouterFade
from vismt.multitask.heads import make_head, resize_logits
from vismt.multitask.moe_lora import set_fade
from vismt.multitask.moefied import MoEfiedMlp
from vismt.multitask.retain import QualityRetaining
from vismt.multitask.retain_dense import DenseRetaining
from vismt.multitask.tasks import DenseTask, make_task

__all__ = [
    "Balancer",
    "DenseRetaining",
    "DenseTask",
    "FadeState",
    "MoEfiedMlp",
    "QualityRetaining",
    "RouterFade",
    "cluster_model",
    "cluster_neurons",
    "make_balancer",
    "make_head",
    "make_task",
    "permute_experts",
    "resize_logits",
    "set_fade",
]
