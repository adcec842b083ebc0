"""Chat with a trained model in the browser, or through OpenAI's API.

    python -m scripts.serve                     the newest finetuned model, on 127.0.0.1:8000
    python -m scripts.serve -i rl -g d20 -p 8080
    NANOCHAT_API_KEY=... python -m scripts.serve --host 0.0.0.0     on the network, with a key

OpenAI's clients connect to http://127.0.0.1:8000/v1; the server prints its model's id.
"""

import ipaddress
import logging
import os
import re
import socket
from dataclasses import dataclass

from nanochat_jax import cli
from nanochat_jax.cli import flag
from nanochat_jax.devices import ModelFlags, start
from nanochat_jax.infer.scheduler import Scheduler
from nanochat_jax.model.sharding import make_mesh
from nanochat_jax.paths import CHECKPOINT_DIRS, Paths
from nanochat_jax.pretrained import load_engine
from nanochat_jax.serve import server
from nanochat_jax.serve.chat_request import Sampling

DESCRIPTION = "Chat with a trained model in the browser, or through OpenAI's API."
API_KEY_VARIABLE = "NANOCHAT_API_KEY"

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Config(ModelFlags):
    source: str = flag(
        "sft", "stage whose model to load", short="-i", choices=list(CHECKPOINT_DIRS)
    )
    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 is open to the network")
    port: int = flag(
        8000, "port to listen on; 0 takes a free one", short="-p", at_least=0, at_most=65535
    )
    temperature: float = flag(
        0.8, "temperature where a request has none", short="-t", at_least=0, at_most=2
    )
    top_k: int = flag(
        50,
        "top-k where a request has none; 0 keeps all tokens",
        short="-k",
        at_least=0,
        at_most=200,
    )
    max_tokens: int = flag(
        512,
        "longest reply in tokens where a request does not say",
        short="-m",
        at_least=1,
        at_most=4096,
    )
    slots: int = flag(
        8,
        "replies that are generated at the same time; more wait in a queue",
        at_least=1,
        at_most=10**6,
    )
    max_queue: int = flag(
        64,
        "requests that may wait for a slot; more are told to try again",
        at_least=1,
        at_most=10**6,
    )
    timeout: float = flag(
        600.0,
        "seconds that a reply may take, its time in the queue included",
        at_least=0.001,
        at_most=10**9,
    )
    grace: float = flag(
        10.0,
        "seconds that replies in flight are given when the server is told to stop",
        at_least=0,
        at_most=10**9,
    )
    api_key: str | None = flag(
        None, f"key that clients must send; {API_KEY_VARIABLE} keeps it out of `ps`"
    )
    cors_origin: str | None = flag(
        None, "origins whose pages may call, as https://a.com,https://b.com; * is all"
    )
    allowed_hosts: str | None = flag(
        None,
        "names that clients may call the server by, as a.com,b.com; * is any; default "
        "localhost where only this machine can reach it, else any",
    )
    num_gpus: int | None = flag(
        None,
        "devices to spread the slots over: short for --mesh <n>x1",
        short="-n",
        at_least=1,
        at_most=10**6,
    )
    mesh: str | None = flag(
        None, "devices as DxM: slots over D, heads over M; auto uses all on D; default one device"
    )
    warmup: bool = flag(
        True, "compile all programs first, so that no request waits for it; false starts at once"
    )

    def __post_init__(self) -> None:
        if self.num_gpus is not None and self.mesh is not None:
            raise ValueError("--num-gpus is short for --mesh: not together with it")
        if self.key is not None and not re.fullmatch(r"[!-~]+", self.key):
            raise ValueError(
                "--api-key must be of printable ASCII characters, without spaces, one at least"
            )
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(
                    "--cors-origin must be * or like https://example.com, without a path, got "
                    f"{origin!r}"
                )
        if self.allowed_hosts is not None and not re.fullmatch(
            r"(\*|[\w.-]+)(,(\*|[\w.-]+))*", self.allowed_hosts
        ):
            raise ValueError(
                "--allowed-hosts must be names like example.com, without https:// or a port, or *, "
                f"got {self.allowed_hosts!r}"
            )

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{name: getattr(self, name) for name in Sampling.model_fields})

    @property
    def key(self) -> str | None:
        return (
            self.api_key if self.api_key is not None else os.environ.get(API_KEY_VARIABLE) or None
        )

    @property
    def cors_origins(self) -> tuple[str, ...]:
        return tuple(self.cors_origin.split(",")) if self.cors_origin is not None else ()

    def hosts(self, sock: socket.socket) -> tuple[str, ...]:
        """Host names that requests to the server on `sock` may use; "*": any."""
        if self.allowed_hosts is not None:
            return (self.host, *self.allowed_hosts.split(","))
        return (self.host,) if ipaddress.ip_address(sock.getsockname()[0]).is_loopback else ("*",)

    @property
    def devices(self) -> str:
        """The mesh in the form of `make_mesh`."""
        return f"{self.num_gpus}x1" if self.num_gpus is not None else self.mesh or "1x1"


def main(config: Config) -> None:
    paths = Paths.from_env()
    # report a taken port before loading the model
    with server.bind(config.host, config.port) as sock:
        start(paths, config)
        mesh = make_mesh(config.devices)
        engine, model = load_engine(
            paths,
            config.source,
            tag=config.model_tag,
            step=config.step,
            dtype=config.dtype,
            mesh=mesh,
            num_slots=config.slots,
        )
        info = {
            "name": f"{model.source} {model.tag}, step {model.step}",
            "source": model.source,
            "tag": model.tag,
            "step": model.step,
            "context": engine.max_len,
        }
        model_id = f"nanochat-{model.tag}-{model.source}"
        if config.warmup:
            log.info(
                "compiling for every length of prompt and reply, which takes a minute or so; "
                "clients wait meanwhile "
                "(--warmup 0 compiles when a request comes)"
            )
            engine.warmup()
        with Scheduler(engine, max_waiting=config.max_queue) as scheduler:
            app = server.create_app(
                scheduler,
                model.tokenizer,
                info,
                max_len=engine.max_len,
                num_slots=config.slots,
                devices=tuple(map(str, mesh.devices.flat)),
                defaults=config.sampling,
                model_id=model_id,
                hosts=config.hosts(sock),
                api_key=config.key,
                cors_origins=config.cors_origins,
                deadline=config.timeout,
                grace=config.grace,
            )
            server.run(app, sock, lambda: print(greeting(config, sock, model_id), flush=True))


def greeting(config: Config, sock: socket.socket, model_id: str) -> str:
    """The server's addresses, and who can reach it."""
    address, port = sock.getsockname()[:2]
    ip = ipaddress.ip_address(address)
    if ip.is_loopback:
        note = "Only this machine can reach it; --host 0.0.0.0 opens it to the network."
    elif config.key is not None:
        note = (
            "Everyone who can reach this machine and knows the key can use it; "
            "nothing is encrypted on the way."
        )
    else:
        note = (
            "WARNING: everyone who can reach this machine can use it. Give it a key: "
            f"{API_KEY_VARIABLE}=$(openssl rand -hex 16), or --host 127.0.0.1 for yourself alone."
        )
    shown = (
        "127.0.0.1"
        if ip.is_unspecified
        else f"[{config.host}]"
        if ":" in config.host
        else config.host
    )
    url = f"http://{shown}:{port}"
    return f"Chat at {url}\nOpenAI API at {url}/v1, model {model_id}\n{note} Ctrl+C stops it."


if __name__ == "__main__":
    cli.run(main, Config, prog="scripts.serve", description=DESCRIPTION)
