"""The pretraining stage: from flags to a base model.

What the flags leave open follows from the model's shape and the architecture's defaults
(model/recipe.py).
"""

import dataclasses
import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from nanochat_jax.checkpoint import lock_tag
from nanochat_jax.cli import count, flag
from nanochat_jax.data.loader import Loader, pretraining_loader
from nanochat_jax.devices import start
from nanochat_jax.eval.bpb import held_out_evaluation
from nanochat_jax.eval.bundle import ensure_bundle
from nanochat_jax.eval.core import evaluate_core
from nanochat_jax.eval.samples import PROMPTS, greedy_samples
from nanochat_jax.eval.scoring import Scorer, rows_for
from nanochat_jax.files import make_directory
from nanochat_jax.infer.engine import Engine
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.recipe import CLASSIC, DEFAULTS, MODERN, Recipe, derive_recipe
from nanochat_jax.model.sharding import data_share, data_size, make_mesh, mesh_text
from nanochat_jax.model.size import flops_per_token, num_params
from nanochat_jax.model.weights import Params
from nanochat_jax.paths import DATA_DIRS, Paths
from nanochat_jax.storage import Directory
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train.config import TrainConfig, factor, fraction, rate
from nanochat_jax.train.job import Evaluation, Job, LoaderSource, Outcome
from nanochat_jax.train.loop import train
from nanochat_jax.train.optim import (
    OptimizerConfig,
    Schedules,
    cosine_decay,
    linear_momentum,
    make_optimizer,
    modern_momentum,
    trapezoid,
)
from nanochat_jax.train.reporting import log_training
from nanochat_jax.train.resume import explaining_differences
from nanochat_jax.train.setup import Run, set_up

log = logging.getLogger(__name__)


def _default(name: str) -> str:
    """The default of a setting that the architecture decides, for its help."""
    return f"{getattr(MODERN, name)} (modern), {getattr(CLASSIC, name)} (classic)"


