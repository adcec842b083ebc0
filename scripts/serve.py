"""Chat with a trained model in the browser, or through OpenAI's API.

    python -m scripts.serve                     the newest finetuned model, on 127.0.0.1:8000
    python -m scripts.serve -i rl -g d20 -p 8080
    NANOCHAT_API_KEY=... python -m scripts.serve --host 0.0.0.0     on the network, with a key

OpenAI's clients connect to http://127.0.0.1:8000/v1; the server prints its model's id.
"""

import contextlib
from dataclasses import dataclass

from nanochat_jax import cli
from nanochat_jax.cli import count, flag
from nanochat_jax.devices import EngineFlags, start
from nanochat_jax.infer.scheduler import Scheduler
from nanochat_jax.infer.warmup import warmup
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.paths import Paths
from nanochat_jax.pretrained import load_engine
from nanochat_jax.serve import server
from nanochat_jax.serve.settings import ServerConfig

DESCRIPTION = "Chat with a trained model in the browser, or through OpenAI's API."


@dataclass(frozen=True, kw_only=True)
class Config(ServerConfig, EngineFlags):
    slots: int = count(
        8, "maximum number of replies in progress; more requests wait in a queue", at_most=10**6
    )
    num_gpus: int | None = count(
        None, "devices to shard the slots over: short for --mesh <n>x1", short="-n", at_most=10**6
    )
    mesh: str | None = flag(
        None, "devices as DxM: slots over D, heads over M; auto uses all on D; default one device"
    )
    warmup: bool = flag(
        True, "compile all programs in the background; false compiles what requests need"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_gpus is not None and self.mesh is not None:
            raise ValueError("--num-gpus is short for --mesh: give only one of them")

    @property
    def devices(self) -> str:
        """The mesh in the form of `make_mesh`."""
        return f"{self.num_gpus}x1" if self.num_gpus is not None else self.mesh or "1x1"


def main(config: Config) -> None:
    paths = Paths.from_env()
    # report a taken port before loading the model
    with server.bind(config.host, config.port) as sock:
        start(paths, config)
        engine, model = load_engine(
            paths, config.source, config, mesh=make_mesh(config.devices), num_slots=config.slots
        )
        greeting = cli.with_flags(config.greeting(sock, server.model_id(model)), Config)
        compilation = warmup(engine) if config.warmup else contextlib.nullcontext()
        with compilation, Scheduler(engine, max_waiting=config.max_queue) as scheduler:
            app = server.create_app(scheduler, model, config, config.hosts(sock))
            server.run(app, sock, lambda: print(greeting, flush=True))


if __name__ == "__main__":
    cli.run(main, Config, prog="scripts.serve", description=DESCRIPTION)
