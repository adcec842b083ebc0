"""Tasks: conversations for training and evaluation. One file per data set; `registry` names all."""

from nanochat_jax.tasks.base import Task, TaskMixture
from nanochat_jax.tasks.mixtures import mixture_for, offline_mixture, upstream_mixture
from nanochat_jax.tasks.registry import (
    EVAL_TASKS,
    eval_task_name,
    eval_tasks_for,
    is_reserved,
    load_eval_task,
    task_names,
)
