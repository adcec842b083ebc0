"""Chat with a trained model in the browser.

    python -m scripts.serve                     the newest finetuned model, on http://127.0.0.1:8000
    python -m scripts.serve -i rl -g d20 -p 8080
    python -m scripts.serve --host 0.0.0.0      open to the network: there is no password
"""

import asyncio
import ipaddress
import socket
from dataclasses import dataclass

from nanochat_jax import cli
from nanochat_jax.checkpoint import load_model
from nanochat_jax.cli import flag
from nanochat_jax.infer.engine import Engine
from nanochat_jax.infer.scheduler import Scheduler
from nanochat_jax.paths import CHECKPOINT_DIRS, Paths
from nanochat_jax.serve import server
from nanochat_jax.serve.chat_request import Sampling
from nanochat_jax.sharding import make_mesh
from nanochat_jax.startup import start
from nanochat_jax.step import resolve_dtype

DESCRIPTION = "Chat with a trained model in the browser."


@dataclass(frozen=True, kw_only=True)
class Config:
    source: str = flag("sft", "stage whose model to load", short="-i", choices=list(CHECKPOINT_DIRS))
    model_tag: str | None = flag(None, "model tag; the largest d<depth> if not given", short="-g")
    step: int | None = flag(None, "step; the last if not given", short="-s")
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 is open to the network, without a password")
    port: int = flag(8000, "port to listen on; 0 takes a free one", short="-p")
    temperature: float = flag(0.8, "temperature where a request has none", short="-t")
    top_k: int = flag(50, "top-k where a request has none; 0 keeps all tokens", short="-k")
    max_tokens: int = flag(512, "longest reply in tokens where a request does not say", short="-m")
    slots: int = flag(8, "replies that are generated at the same time; more wait in a queue")
    mesh: str = flag("1x1", "devices as DxM: slots over D, heads over M; auto uses all on D")
    dtype: str = flag("auto", "compute dtype", short="-d", choices=["auto", "float32", "bfloat16"])

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be from 0 to 65535, got {self.port}")
        if self.slots < 1:
            raise ValueError(f"--slots must be at least 1, got {self.slots}")
        self.sampling  # noqa: B018  (its check of the ranges)

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_k=self.top_k, max_tokens=self.max_tokens)


def main(config: Config) -> None:
    paths = Paths.from_env()
    with server.bind(config.host, config.port) as sock:  # a taken port is known before the model is loaded
        start(paths)
        mesh = make_mesh(config.mesh)
        model = load_model(paths, config.source, tag=config.model_tag, step=config.step, mesh=mesh)
        engine = Engine(model.config, model.params, model.tokenizer, num_slots=config.slots,
                        compute_dtype=resolve_dtype(config.dtype), mesh=mesh)
        info = {"name": f"{model.source} {model.tag}, step {model.step}", "source": model.source, "tag": model.tag,
                "step": model.step, "context": engine.max_len}
        with Scheduler(engine) as scheduler:
            app = server.create_app(scheduler, model.tokenizer, info, max_len=engine.max_len, num_slots=config.slots,
                                    devices=tuple(map(str, mesh.devices.flat)), defaults=config.sampling)
            asyncio.run(server.run(app, sock, lambda: print(greeting(config.host, sock), flush=True)))


def greeting(host: str, sock: socket.socket) -> str:
    address, port = sock.getsockname()[:2]
    ip = ipaddress.ip_address(address)
    if ip.is_loopback:
        note = "Only this machine can reach it; --host 0.0.0.0 opens it to the network, without a password."
    else:
        note = "Everyone who can reach this machine can use it: there is no password."
    shown = "127.0.0.1" if ip.is_unspecified else f"[{host}]" if ":" in host else host
    return f"Chat at http://{shown}:{port}\n{note} Ctrl+C stops it."


if __name__ == "__main__":
    cli.run(main, Config, prog="scripts.serve", description=DESCRIPTION)
