"""Evaluate a base model: CORE, bits per byte, and samples.

    python -m scripts.base_eval
    python -m scripts.base_eval --eval core,bpb,sample --max-per-task 100
"""

import dataclasses
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import jax

from nanochat_jax import cli, report
from nanochat_jax.checkpoint import Loaded, load_model
from nanochat_jax.cli import flag
from nanochat_jax.eval.batching import Batching
from nanochat_jax.eval.bpb import corpus_bits_per_byte
from nanochat_jax.eval.bundle import ensure_bundle, has_bundle
from nanochat_jax.eval.core import Scorer, evaluate_core, format_csv
from nanochat_jax.eval.samples import free_samples, greedy_samples
from nanochat_jax.paths import Paths
from nanochat_jax.sharding import data_size, make_mesh
from nanochat_jax.startup import Processes, start
from nanochat_jax.step import resolve_dtype

log = logging.getLogger(__name__)

KINDS = ("core", "bpb", "sample")


@dataclass(frozen=True, kw_only=True)
class BaseEvalConfig(Processes):
    eval: str = flag("auto", "which of core, bpb and sample, joined by commas; auto: samples, and CORE if its bundle "
                             "is on disk or the model's corpus came from the network")
    max_per_task: int = flag(-1, "examples of each CORE task; -1: all")
    split_tokens: int = flag(40 * 524288, "tokens of each split for bits per byte")
    device_batch_size: int = flag(32, "rows of the model's length per device")
    mesh: str = flag("auto", "devices as DxM: D-way data and M-way tensor parallelism")
    dtype: str = flag("auto", "compute dtype", choices=["auto", "float32", "bfloat16"])
    model_tag: str | None = flag(None, "name of the checkpoint directory; default the largest d<depth>", short="-g")
    step: int | None = flag(None, "step of the checkpoint; default the newest", short="-s")

    def __post_init__(self) -> None:
        unknown = set(self.eval.split(",")) - set(KINDS)
        if self.eval != "auto" and unknown:
            raise ValueError(f"--eval {self.eval!r}: expected auto, or some of {', '.join(KINDS)} joined by commas")


def core_metric(config: BaseEvalConfig, loaded: Loaded, bundle: Path, paths: Paths, mesh, dtype) -> dict[str, float]:
    model = loaded.config
    batching = Batching(tokens=config.device_batch_size * model.sequence_len * data_size(mesh), mesh=mesh)
    scorer = Scorer(config=model, params=loaded.params, batching=batching, compute_dtype=dtype)
    result = evaluate_core(scorer, loaded.tokenizer, bundle, max_per_task=config.max_per_task)
    table = format_csv(result)
    log.info("%s", table)
    if jax.process_index() == 0:
        path = paths.base / "base_eval" / f"base_model_{loaded.step:06d}.csv"
        path.parent.mkdir(exist_ok=True)
        aside = path.with_suffix(".tmp")
        aside.write_text(table, encoding="utf-8")
        os.replace(aside, path)
    return {"core": result.core, **result.centered}


def main(config: BaseEvalConfig) -> None:
    paths = Paths.from_env()
    start(paths, processes=config)
    mesh, dtype = make_mesh(config.mesh), resolve_dtype(config.dtype)
    loaded = load_model(paths, "base", tag=config.model_tag, step=config.step, mesh=mesh)

    kinds, notes = config.eval.split(","), []
    if config.eval == "auto":
        kinds = ["sample"]
        if has_bundle(paths) or loaded.meta["data"] != "embedded":
            kinds.append("core")
        else:
            notes.append(f"CORE was not run: the model was trained on the embedded corpus and {paths.eval_bundle} is "
                         "not on disk. `--eval core,sample` fetches it.")
            log.warning("%s", notes[0])
    results: dict[str, float] = {}
    items: list = [f"Model: {loaded.tag}, step {loaded.step}", dataclasses.asdict(config), *notes]
    if "core" in kinds:
        results |= core_metric(config, loaded, ensure_bundle(paths), paths, mesh, dtype)
    if "bpb" in kinds:
        results |= corpus_bits_per_byte(loaded, paths, device_batch_size=config.device_batch_size,
                                        split_tokens=config.split_tokens, mesh=mesh, dtype=dtype)
    items.append(results)
    if "sample" in kinds:
        greedy, free = greedy_samples(loaded, dtype=dtype, mesh=mesh), free_samples(loaded, 8, dtype=dtype, mesh=mesh)
        for text in (*greedy, *free):
            log.info("  %s", text.replace("\n", " "))
        items += [{f"sample {i}": text for i, text in enumerate(greedy)},
                  {f"unconditioned sample {i}": text for i, text in enumerate(free)}]
    if jax.process_index() == 0:
        report.log_section(paths.report, "Base model evaluation", items, stage="base_eval", results=results)


if __name__ == "__main__":
    cli.run(main, BaseEvalConfig, prog="scripts.base_eval", description=__doc__.splitlines()[0])
