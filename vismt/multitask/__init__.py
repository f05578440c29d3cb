"""Multi-task learning: EMTAL's routed experts and quality retaining, features of each task, balancing, dense tasks and heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vismt.base.exports import exports

if TYPE_CHECKING:
    from vismt.multitask import metrics as metrics
    from vismt.multitask.balancing.base import Balancer as Balancer
    from vismt.multitask.balancing.base import make_balancer as make_balancer
    from vismt.multitask.emtal.clusters import cluster_model as cluster_model
    from vismt.multitask.emtal.clusters import cluster_neurons as cluster_neurons
    from vismt.multitask.emtal.fading import FadeState as FadeState
    from vismt.multitask.emtal.fading import RouterFade as RouterFade
    from vismt.multitask.emtal.ffn import MoEfiedMlp as MoEfiedMlp
    from vismt.multitask.emtal.method import set_fade as set_fade
    from vismt.multitask.emtal.retain import QualityRetaining as QualityRetaining
    from vismt.multitask.heads import make_map_head as make_map_head
    from vismt.multitask.heads import resize_logits as resize_logits
    from vismt.multitask.mtlora.method import merge_shared as merge_shared
    from vismt.multitask.streams import task_features as task_features
    from vismt.multitask.tasks import Task as Task
    from vismt.multitask.tasks import make_task as make_task

__getattr__, __dir__ = exports(__name__)
