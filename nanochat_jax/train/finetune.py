"""Finetuning: continue training an earlier stage's model on conversations.

`Stage` describes midtraining and SFT (stages.py). RL shares the optimizer.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nanochat_jax.checkpoint import Loaded, find_model, load_model, load_optimizer, lock_tag
from nanochat_jax.data.mixture import ConversationLoader
from nanochat_jax.devices import start
from nanochat_jax.eval.bpb import held_out_evaluation
from nanochat_jax.files import make_directory
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.sharding import (
    abstract_tree,
    data_share,
    make_mesh,
    mesh_text,
    optimizer_shardings,
)
from nanochat_jax.model.weights import Params
from nanochat_jax.paths import Paths
from nanochat_jax.tasks.base import Task
from nanochat_jax.tasks.mixtures import Split
from nanochat_jax.train.config import ContinueConfig, FinetuneConfig
from nanochat_jax.train.job import Evaluation, Job, LoaderSource
from nanochat_jax.train.loop import train
from nanochat_jax.train.muon import MuonState
from nanochat_jax.train.optim import (
    OptimizerConfig,
    Schedule,
    Schedules,
    constant,
    linear_momentum,
    make_optimizer,
)
from nanochat_jax.train.reporting import log_training
from nanochat_jax.train.setup import Run, set_up
from nanochat_jax.train.step import saved_form, stored_form

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One finetuning stage: its flags, and how it differs from others.

    Attributes:
      section: section of the report.
      source, target: the stage whose model is loaded, and where the result is saved.
      step_rows: rows per step without a batch size; None: the base run's tokens per step.
      mixture: from (corpus, split, paths).
      lr_schedule: from the number of steps.
      classic_momentum: Muon's momentum for `classic`; `modern` has the same in all stages.
      eval_steps: batches per evaluation; None: from `eval_tokens`.
      evaluations: additional ones, from the model, rows per micro-batch and `Compute`.
    """

    config: FinetuneConfig
    name: str
    section: str
    source: str
    target: str
    mode: str
    primary: str
    num_epochs: int
    step_rows: int | None
    mixture: Callable[[str | None, Split, Paths], Task]
    lr_schedule: Callable[[int], Schedule]
    classic_momentum: Schedule = linear_momentum(300, 0.85, 0.95)
    eval_steps: int | None = None
    evaluations: Callable[..., list[Evaluation]] = lambda *_: []


def load_source(config: ContinueConfig, paths: Paths, source: str, mesh: Mesh) -> Loaded:
    """The model of stage `source` that this stage continues."""
    return load_model(
        paths, source, tag=config.model_tag, step=config.step, mesh=mesh, fsdp=bool(config.fsdp)
    )


def continued_job(
    config: ContinueConfig,
    paths: Paths,
    loaded: Loaded,
    target: str,
    *,
    metadata: dict[str, Any],
    **fields: Any,
) -> Job:
    """The job of a stage that continues `loaded` and saves to `target`; `fields`: other fields."""
    common = {
        "tokenizer": loaded.tokenizer.fingerprint(),
        "data": loaded.meta["data"],
        "rates": loaded.meta["rates"],
        "from": [loaded.source, loaded.tag, loaded.step],
    }
    return Job(
        config=config,
        model=loaded.config,
        directory=paths.checkpoints(target) / loaded.tag,
        logs=paths.logs(target) / loaded.tag,
        metadata=metadata | common,
        tokenizer=loaded.tokenizer,
        origin=loaded,
        **fields,
    )


def continued_optimizer(
    config: ContinueConfig, loaded: Loaded, schedules: Schedules, compute: Compute
) -> optax.GradientTransformation:
    """The optimizer, with the base run's learning rates unless `config` sets them."""
    changed: dict[str, Any] = {
        name: value
        for name in ("embedding_lr", "unembedding_lr", "matrix_lr")
        if (value := getattr(config, name)) is not None
    }
    rates = OptimizerConfig(
        **(loaded.meta["rates"] | changed | {"weight_decay": config.weight_decay, "grad_clip": 0.0})
    )
    multiplier = schedules.lr_multiplier
    cautious = loaded.config.arch == "modern" and config.weight_decay
    schedules = dataclasses.replace(
        schedules,
        lr_multiplier=lambda step: config.init_lr_frac * multiplier(step),
        weight_decay=constant(config.weight_decay) if cautious else None,
    )
    return make_optimizer(loaded.config, rates, schedules, compute)


def warm_optimizer(
    loaded: Loaded,
    optimizer: optax.GradientTransformation,
    params: Params,
    shardings: Any,
    mesh: Mesh,
) -> Any:
    """The optimizer state saved with `loaded`, with the schedules' step counts reset to 0.

    Adam's own count stays: its moments have accumulated over that many steps.
    """
    # If pretraining clips gradients, clipping is first in its chain; it is dropped here.
    clipped = loaded.source == "base" and loaded.meta["rates"]["grad_clip"] > 0
    saved = optax.chain(optax.clip_by_global_norm(1.0), optimizer) if clipped else optimizer
    abstract = jax.eval_shape(saved.init, params)
    placed = abstract_tree(abstract, optimizer_shardings(abstract, params, shardings, mesh))
    state = stored_form(load_optimizer(loaded, saved_form(placed)), abstract)
    scheduled = (MuonState, optax.ScaleByScheduleState)
    return jax.tree.map(
        lambda node: (
            node._replace(count=jnp.zeros_like(node.count)) if isinstance(node, scheduled) else node
        ),
        state[1] if clipped else state,
        is_leaf=lambda node: isinstance(node, scheduled),
    )


