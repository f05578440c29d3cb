"""Tasks of dense runs: loss, metric, pictures. Importing this package does not import torchmetrics."""

from vismt.multitask.tasks.base import IGNORE as IGNORE
from vismt.multitask.tasks.base import NYUD_WEIGHTS as NYUD_WEIGHTS
from vismt.multitask.tasks.base import PASCAL_WEIGHTS as PASCAL_WEIGHTS
from vismt.multitask.tasks.base import TASKS as TASKS
from vismt.multitask.tasks.base import MapTask as MapTask
from vismt.multitask.tasks.base import Number as Number
from vismt.multitask.tasks.base import Task as Task
from vismt.multitask.tasks.base import loss_options as loss_options
from vismt.multitask.tasks.base import make_task as make_task
from vismt.multitask.tasks.base import task_options as task_options
