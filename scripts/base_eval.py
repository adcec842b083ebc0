"""Evaluate a base model: CORE, bits per byte, and samples.

python -m scripts.base_eval
python -m scripts.base_eval --eval core,bpb,sample --max-per-task 100
python -m scripts.base_eval --eval core --hf-path ~/models/gpt2
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from nanochat_jax import cli
from nanochat_jax.checkpoint import load_model
from nanochat_jax.cli import LARGEST, flag
from nanochat_jax.devices import ModelFlags, Processes, start
from nanochat_jax.eval.bpb import corpus_bits_per_byte
from nanochat_jax.eval.bundle import ensure_bundle, has_bundle
from nanochat_jax.eval.core import Scorer as CoreScorer
from nanochat_jax.eval.core import evaluate_core, format_csv
from nanochat_jax.eval.samples import PROMPTS, free_samples, greedy_samples, sample_items
from nanochat_jax.eval.scoring import Scorer, rows_for
from nanochat_jax.files import make_directory, write_file
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.paths import Paths
from nanochat_jax.report import sections

log = logging.getLogger(__name__)

KINDS = ("core", "bpb", "sample")


@dataclass(frozen=True, kw_only=True)
class BaseEvalConfig(ModelFlags, Processes):
    eval: str = flag(
        "auto",
        "which of core, bpb and sample, joined by commas; auto: samples, and CORE if its bundle "
        "is on disk or the model's corpus came from the network",
    )
    max_per_task: int = flag(
        -1, "examples of each CORE task; -1: all", at_least=1, at_most=10**9, also=-1
    )
    split_tokens: int = flag(
        40 * 524288, "tokens of each split for bits per byte", at_least=1, at_most=LARGEST
    )
    device_batch_size: int = flag(
        32, "rows of the model's length per device", at_least=1, at_most=10**6
    )
    mesh: str = flag("auto", "devices as DxM: D-way data and M-way tensor parallelism")
    hf_path: str | None = flag(
        None, "evaluate this directory of a transformers model instead; needs the extra torch"
    )
    trust_remote_code: bool = flag(False, "let --hf-path run model code that lies in its directory")

    def __post_init__(self) -> None:
        if self.hf_path and (self.mesh, self.dtype, self.model_tag, self.step) != (
            "auto",
            "auto",
            None,
            None,
        ):
            raise ValueError(
                "--mesh, --dtype, --model-tag and --step have no meaning for --hf-path: leave "
                "them out"
            )
        unknown = set(self.kinds) - set(KINDS)
        if self.eval != "auto" and unknown:
            raise ValueError(
                f"--eval {self.eval!r}: expected auto, or some of {', '.join(KINDS)} joined by "
                "commas"
            )

    @property
    def kinds(self) -> list[str]:
        return self.eval.split(",")


def core_metric(
    scorer: CoreScorer, tokenizer: Any, config: BaseEvalConfig, paths: Paths, name: str
) -> dict[str, float]:
    table_dir = paths.base / "base_eval"
    if jax.process_index() == 0:
        make_directory(table_dir)
    result = evaluate_core(
        scorer, tokenizer, ensure_bundle(paths), max_per_task=config.max_per_task
    )
    table = format_csv(result)
    log.info("%s", table)
    if jax.process_index() == 0:
        write_file(table_dir / f"{name}.csv", table)
    return {"core": result.core, **result.centered}


def evaluate_ours(config: BaseEvalConfig, paths: Paths) -> tuple[str, dict[str, float], list]:
    """(model name, results, other items of the report) of a nanochat_jax checkpoint."""
    mesh = make_mesh(config.mesh)
    compute = Compute.on(mesh, dtype=config.dtype)
    loaded = load_model(paths, "base", tag=config.model_tag, step=config.step, mesh=mesh)
    kinds, results, items = config.kinds, dict[str, float](), list[str | dict[str, str]]()
    if config.eval == "auto":
        kinds = ["sample"]
        if has_bundle(paths) or loaded.meta["data"] != "embedded":
            kinds.append("core")
        else:
            said = (
                "CORE was not run: the model was trained on the embedded corpus and "
                f"{paths.eval_bundle} is "
                "not on disk. `--eval core,sample` fetches it."
            )
            items.append(said)
            log.warning("%s", said)
    if "core" in kinds:
        scorer = Scorer(
            config=loaded.config,
            params=loaded.params,
            num_rows=rows_for(config.device_batch_size),
            compute=compute,
        )
        results |= core_metric(
            scorer, loaded.tokenizer, config, paths, f"base_model_{loaded.tag}_{loaded.step:06d}"
        )
    if "bpb" in kinds:
        results |= corpus_bits_per_byte(
            loaded,
            paths,
            device_batch_size=config.device_batch_size,
            split_tokens=config.split_tokens,
            compute=compute,
        )
    if "sample" in kinds:
        items += sample_items(
            greedy_samples(loaded, compute=compute), free_samples(loaded, 8, compute=compute)
        )
    return f"{loaded.tag}, step {loaded.step}", results, items


def evaluate_hf(
    hf_path: str, config: BaseEvalConfig, paths: Paths
) -> tuple[str, dict[str, float], list]:
    """(model name, results, other items of the report) of a transformers model."""
    from nanochat_jax.eval.hf_model import HFModel  # an optional extra

    directory = Path(hf_path)
    model = HFModel(
        directory,
        tokens=config.device_batch_size * 1024,
        trust_remote_code=config.trust_remote_code,
    )
    kinds = config.kinds if config.eval != "auto" else ["core", "sample"]
    results, items = dict[str, float](), []
    if "core" in kinds:
        results |= core_metric(
            model, model.tokenizer, config, paths, hf_path.strip("/").replace("/", "-")
        )
    if "bpb" in kinds:
        results |= model.bits_per_byte(
            paths.data(paths.find_data()), config.device_batch_size, config.split_tokens
        )
    if "sample" in kinds:
        items += sample_items(
            [prompt + model.continuation(prompt, 16) for prompt in PROMPTS],
            [model.continuation("", 128, seed=i) for i in range(8)],
        )
    return str(directory), results, items


def main(config: BaseEvalConfig) -> None:
    paths = Paths.from_env()
    start(paths, config)
    make_directory(paths.report)
    name, results, items = (
        evaluate_hf(config.hf_path, config, paths)
        if config.hf_path
        else evaluate_ours(config, paths)
    )
    if jax.process_index() == 0:
        section = "Base model evaluation"
        with sections.earlier_evaluation(paths.report, section, name) as earlier:
            if earlier:
                results = earlier.results | results
                items = items or [
                    item
                    for item in earlier.items
                    if isinstance(item, dict) and any("sample " in key for key in item)
                ]
            sections.log_section(
                paths.report,
                section,
                [f"Model: {name}", dataclasses.asdict(config), results, *items],
                stage="base_eval",
                results=results,
                model=name,
            )


if __name__ == "__main__":
    cli.run(main, BaseEvalConfig, prog="scripts.base_eval", description=__doc__)
