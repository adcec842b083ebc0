"""Midtraining and SFT: continue training an earlier stage's model on conversations.

RL shares some flags.
"""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nanochat_jax.checkpoint import Loaded, find_model, load_model, load_optimizer, lock_tag
from nanochat_jax.cli import LARGEST, directory_name, flag
from nanochat_jax.data.mixture import ConversationLoader
from nanochat_jax.devices import start
from nanochat_jax.eval.bpb import held_out_loss
from nanochat_jax.files import make_directory
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.sharding import abstract_tree, data_share, make_mesh, optimizer_shardings
from nanochat_jax.model.weights import Params
from nanochat_jax.paths import Paths
from nanochat_jax.report import sections
from nanochat_jax.tasks.base import Task
from nanochat_jax.tasks.mixtures import Split, mixture_entries
from nanochat_jax.train.loop import Evaluation, Job, LoaderSource, RunConfig, TrainConfig, train
from nanochat_jax.train.muon import MuonState
from nanochat_jax.train.optim import (
    OptimizerConfig,
    Schedule,
    Schedules,
    constant,
    linear_momentum,
    make_optimizer,
)
from nanochat_jax.train.setup import set_up

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ContinueConfig(RunConfig):
    """Flags of a stage that continues another stage's model."""

    model_tag: str | None = flag(
        None,
        "name of the checkpoint directory; default the largest d<depth>",
        short="-g",
        check=directory_name,
    )
    step: int | None = flag(
        None,
        "step of the checkpoint to start from; default the newest",
        short="-s",
        aliases=("model_step",),
        at_least=0,
        at_most=LARGEST,
    )
    embedding_lr: float | None = flag(
        None, "rate of the embedding tables; default the base run's", at_least=0, at_most=100
    )
    unembedding_lr: float | None = flag(
        None, "rate of the unembedding; default the base run's", at_least=0, at_most=100
    )
    matrix_lr: float | None = flag(
        None, "Muon's rate of the matrices; default the base run's", at_least=0, at_most=100
    )
    weight_decay: float = flag(
        0.0, "modern: Muon's cautious decay; classic: AdamW's", at_least=0, at_most=100
    )
    init_lr_frac: float = flag(1.0, "factor of all rates", at_least=1e-9, at_most=1000)

    def optimizer(
        self, loaded: Loaded, schedules: Schedules, compute: Compute
    ) -> optax.GradientTransformation:
        """The optimizer, with the base run's learning rates unless flags set them.

        `init_lr_frac` scales the rates of all groups.
        """
        given = {
            key: value
            for key in ("embedding_lr", "unembedding_lr", "matrix_lr")
            if (value := getattr(self, key)) is not None
        }
        multiplier = schedules.lr_multiplier
        rates = OptimizerConfig(
            **(loaded.meta["rates"] | given | {"weight_decay": self.weight_decay, "grad_clip": 0.0})
        )
        decay = (
            constant(self.weight_decay)
            if loaded.config.arch == "modern" and self.weight_decay
            else None
        )
        schedules = dataclasses.replace(
            schedules,
            lr_multiplier=lambda step: self.init_lr_frac * multiplier(step),
            weight_decay=decay,
        )
        return make_optimizer(loaded.config, rates, schedules, compute)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(ContinueConfig, TrainConfig):
    """Flags of midtraining and SFT."""

    load_optimizer: bool = flag(
        False, "go on with the moments of its optimizer; the rates begin anew"
    )
    mixture: str | None = flag(
        None,
        "what to train on, such as SmolTalk:10000,MMLU*3,chats.jsonl: tasks or files of "
        "conversations, each with its weight (*) or the number of its first ones (:); default: "
        "what goes with the corpus",
        check=mixture_entries,
    )
    max_seq_len: int | None = flag(
        None, "tokens of a row; default the base model's", at_least=1, at_most=2**24
    )
    dry_run: bool = flag(False, "leave no checkpoint and no section of the report")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resuming and self.dry_run:
            raise ValueError(
                "--dry-run begins anew and saves nothing, --resume goes on with a checkpoint: "
                "give one of them"
            )


@dataclass(frozen=True, kw_only=True)
class Stage:
    """How one finetuning stage differs from another."""

    name: str  # "mid_train", "chat_sft"
    section: str  # section of the report
    source: str  # stage whose model is loaded; `target` is where the result is saved
    target: str
    mode: str  # how conversations fill rows: see data/mixture.py
    primary: str  # metric whose minimum is reported
    num_epochs: int
    # rows per step without a batch size; None: the base run's tokens per step
    step_rows: int | None
    mixture: Callable[[str | None, Split, Paths], Task]  # (corpus, split, paths)
    lr_schedule: Callable[[int], Schedule]  # from the number of steps
    # Muon's momentum for `classic`; `modern` has the same in all stages
    classic_momentum: Schedule = linear_momentum(300, 0.85, 0.95)
    eval_steps: int | None = None  # instead of --eval-tokens
    # Additional evaluations, from the model, rows per micro-batch and `Compute`.
    evaluations: Callable[..., list[Evaluation]] = lambda *_: []


def warm_optimizer(
    loaded: Loaded,
    optimizer: optax.GradientTransformation,
    params: Params,
    shardings: Any,
    mesh: jax.sharding.Mesh,
) -> Any:
    """The optimizer state saved with `loaded`, with the schedules' step counts reset to 0.

    Adam's own count stays: its moments have accumulated over that many steps.
    """
    # If pretraining clips gradients, clipping is first in its chain; it is dropped here.
    clipped = loaded.source == "base" and loaded.meta["rates"]["grad_clip"] > 0
    saved = optax.chain(optax.clip_by_global_norm(1.0), optimizer) if clipped else optimizer
    abstract = jax.eval_shape(saved.init, params)
    state = load_optimizer(
        loaded, abstract_tree(abstract, optimizer_shardings(abstract, params, shardings, mesh))
    )
    scheduled = (MuonState, optax.ScaleByScheduleState)
    return jax.tree.map(
        lambda node: (
            node._replace(count=jnp.zeros_like(node.count)) if isinstance(node, scheduled) else node
        ),
        state[1] if clipped else state,
        is_leaf=lambda node: isinstance(node, scheduled),
    )