def finetune(stage: Stage) -> None:
    """Train the newest model of `stage.source` on the stage's mixture and save the result."""
    paths, config = Paths.from_env(), stage.config
    start(paths, config, compile_cache=config.compile_cache)
    # A mixture named in the config needs no model: report typos in it before loading one.
    named = stage.mixture(None, "train", paths) if config.mixture else None
    if config.dry_run:
        return _finetune(stage, paths, named)
    make_directory(paths.report)
    tag = find_model(paths, stage.source, config.model_tag).name
    with lock_tag(paths.checkpoints(stage.target) / tag):
        _finetune(stage, paths, named)


def _finetune(stage: Stage, paths: Paths, named: Task | None) -> None:
    config, mesh = stage.config, make_mesh(stage.config.mesh)
    loaded = load_source(config, paths, stage.source, mesh)
    data = loaded.meta["data"]
    mixture = stage.mixture(data, "train", paths) if named is None else named
    tokens, length = _batch(stage, loaded)
    loader = functools.partial(
        ConversationLoader, tokenizer=loaded.tokenizer, sequence_len=length, mode=stage.mode
    )
    index, count = data_share(mesh)
    batches = loader(
        mixture, batch_size=max(1, tokens // length), process_index=index, process_count=count
    )
    num_steps = _num_steps(stage, batches)
    multiplier = stage.lr_schedule(num_steps)
    run = _set_up(stage, loaded, mesh, multiplier, (tokens, length))
    assert run.shape is not None
    loaded = dataclasses.replace(loaded, params=run.state.params)
    log.info(
        f"{stage.name}: {len(mixture)} conversations, {num_steps} steps of {run.shape.tokens:,} "
        f"tokens, mesh {mesh_text(mesh)}, {run.compute.dtype}"
    )
    rows = run.shape.micro_rows
    validation = loader(stage.mixture(data, "val", paths), batch_size=rows, name="validation")
    evaluations = [
        Evaluation(config.eval_every, _held_out(stage, loaded, validation, run)),
        *stage.evaluations(loaded, rows, run.compute),
    ]
    job = continued_job(
        config,
        paths,
        loaded,
        stage.target,
        name=stage.name,
        num_steps=num_steps,
        shape=run.shape,
        lr_multiplier=multiplier,
        primary=stage.primary,
        evaluations=evaluations,
        metadata={"total_batch_size": run.shape.tokens},
        dry_run=config.dry_run,
    )
    source = LoaderSource(batches, run.shape, mesh)
    outcome = train(job, run.state, run.shardings, run.step_fn, source)
    results = {
        "training_rows": len(mixture),
        "num_iterations": num_steps,
        "training_tokens": num_steps * run.shape.tokens,
        "train_loss": outcome.train_loss,
        **outcome.last,
        f"min_{stage.primary}": outcome.minimum,
        "tokens_per_sec": outcome.tokens_per_sec,
        "training_seconds": outcome.seconds,
    }
    log_training(job, paths, stage.section, results)


def _batch(stage: Stage, loaded: Loaded) -> tuple[int, int]:
    """(tokens per step, tokens per row)."""
    config = stage.config
    length = config.max_seq_len or loaded.config.sequence_len
    if config.total_batch_size > 0:
        return config.total_batch_size, length
    rows = stage.step_rows
    return (rows * length if rows else loaded.meta["total_batch_size"]), length


def _num_steps(stage: Stage, batches: ConversationLoader) -> int:
    """Number of steps. Logs how many conversations are cut or skipped."""
    steps = stage.config.num_iterations
    if steps > 0:
        batches.count_batches(at_most=steps)
        return steps
    return max(1, batches.count_batches(stage.num_epochs))


def _set_up(
    stage: Stage, loaded: Loaded, mesh: Mesh, lr_multiplier: Schedule, batch: tuple[int, int]
) -> Run:
    """The run from the loaded parameters, and with the loaded optimizer state if configured."""
    config, model = stage.config, loaded.config
    momentum = linear_momentum(300, 0.85, 0.95)
    if model.arch == "classic":
        momentum = stage.classic_momentum
    schedules = Schedules(lr_multiplier=lr_multiplier, momentum=momentum)

    def optimizer_for(compute: Compute) -> optax.GradientTransformation:
        return continued_optimizer(config, loaded, schedules, compute)

    run = set_up(config, model, mesh, optimizer_for, batch=batch, params=loaded.params)
    if not config.load_optimizer:
        return run
    optimizer, shardings = optimizer_for(run.compute), run.shardings.params
    loaded = dataclasses.replace(loaded, params=run.state.params)
    warm = warm_optimizer(loaded, optimizer, run.state.params, shardings, mesh)
    return dataclasses.replace(run, state=run.state._replace(optimizer=warm))


def _held_out(
    stage: Stage, loaded: Loaded, validation: ConversationLoader, run: Run
) -> Callable[[Params], dict[str, float]]:
    """The evaluation of held-out bits per byte and loss."""
    assert run.shape is not None
    row_tokens = run.shape.micro_rows * run.shape.sequence_len
    most = max(1, stage.eval_steps or stage.config.eval_tokens // row_tokens)
    steps = max(1, validation.count_batches(at_most=most))
    held_out = held_out_evaluation(
        validation, steps, config=loaded.config, tokenizer=loaded.tokenizer, compute=run.compute
    )

    def evaluate(params: Params) -> dict[str, float]:
        figures = held_out(params)
        return {"val_bpb": figures.bpb, "val_loss": figures.loss}

    return evaluate
