"""How fast a model generates on this machine: prefill, then decoding at several batch sizes.

    python -m scripts.infer_bench                                   the newest base model
    python -m scripts.infer_bench -i sft --batch-sizes 1,16 --decode-tokens 64

Prints a table, and a JSON object as the last line. nanochat_jax/infer/bench.py has the definitions.
"""

from dataclasses import dataclass

from nanochat_jax import cli
from nanochat_jax.checkpoint import load_model
from nanochat_jax.cli import flag, inherited
from nanochat_jax.devices import EngineFlags, start
from nanochat_jax.infer import bench
from nanochat_jax.infer.bench import Workload
from nanochat_jax.model.compute import Compute
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.paths import Paths


@dataclass(frozen=True, kw_only=True)
class Config(Workload, EngineFlags):
    source: str = inherited(EngineFlags, "source", "base")
    mesh: str = flag("1x1", "devices as DxM: slots over D, heads over M; auto uses all on D")


def main(config: Config) -> None:
    paths = Paths.from_env()
    start(paths, config)
    mesh = make_mesh(config.mesh)
    bench.run(
        # not kept here, so that its float32 parameters can be freed
        load_model(paths, config.source, tag=config.model_tag, step=config.step, mesh=mesh),
        Compute.on(mesh, dtype=config.dtype, cache_dtype=config.cache_dtype),
        config,
    )


if __name__ == "__main__":
    cli.run(main, Config, prog="scripts.infer_bench", description=__doc__)
