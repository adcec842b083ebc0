"""How fast a model generates on this machine: prefill, then decoding at several batch sizes.

    python -m scripts.infer_bench                                   the newest base model
    python -m scripts.infer_bench -i sft --batch-sizes 1,16 --decode-tokens 64

Prints a table, and a JSON object as the last line. nanochat_jax/infer/bench.py has the definitions.
"""

from dataclasses import dataclass

from nanochat_jax import cli
from nanochat_jax.checkpoint import load_model
from nanochat_jax.cli import flag
from nanochat_jax.devices import ModelFlags, start
from nanochat_jax.infer import bench
from nanochat_jax.infer.bench import STEPS_PER_DISPATCH, Workload
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.paths import CHECKPOINT_DIRS, Paths


@dataclass(frozen=True, kw_only=True)
class Config(ModelFlags):
    source: str = flag(
        "base", "stage whose model to load", short="-i", choices=list(CHECKPOINT_DIRS)
    )
    prompt_tokens: int = flag(
        2048,
        "length of the prompts; less if the context is too short for prompt and reply",
        at_least=2,
        at_most=2**24,
    )
    decode_tokens: int = flag(
        256, "tokens to generate per sequence", at_least=1 + STEPS_PER_DISPATCH, at_most=2**24
    )
    batch_sizes: str = flag("1,8,32,128", "list of numbers of parallel sequences")
    temperature: float = flag(
        0.0, "sampling temperature; 0 is greedy", short="-t", at_least=0, at_most=100
    )
    mesh: str = flag("1x1", "devices as DxM: slots over D, heads over M; auto uses all on D")

    def __post_init__(self) -> None:
        self.batches  # noqa: B018  (validates)

    @property
    def batches(self) -> list[int]:
        try:
            sizes = [int(size) for size in self.batch_sizes.split(",")]
        except ValueError:
            sizes = [0]
        if min(sizes) < 1 or max(sizes) > 10**6:
            raise ValueError(
                "--batch-sizes must be numbers from 1 to 1000000, as in 1,8,32, got "
                f"{self.batch_sizes!r}"
            )
        return sizes


def main(config: Config) -> None:
    paths = Paths.from_env()
    start(paths, config)
    mesh = make_mesh(config.mesh)
    workload = Workload(
        prompt_tokens=config.prompt_tokens,
        decode_tokens=config.decode_tokens,
        batch_sizes=config.batches,
        temperature=config.temperature,
    )
    bench.run(
        # not kept here, so that its float32 parameters can be freed
        load_model(paths, config.source, tag=config.model_tag, step=config.step, mesh=mesh),
        Compute.on(mesh, dtype=config.dtype),
        workload,
    )


if __name__ == "__main__":
    cli.run(main, Config, prog="scripts.infer_bench", description=__doc__)
