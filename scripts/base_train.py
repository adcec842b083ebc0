"""Pretrain a base model; all hyperparameters follow from --depth.

    python -m scripts.base_train --depth 20 --mesh 8x1
    python -m scripts.base_train --depth 4 --max-seq-len 512 --device-batch-size 1 \\
        --total-batch-size 512 --num-iterations 20
"""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import jax

from nanochat_jax import cli
from nanochat_jax.checkpoint import Loaded, lock_tag
from nanochat_jax.cli import flag
from nanochat_jax.data.loader import pretraining_loader
from nanochat_jax.devices import start
from nanochat_jax.eval.bpb import held_out_loss
from nanochat_jax.eval.bundle import ensure_bundle
from nanochat_jax.eval.core import evaluate_core
from nanochat_jax.eval.samples import greedy_samples
from nanochat_jax.eval.scoring import Scorer, rows_for
from nanochat_jax.files import make_directory
from nanochat_jax.model.config import GPTConfig
from nanochat_jax.model.recipe import Recipe, derive_recipe
from nanochat_jax.model.sharding import data_share, data_size, make_mesh
from nanochat_jax.model.size import flops_per_token, num_params
from nanochat_jax.paths import DATA_DIRS, Paths
from nanochat_jax.report import sections
from nanochat_jax.storage import Directory
from nanochat_jax.tokenizer import Tokenizer
from nanochat_jax.train.loop import (
    Evaluation,
    Job,
    LoaderSource,
    TrainConfig,
    naming_other_flags,
    train,
)
from nanochat_jax.train.optim import (
    CLASSIC_RATES,
    OptimizerConfig,
    Schedules,
    cosine_decay,
    linear_momentum,
    make_optimizer,
    modern_momentum,
    trapezoid,
)
from nanochat_jax.train.setup import set_up

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BaseTrainConfig(TrainConfig):
    depth: int = flag(20, "number of layers; the dial", short="-d", at_least=1, at_most=1000)
    arch: str = flag("modern", "architecture and recipe", choices=["modern", "classic"])
    data: str = flag("auto", "corpus; auto: the one on disk", choices=["auto", *DATA_DIRS])
    aspect_ratio: int = flag(64, "width per layer (modern)", at_least=1, at_most=4096)
    head_dim: int = flag(128, "width of a head (modern)", at_least=1, at_most=4096)
    max_seq_len: int = flag(2048, "tokens of a row", at_least=1, at_most=2**24)
    window_pattern: str = flag(
        "SSSL", "short and long attention windows, tiled over layers (modern)"
    )
    packing: str = flag(
        "auto",
        "how documents fill rows; auto: bestfit (modern), stream (classic)",
        choices=["auto", "bestfit", "stream"],
    )
    data_shards: int | None = flag(
        None,
        "streams the documents are dealt to, each packed alone; default up to 8; 1 is "
        "upstream's order for one process",
        at_least=1,
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
        "tokens per parameter; -1: 12 scaling (modern), 20 total (classic)",
        at_least=1e-3,
        at_most=1e6,
        also=-1,
    )
    embedding_lr: float | None = flag(
        None,
        "rate of the embedding tables; default 0.3 (modern), 0.2 (classic)",
        at_least=0,
        at_most=100,
    )
    unembedding_lr: float | None = flag(
        None,
        "rate of the unembedding; default 0.008 (modern), 0.004 (classic)",
        at_least=0,
        at_most=100,
    )
    matrix_lr: float = flag(0.02, "Muon's rate of the matrices", at_least=0, at_most=100)
    scalar_lr: float = flag(0.5, "rate of the per-layer scalars (modern)", at_least=0, at_most=100)
    lr_scale: float = flag(
        -1.0,
        "factor of the rates; -1: by the batch, sqrt(B / 2^19) (modern)",
        at_least=1e-9,
        at_most=1000,
        also=-1,
    )
    weight_decay: float | None = flag(
        None,
        "modern: Muon's, before scaling, default 0.28; classic: AdamW's, 0",
        at_least=0,
        at_most=100,
    )
    grad_clip: float = flag(
        1.0, "global norm of the gradient (classic); 0 turns it off", at_least=0, at_most=1e9
    )
    warmup_steps: int | None = flag(
        None, "steps of rising rate; default 40 (modern), 0 (classic)", at_least=0, at_most=10**9
    )
    warmup_ratio: float | None = flag(None, "the same as a share of the run", at_least=0, at_most=1)
    warmdown_ratio: float | None = flag(
        None,
        "share of the run with falling rate; default 0.65 (modern), 0.2 (classic)",
        at_least=0,
        at_most=1,
    )
    final_lr_frac: float | None = flag(
        None,
        "rate at the end, as a share of its peak; default 0.05 (modern), 0 (classic)",
        at_least=0,
        at_most=1,
    )
    core_metric_every: int = flag(
        -1,
        "steps between evaluations of CORE; -1: none, scripts.base_eval does it at the end",
        at_least=1,
        at_most=10**9,
        also=-1,
    )
    core_metric_max_per_task: int = flag(
        500, "examples of each of its tasks; -1: all", at_least=1, at_most=10**9, also=-1
    )
    sample_every: int = flag(
        2000, "steps between samples; -1: none", at_least=1, at_most=10**9, also=-1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError(
                "--warmup-steps and --warmup-ratio say the same thing: give one of them"
            )
        model_config(self, vocab_size=1)  # raises ValueError for an invalid model


def model_config(config: BaseTrainConfig, vocab_size: int) -> tuple[GPTConfig, GPTConfig]:
    """(the model, the d12 model with the same flags, to which the scaling laws refer)."""
    shape: dict[str, Any] = dict(sequence_len=config.max_seq_len, vocab_size=vocab_size)
    if config.arch == "classic":
        return GPTConfig.classic(config.depth, **shape), GPTConfig.classic(12, **shape)
    shape |= dict(
        aspect_ratio=config.aspect_ratio,
        head_dim=config.head_dim,
        window_pattern=config.window_pattern,
    )
    return GPTConfig.modern(config.depth, **shape), GPTConfig.modern(12, **shape)


def recipe(config: BaseTrainConfig, model: GPTConfig, reference: GPTConfig) -> Recipe:
    weight_decay = config.weight_decay
    if weight_decay is None:
        weight_decay = 0.28 if config.arch == "modern" else 0.0
    return derive_recipe(
        model,
        reference=reference,
        total_batch_size=config.total_batch_size,
        num_iterations=config.num_iterations,
        target_flops=config.target_flops,
        target_param_data_ratio=config.target_param_data_ratio,
        weight_decay=weight_decay,
    )


def optimizer_parts(config: BaseTrainConfig, plan: Recipe) -> tuple[OptimizerConfig, Schedules]:
    """Learning rates, and the schedules of learning rate, momentum and decay."""

    def given(value: Any, modern: Any, classic: Any) -> Any:
        return value if value is not None else (modern if config.arch == "modern" else classic)

    classic = config.arch == "classic"
    rates = OptimizerConfig(
        embedding_lr=given(
            config.embedding_lr, OptimizerConfig.embedding_lr, CLASSIC_RATES["embedding_lr"]
        ),
        unembedding_lr=given(
            config.unembedding_lr, OptimizerConfig.unembedding_lr, CLASSIC_RATES["unembedding_lr"]
        ),
        matrix_lr=config.matrix_lr,
        scalar_lr=config.scalar_lr,
        weight_decay=plan.weight_decay if classic else 0.0,
        grad_clip=config.grad_clip if classic else 0.0,
    )
    steps = plan.num_iterations
    warmdown = given(config.warmdown_ratio, 0.65, 0.2)
    warmup = (
        given(config.warmup_steps, 40, 0)
        if config.warmup_ratio is None
        else round(config.warmup_ratio * steps)
    )
    schedules = Schedules(
        lr_multiplier=trapezoid(
            steps,
            warmup=warmup,
            warmdown_ratio=warmdown,
            final_fraction=given(config.final_lr_frac, 0.05, 0.0),
        ),
        momentum=linear_momentum(300, 0.85, 0.95) if classic else modern_momentum(steps, warmdown),
        weight_decay=None if classic else cosine_decay(plan.weight_decay, steps),
        lr_scale=plan.lr_scale if config.lr_scale < 0 else config.lr_scale,
    )
    return rates, schedules


def main(config: BaseTrainConfig) -> None:
    paths = Paths.from_env()
    start(paths, config, compile_cache=config.compile_cache)
    make_directory(paths.report)
    tokenizer = Tokenizer.load(paths.tokenizer)
    directory = paths.checkpoints("base") / (config.model_tag or f"d{config.depth}")
    with lock_tag(directory):
        pretrain(config, paths, tokenizer, directory)


def pretrain(
    config: BaseTrainConfig, paths: Paths, tokenizer: Tokenizer, directory: Directory
) -> None:
    """Run the stage: from the flags to checkpoints, metrics and a section of the report."""
    data = paths.find_data() if config.data == "auto" else config.data
    model, reference = model_config(config, tokenizer.vocab_size)
    plan = recipe(config, model, reference)
    mesh = make_mesh(config.mesh)
    rates, schedules = optimizer_parts(config, plan)
    run = set_up(
        config,
        model,
        mesh,
        lambda compute: make_optimizer(model, rates, schedules, compute),
        tokens=plan.total_batch_size,
    )
    shape, compute = run.shape, run.compute
    assert shape is not None
    log.info(
        "d%d %s: %s parameters, %s tokens in %d steps of %s in %d x %d rows, mesh %s, %s",
        config.depth,
        config.arch,
        f"{num_params(model):,}",
        f"{plan.total_tokens:,}",
        plan.num_iterations,
        f"{shape.tokens:,}",
        shape.accumulation,
        shape.micro_rows,
        "x".join(map(str, mesh.shape.values())),
        compute.dtype,
    )

    packing = (
        config.packing
        if config.packing != "auto"
        else ("bestfit" if config.arch == "modern" else "stream")
    )
    index, count = data_share(mesh)
    common: dict[str, Any] = dict(sequence_len=model.sequence_len, packing=packing)
    metadata = {
        "tokenizer": tokenizer.fingerprint(),
        "data": data,
        "packing": packing,
        "total_batch_size": shape.tokens,
        "rates": dataclasses.asdict(rates),
        "lr_scale": schedules.lr_scale,
    }
    with naming_other_flags(config, directory, metadata):
        batches = pretraining_loader(
            paths.data(data),
            tokenizer,
            split="train",
            batch_size=shape.rows,
            process_index=index,
            process_count=count,
            num_shards=config.data_shards,
            **common,
        )
    validation = pretraining_loader(
        paths.data(data),
        tokenizer,
        split="val",
        batch_size=shape.micro_rows,
        num_shards=1,
        **common,
    )
    eval_steps = max(1, config.eval_tokens // (shape.micro_rows * model.sequence_len))
    token_bytes = tokenizer.token_bytes()

    def bits_per_byte(params: Any) -> dict[str, float]:
        held_out = held_out_loss(
            params, validation, eval_steps, config=model, token_bytes=token_bytes, compute=compute
        )
        validation.reset()
        return {"val_bpb": held_out.bpb}

    def core(params: Any) -> dict[str, float]:
        scorer = Scorer(
            config=model,
            params=params,
            num_rows=rows_for(shape.micro_rows // data_size(mesh)),
            compute=compute,
        )
        return {
            "core": evaluate_core(
                scorer, tokenizer, bundle, max_per_task=config.core_metric_max_per_task
            ).core
        }

    def samples(params: Any) -> dict[str, float]:
        for text in greedy_samples(
            Loaded(model, params, tokenizer, {}, job.directory, 0, "base"), compute=compute
        ):
            log.info("  %s", text.replace("\n", " "))
        return {}

    evaluations = [
        Evaluation(config.eval_every, bits_per_byte),
        Evaluation(config.sample_every, samples, at_end=False),
    ]
    if config.core_metric_every > 0:
        # A missing bundle must be found now, not in the middle of the run.
        bundle = ensure_bundle(paths)
        evaluations.append(Evaluation(config.core_metric_every, core))

    job = Job(
        name="base_train",
        config=config,
        model=model,
        directory=directory,
        logs=paths.logs("base") / directory.name,
        num_steps=plan.num_iterations,
        shape=shape,
        lr_multiplier=schedules.lr_multiplier,
        evaluations=evaluations,
        tokenizer=tokenizer,
        metadata=metadata,
    )
    outcome = train(job, run.state, run.shardings, run.step_fn, LoaderSource(batches, shape, mesh))
    if jax.process_index() == 0:
        results = {
            "parameters": num_params(model),
            "flops_per_token": flops_per_token(model),
            "num_iterations": job.num_steps,
            "training_tokens": plan.total_tokens,
            "tokens_per_parameter": plan.total_tokens / num_params(model),
            "min_val_bpb": outcome.minimum,
            "val_bpb": outcome.last["val_bpb"],
            "train_loss": outcome.train_loss,
            "tokens_per_sec": outcome.tokens_per_sec,
            "mfu": outcome.mfu if outcome.mfu is not None else "n/a",
            "total_flops": float(flops_per_token(model)) * plan.total_tokens,
            "training_seconds": outcome.seconds,
            "peak_memory_bytes": outcome.peak_memory,
            **{key: value for key, value in outcome.last.items() if key == "core"},
            "devices": f"{mesh.size} x {jax.devices()[0].device_kind}",
        }
        sections.log_section(
            paths.report,
            "Base model training",
            [dataclasses.asdict(config), results],
            stage="base_train",
            results=results,
            curves=job.logs / "metrics.jsonl",
        )


if __name__ == "__main__":
    cli.run(main, BaseTrainConfig, prog="scripts.base_train", description=__doc__)