@dataclass(frozen=True, kw_only=True)
class BaseTrainConfig(TrainConfig):
    depth: int = count(20, "number of layers; the dial", short="-d", at_most=1000)
    arch: str = flag("modern", "architecture and recipe", choices=["modern", "classic"])
    data: str = flag("auto", "corpus; auto: the one on disk", choices=["auto", *DATA_DIRS])
    aspect_ratio: int = count(64, "width per layer (modern)", at_most=4096)
    head_dim: int = count(128, "width of a head (modern)", at_most=4096)
    max_seq_len: int = count(2048, "tokens of a row", at_most=2**24)
    window_pattern: str = flag(
        "SSSL", "short and long attention windows, tiled over layers (modern)"
    )
    packing: str = flag(
        "auto",
        f"how documents fill rows; auto: {_default('packing')}",
        choices=["auto", "bestfit", "stream"],
    )
    data_shards: int | None = count(
        None,
        "streams of documents, each packed separately; default up to 8; 1 is upstream's order "
        "for one process",
        at_most=10**6,
    )
    target_flops: float = flag(
        -1.0,
        "length of the run in training FLOPs; -1: by the ratio",
        at_least=1,
        at_most=1e30,
        also=-1,
    )
    target_param_data_ratio: float = flag(
        -1.0,
        "training tokens per parameter (modern: of the matrices and the unembedding); -1: "
        f"{_default('target_param_data_ratio')}",
        at_least=1e-3,
        at_most=1e6,
        also=-1,
    )
    embedding_lr: float | None = rate(
        None, f"learning rate of the embedding tables; default {_default('embedding_lr')}"
    )
    unembedding_lr: float | None = rate(
        None, f"learning rate of the unembedding; default {_default('unembedding_lr')}"
    )
    matrix_lr: float = rate(MODERN.matrix_lr, "learning rate of the matrices (Muon)")
    scalar_lr: float = rate(MODERN.scalar_lr, "learning rate of the per-layer scalars (modern)")
    lr_scale: float = factor(
        -1.0, "factor of the learning rates; -1: by the batch, sqrt(B / 2^19) (modern)", also=-1
    )
    weight_decay: float | None = rate(
        None,
        "modern: Muon's cautious decay, before scaling; classic: AdamW's; default "
        f"{_default('weight_decay')}",
    )
    grad_clip: float = flag(
        CLASSIC.grad_clip,
        "largest norm of the gradient (classic); 0 turns it off",
        at_least=0,
        at_most=1e9,
    )
    warmup_steps: int | None = count(
        None, f"steps of rising learning rate; default {_default('warmup_steps')}", at_least=0
    )
    warmup_ratio: float | None = fraction(None, "warm-up as a share of the run")
    warmdown_ratio: float | None = fraction(
        None, f"share of the run with falling learning rate; default {_default('warmdown_ratio')}"
    )
    final_lr_frac: float | None = fraction(
        None,
        f"learning rate at the end, as a share of its peak; default {_default('final_lr_frac')}",
    )
    core_metric_every: int = count(
        -1,
        "steps between evaluations of CORE; -1: none, scripts.base_eval evaluates it at the end",
        also=-1,
    )
    core_metric_max_per_task: int = count(500, "examples of each CORE task; -1: all", also=-1)
    sample_every: int = count(2000, "steps between samples; -1: none", also=-1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("`warmup_steps` and `warmup_ratio` are alternatives: choose one")
        model_config(self, vocab_size=1)  # raises ValueError for an invalid model

    def resolved(self, name: str) -> Any:
        """The setting, or the architecture's default if it is None or "auto"."""
        value = getattr(self, name)
        return getattr(DEFAULTS[self.arch], name) if value in (None, "auto") else value


def model_config(config: BaseTrainConfig, vocab_size: int) -> tuple[GPTConfig, GPTConfig]:
    """(the model, the d12 model with the same flags, to which the scaling laws refer)."""
    shape: dict[str, Any] = dict(sequence_len=config.max_seq_len, vocab_size=vocab_size)
    if config.arch == "classic":
        return GPTConfig.classic(config.depth, **shape), GPTConfig.classic(12, **shape)
    shape |= {
        name: getattr(config, name) for name in ("aspect_ratio", "head_dim", "window_pattern")
    }
    return GPTConfig.modern(config.depth, **shape), GPTConfig.modern(12, **shape)


def recipe(config: BaseTrainConfig, model: GPTConfig, reference: GPTConfig) -> Recipe:
    return derive_recipe(
        model,
        reference=reference,
        total_batch_size=config.total_batch_size,
        num_iterations=config.num_iterations,
        target_flops=config.target_flops,
        target_param_data_ratio=config.target_param_data_ratio,
        weight_decay=config.resolved("weight_decay"),
    )


def optimizer_parts(config: BaseTrainConfig, plan: Recipe) -> tuple[OptimizerConfig, Schedules]:
    """Learning rates, and the schedules of learning rate, momentum and decay."""
    classic, steps = config.arch == "classic", plan.num_iterations
    rates = OptimizerConfig(
        embedding_lr=config.resolved("embedding_lr"),
        unembedding_lr=config.resolved("unembedding_lr"),
        matrix_lr=config.matrix_lr,
        scalar_lr=config.scalar_lr,
        weight_decay=plan.weight_decay if classic else 0.0,
        grad_clip=config.grad_clip if classic else 0.0,
    )
    warmdown = config.resolved("warmdown_ratio")
    warmup = config.resolved("warmup_steps")
    if config.warmup_ratio is not None:
        warmup = round(config.warmup_ratio * steps)
    schedules = Schedules(
        lr_multiplier=trapezoid(
            steps,
            warmup=warmup,
            warmdown_ratio=warmdown,
            final_fraction=config.resolved("final_lr_frac"),
        ),
        momentum=linear_momentum(300, 0.85, 0.95) if classic else modern_momentum(steps, warmdown),
        weight_decay=None if classic else cosine_decay(plan.weight_decay, steps),
        lr_scale=plan.lr_scale if config.lr_scale < 0 else config.lr_scale,
    )
    return rates, schedules


def pretrain(config: BaseTrainConfig) -> None:
    """Run the stage: from the flags to checkpoints, metrics and a section of the report."""
    paths = Paths.from_env()
    start(paths, config, compile_cache=config.compile_cache)
    make_directory(paths.report)
    tokenizer = Tokenizer.load(paths.tokenizer)
    directory = paths.checkpoints("base") / (config.model_tag or f"d{config.depth}")
    with lock_tag(directory):
        _pretrain(config, paths, tokenizer, directory)


def _pretrain(
    config: BaseTrainConfig, paths: Paths, tokenizer: Tokenizer, directory: Directory
) -> None:
    data = paths.find_data() if config.data == "auto" else config.data
    model, reference = model_config(config, tokenizer.vocab_size)
    plan = recipe(config, model, reference)
    rates, schedules = optimizer_parts(config, plan)
    mesh = make_mesh(config.mesh)
    run = set_up(
        config,
        model,
        mesh,
        lambda compute: make_optimizer(model, rates, schedules, compute),
        batch=(plan.total_batch_size, model.sequence_len),
    )
    assert run.shape is not None
    log.info(
        f"d{config.depth} {config.arch}: {num_params(model):,} parameters, "
        f"{plan.total_tokens:,} tokens in {plan.num_iterations} steps of {run.shape.tokens:,} in "
        f"{run.shape.accumulation} x {run.shape.micro_rows} rows, mesh {mesh_text(mesh)}, "
        f"{run.compute.dtype}"
    )
    metadata = {
        "tokenizer": tokenizer.fingerprint(),
        "data": data,
        "packing": config.resolved("packing"),
        "total_batch_size": run.shape.tokens,
        "rates": dataclasses.asdict(rates),
        "lr_scale": schedules.lr_scale,
    }
    with explaining_differences(config, directory, metadata):
        batches, validation = _loaders(config, paths.data(data), tokenizer, run)
    job = Job(
        name="base_train",
        config=config,
        model=model,
        directory=directory,
        logs=paths.logs("base") / directory.name,
        num_steps=plan.num_iterations,
        shape=run.shape,
        lr_multiplier=schedules.lr_multiplier,
        evaluations=_evaluations(config, paths, tokenizer, validation, model, run),
        tokenizer=tokenizer,
        metadata=metadata,
    )
    source = LoaderSource(batches, run.shape, mesh)
    outcome = train(job, run.state, run.shardings, run.step_fn, source)
    log_training(job, paths, "Base model training", _results(job, run, plan, outcome))


def _loaders(
    config: BaseTrainConfig, corpus: Path, tokenizer: Tokenizer, run: Run
) -> tuple[Loader, Loader]:
    """This process's training batches, and the validation batches."""
    assert run.shape is not None
    loader = functools.partial(
        pretraining_loader,
        corpus,
        tokenizer,
        sequence_len=run.shape.sequence_len,
        packing=config.resolved("packing"),
    )
    index, count = data_share(run.mesh)
    batches = loader(
        split="train",
        batch_size=run.shape.rows,
        process_index=index,
        process_count=count,
        num_shards=config.data_shards,
    )
    return batches, loader(split="val", batch_size=run.shape.micro_rows, num_shards=1)


def _evaluations(
    config: BaseTrainConfig,
    paths: Paths,
    tokenizer: Tokenizer,
    validation: Loader,
    model: GPTConfig,
    run: Run,
) -> list[Evaluation]:
    """Bits per byte; samples; CORE, if requested."""
    assert run.shape is not None
    rows, compute = run.shape.micro_rows, run.compute
    steps = max(1, config.eval_tokens // (rows * model.sequence_len))
    held_out = held_out_evaluation(
        validation, steps, config=model, tokenizer=tokenizer, compute=compute
    )

    def samples(params: Params) -> dict[str, float]:
        engine = Engine(model, params, tokenizer, num_slots=len(PROMPTS), compute=compute)
        for text in greedy_samples(engine, tokenizer):
            log.info("  %s", text.replace("\n", " "))
        return {}

    evaluations = [
        Evaluation(config.eval_every, lambda params: {"val_bpb": held_out(params).bpb}),
        Evaluation(config.sample_every, samples, at_end=False),
    ]
    if config.core_metric_every < 1:
        return evaluations
    bundle = ensure_bundle(paths)  # a missing bundle is reported now, not in the middle of the run
    num_rows = rows_for(rows // data_size(run.mesh))

    def core(params: Params) -> dict[str, float]:
        scorer = Scorer(config=model, params=params, num_rows=num_rows, compute=compute)
        most = config.core_metric_max_per_task
        return {"core": evaluate_core(scorer, tokenizer, bundle, max_per_task=most).core}

    return [*evaluations, Evaluation(config.core_metric_every, core)]


def _results(job: Job, run: Run, plan: Recipe, outcome: Outcome) -> dict[str, Any]:
    parameters, flops = num_params(job.model), flops_per_token(job.model)
    return {
        "parameters": parameters,
        "flops_per_token": flops,
        "num_iterations": job.num_steps,
        "training_tokens": plan.total_tokens,
        "tokens_per_parameter": plan.total_tokens / parameters,
        "min_val_bpb": outcome.minimum,
        "val_bpb": outcome.last["val_bpb"],
        "train_loss": outcome.train_loss,
        "tokens_per_sec": outcome.tokens_per_sec,
        "mfu": outcome.mfu if outcome.mfu is not None else "n/a",
        "total_flops": float(flops) * plan.total_tokens,
        "training_seconds": outcome.seconds,
        "peak_memory_bytes": outcome.peak_memory,
        **{name: value for name, value in outcome.last.items() if name == "core"},
        "devices": f"{run.mesh.size} x {jax.devices()[0].device_kind}",
    }
