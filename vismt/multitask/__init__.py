"""Multi-task learning: EMTAL's routed experts and quality retaining; features of each task; balancing; dense tasks and heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vismt.base.exports import exports

if TYPE_CHECKING:
    from vismt.multitask import metrics
    from vismt.multitask.balancing.base import Balancer, make_balancer
    from vismt.multitask.emtal.clusters import cluster_model, cluster_neurons
    from vismt.multitask.emtal.fading import FadeState, RouterFade
    from vismt.multitask.emtal.ffn import MoEfiedMlp
    from vismt.multitask.emtal.method import set_fade
    from vismt.multitask.emtal.retain import DenseRetaining, QualityRetaining
    from vismt.multitask.heads import make_head, resize_logits
    from vismt.multitask.mtlora.method import merge_shared
    from vismt.multitask.streams import task_features
    from vismt.multitask.tasks import DenseTask, Task, make_task

__all__ = [
    "Balancer",
    "DenseRetaining",
    "DenseTask",
    "FadeState",
    "MoEfiedMlp",
    "QualityRetaining",
    "RouterFade",
    "Task",
    "cluster_model",
    "cluster_neurons",
    "make_balancer",
    "make_head",
    "make_task",
    "merge_shared",
    "metrics",
    "resize_logits",
    "set_fade",
    "task_features",
]

__getattr__, __dir__ = exports(__name__)
