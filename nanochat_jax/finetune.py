"""What midtraining and SFT share: a stage's model goes on with a mixture of conversations."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from nanochat_jax import report
from nanochat_jax.checkpoint import load_model
from nanochat_jax.cli import flag
from nanochat_jax.data.mixture import conversation_loader
from nanochat_jax.eval.bpb import held_out_loss
from nanochat_jax.optim import OptimizerConfig, linear_momentum, make_optimizer
from nanochat_jax.paths import Paths
from nanochat_jax.sharding import data_size, make_mesh
from nanochat_jax.startup import start
from nanochat_jax.tasks.mixtures import mixture_for
from nanochat_jax.train import Job, TrainConfig, batch_shape, init_state, make_train_step, resolve_dtype, train

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Flags of both stages."""

    step: int | None = flag(None, "step of the checkpoint to start from; default the newest")
    mixture: str | None = flag(None, "what to train on, such as SmolTalk,MMLU*3,chats.jsonl: tasks or files of "
                               "conversations, each with its weight; default: what goes with the corpus")
    max_seq_len: int | None = flag(None, "tokens of a row; default the base model's")
    embedding_lr: float | None = flag(None, "rate of the embedding tables; default the base run's")
    unembedding_lr: float | None = flag(None, "rate of the unembedding; default the base run's")
    matrix_lr: float | None = flag(None, "Muon's rate of the matrices; default the base run's")
    init_lr_frac: float = flag(1.0, "factor of all rates")


def finetune(config: FinetuneConfig, *, name: str, section: str, source: str, target: str, stage: str, mode: str,
             num_epochs: int, lr_schedule: Callable[[int], Callable[[Array], Array]], primary: str
             ) -> None:
    """Train the newest model of `source` on the mixture of `stage` and save it under `target`.

    `mode` is how conversations fill rows (data/mixture.py); `lr_schedule` makes the multiplier from the number of steps.
    """
    paths = Paths.from_env()
    start(paths)
    mesh, dtype = make_mesh(config.mesh), resolve_dtype(config.dtype)
    loaded = load_model(paths, source, tag=config.model_tag, step=config.step, mesh=mesh, fsdp=config.fsdp)
    model, tokenizer = loaded.config, loaded.tokenizer
    length = config.max_seq_len or model.sequence_len
    total = config.total_batch_size
    if total <= 0:  # midtraining goes on as pretraining did; a finetuning mixture is small and takes small steps
        total = loaded.meta["total_batch_size"] if stage == "mid" else config.device_batch_size * length * data_size(mesh)
    shape = batch_shape(total, config.device_batch_size, length, mesh)

    hosts = dict(process_index=jax.process_index(), process_count=jax.process_count())
    common = dict(sequence_len=length, mode=mode, **hosts)
    mixture = mixture_for(loaded.meta["data"], stage, "train", paths, config.mixture)
    batches = conversation_loader(mixture, tokenizer, batch_size=shape.rows, **common)
    validation = conversation_loader(mixture_for(loaded.meta["data"], stage, "val", paths), tokenizer,
                                     batch_size=shape.micro_rows, **common)
    num_steps = config.num_iterations if config.num_iterations > 0 else max(1, batches.count_batches(num_epochs))
    eval_steps = max(1, min(config.eval_tokens // (shape.micro_rows * length), validation.count_batches(1)))

    given = {key: value for key in ("embedding_lr", "unembedding_lr", "matrix_lr")
             if (value := getattr(config, key)) is not None}
    rates = OptimizerConfig(**(loaded.meta["rates"] | given | {"weight_decay": 0.0, "grad_clip": 0.0}))
    multiplier = lr_schedule(num_steps)
    optimizer = make_optimizer(model, rates, lr_multiplier=multiplier, momentum=linear_momentum(300, 0.85, 0.95),
                               lr_scale=config.init_lr_frac, muon_dtype=dtype, mesh=mesh)
    state, shardings = init_state(model, optimizer, mesh, fsdp=config.fsdp, seed=config.seed, params=loaded.params)
    step_fn = make_train_step(model, optimizer, dtype=dtype, mesh=mesh, shardings=shardings, remat=config.remat)
    log.info("%s: %d conversations, %d steps of %s tokens, mesh %s, %s", name, len(mixture), num_steps,
             f"{shape.tokens:,}", "x".join(map(str, mesh.shape.values())), dtype)
    token_bytes = tokenizer.token_bytes()

    def evaluate(params: Any, step: int, last: bool) -> dict[str, float]:
        figures = held_out_loss(params, validation, eval_steps, config=model, token_bytes=token_bytes, mesh=mesh,
                                dtype=dtype)
        validation.reset()
        return {"val_bpb": figures.bpb, "val_loss": figures.loss}

    metadata = {"tokenizer": tokenizer.fingerprint(), "data": loaded.meta["data"],
                "total_batch_size": shape.tokens, "rates": loaded.meta["rates"], "from": [source, loaded.tag, loaded.step]}
    job = Job(name=name, config=config, model=model, directory=paths.checkpoints(target) / loaded.tag,
              num_steps=num_steps, shape=shape, lr_multiplier=multiplier, evaluate=evaluate, metadata=metadata,
              primary=primary)
    outcome = train(job, state, shardings, step_fn, batches)
    results = {
        "training_rows": len(mixture), "num_iterations": num_steps, "training_tokens": num_steps * shape.tokens,
        "train_loss": outcome.train_loss, **outcome.last, f"min_{primary}": outcome.minimum,
        "tokens_per_sec": outcome.tokens_per_sec, "training_seconds": outcome.seconds,
    }
    if jax.process_index() == 0:
        report.log_section(paths.report, section, [dataclasses.asdict(config), results], stage=name, results=results,
                           curves=job.directory / "metrics.jsonl")