def finetune(config: FinetuneConfig, stage: Stage) -> None:
    """Train the newest model of `stage.source` on the stage's mixture and save the result."""
    paths = Paths.from_env()
    start(paths, config, compile_cache=config.compile_cache)
    # A mixture named by flag needs no model: report typos in it before loading one.
    named = stage.mixture(None, "train", paths) if config.mixture else None
    if config.dry_run:
        return _finetune(config, stage, paths, named)
    make_directory(paths.report)
    with lock_tag(
        paths.checkpoints(stage.target) / find_model(paths, stage.source, config.model_tag).name
    ):
        _finetune(config, stage, paths, named)


def _finetune(config: FinetuneConfig, stage: Stage, paths: Paths, named: Task | None) -> None:
    mesh = make_mesh(config.mesh)
    loaded = load_model(
        paths,
        stage.source,
        tag=config.model_tag,
        step=config.step,
        mesh=mesh,
        fsdp=bool(config.fsdp),
    )
    model, tokenizer, meta = loaded.config, loaded.tokenizer, loaded.meta
    mixture = stage.mixture(meta["data"], "train", paths) if named is None else named
    length = config.max_seq_len or model.sequence_len
    total = config.total_batch_size
    if total <= 0:
        total = stage.step_rows * length if stage.step_rows else meta["total_batch_size"]

    common: dict[str, Any] = dict(sequence_len=length, mode=stage.mode)
    index, count = data_share(mesh)
    batches = ConversationLoader(
        mixture,
        tokenizer,
        batch_size=max(1, total // length),
        process_index=index,
        process_count=count,
        **common,
    )
    if config.num_iterations > 0:
        num_steps = config.num_iterations
        batches.count_batches(at_most=num_steps)  # logs cut and skipped conversations
    else:
        num_steps = max(1, batches.count_batches(stage.num_epochs))
    multiplier = stage.lr_schedule(num_steps)
    momentum = (
        stage.classic_momentum if model.arch == "classic" else linear_momentum(300, 0.85, 0.95)
    )
    schedules = Schedules(lr_multiplier=multiplier, momentum=momentum)

    def optimizer_for(compute: Compute) -> optax.GradientTransformation:
        return config.optimizer(loaded, schedules, compute)

    run = set_up(
        config, model, mesh, optimizer_for, tokens=total, length=length, params=loaded.params
    )
    shape, state, compute = run.shape, run.state, run.compute
    assert shape is not None
    loaded = dataclasses.replace(loaded, params=state.params)
    validation = ConversationLoader(
        stage.mixture(meta["data"], "val", paths),
        tokenizer,
        batch_size=shape.micro_rows,
        name="validation",
        **common,
    )
    wanted = max(1, stage.eval_steps or config.eval_tokens // (shape.micro_rows * length))
    eval_steps = max(1, validation.count_batches(at_most=wanted))
    if config.load_optimizer:
        warm = warm_optimizer(
            loaded, optimizer_for(compute), state.params, run.shardings.params, mesh
        )
        state = state._replace(optimizer=warm)
    log.info(
        "%s: %d conversations, %d steps of %s tokens, mesh %s, %s",
        stage.name,
        len(mixture),
        num_steps,
        f"{shape.tokens:,}",
        "x".join(map(str, mesh.shape.values())),
        compute.dtype,
    )
    token_bytes = tokenizer.token_bytes()

    def held_out(params: Params) -> dict[str, float]:
        figures = held_out_loss(
            params, validation, eval_steps, config=model, token_bytes=token_bytes, compute=compute
        )
        validation.reset()
        return {"val_bpb": figures.bpb, "val_loss": figures.loss}

    job = Job(
        name=stage.name,
        config=config,
        model=model,
        directory=paths.checkpoints(stage.target) / loaded.tag,
        logs=paths.logs(stage.target) / loaded.tag,
        num_steps=num_steps,
        shape=shape,
        lr_multiplier=multiplier,
        primary=stage.primary,
        evaluations=[
            Evaluation(config.eval_every, held_out),
            *stage.evaluations(loaded, shape.micro_rows, compute),
        ],
        metadata={
            "tokenizer": tokenizer.fingerprint(),
            "data": meta["data"],
            "total_batch_size": shape.tokens,
            "rates": meta["rates"],
            "from": [stage.source, loaded.tag, loaded.step],
        },
        dry_run=config.dry_run,
        tokenizer=tokenizer,
        origin=loaded,
    )
    outcome = train(job, state, run.shardings, run.step_fn, LoaderSource(batches, shape, mesh))
    results = {
        "training_rows": len(mixture),
        "num_iterations": num_steps,
        "training_tokens": num_steps * shape.tokens,
        "train_loss": outcome.train_loss,
        **outcome.last,
        f"min_{stage.primary}": outcome.minimum,
        "tokens_per_sec": outcome.tokens_per_sec,
        "training_seconds": outcome.seconds,
    }
    if jax.process_index() == 0 and not config.dry_run:
        sections.log_section(
            paths.report,
            stage.section,
            [dataclasses.asdict(config), results],
            stage=stage.name,
            results=results,
            curves=job.logs / "metrics.jsonl",
        )
