"""Bits per byte of the base model on both splits, and a few greedy samples.

python -m scripts.base_loss
"""

import dataclasses
from dataclasses import dataclass

import jax

from nanochat_jax import cli
from nanochat_jax.checkpoint import load_model
from nanochat_jax.cli import LARGEST, count
from nanochat_jax.devices import ModelFlags, Processes, start
from nanochat_jax.eval.bpb import corpus_bits_per_byte
from nanochat_jax.eval.samples import PROMPTS, greedy_samples, sample_items
from nanochat_jax.files import make_directory
from nanochat_jax.infer.engine import Engine
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.paths import Paths
from nanochat_jax.report import sections


@dataclass(frozen=True, kw_only=True)
class BaseLossConfig(ModelFlags, Processes):
    device_batch_size: int = count(32, "rows per device", at_most=10**6)
    split_tokens: int = count(20 * 524288, "tokens of each split", at_most=LARGEST)


def main(config: BaseLossConfig) -> None:
    paths = Paths.from_env()
    start(paths, config)
    make_directory(paths.report)
    mesh = make_mesh(config.mesh)
    compute = Compute.on(mesh, dtype=config.dtype)
    loaded = load_model(paths, "base", tag=config.model_tag, step=config.step, mesh=mesh)
    results = corpus_bits_per_byte(
        loaded,
        paths,
        device_batch_size=config.device_batch_size,
        split_tokens=config.split_tokens,
        compute=compute,
    )
    engine = Engine(
        loaded.config, loaded.params, loaded.tokenizer, num_slots=len(PROMPTS), compute=compute
    )
    samples = sample_items(greedy_samples(engine, loaded.tokenizer))
    if jax.process_index() == 0:
        section, model = "Base model loss", f"{loaded.tag}, step {loaded.step}"
        with sections.earlier_evaluation(paths.report, section, model):
            sections.log_section(
                paths.report,
                section,
                [dataclasses.asdict(config), results, *samples],
                stage="base_loss",
                results=results,
                model=model,
            )


if __name__ == "__main__":
    cli.run(main, BaseLossConfig, prog="scripts.base_loss", description=__doc__)
