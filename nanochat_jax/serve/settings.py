"""The settings of the chat server, which are also flags of `scripts.serve`."""

import ipaddress
import os
import re
import socket
from dataclasses import dataclass

from nanochat_jax.cli import count, flag
from nanochat_jax.infer.request import Sampling
from nanochat_jax.serve.chat_request import MAX_TEMPERATURE, MAX_TOKENS, MAX_TOP_K

API_KEY_VARIABLE = "NANOCHAT_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """How the server listens, whom it accepts, and its default sampling."""

    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 is open to the network")
    port: int = flag(
        8000, "port to listen on; 0 takes a free one", short="-p", at_least=0, at_most=65535
    )
    temperature: float = flag(
        0.8, "default temperature of requests", short="-t", at_least=0, at_most=MAX_TEMPERATURE
    )
    top_k: int = flag(
        50,
        "default top-k of requests; 0 keeps all tokens",
        short="-k",
        at_least=0,
        at_most=MAX_TOP_K,
    )
    max_tokens: int = count(
        512, "default maximum length of a reply in tokens", short="-m", at_most=MAX_TOKENS
    )
    max_queue: int = count(
        64, "maximum number of requests that wait for a slot; more get status 503", at_most=10**6
    )
    timeout: float = flag(
        600.0, "seconds that a reply may take, queueing included", at_least=0.001, at_most=10**9
    )
    grace: float = flag(
        10.0,
        "seconds for replies in progress to end when the server is stopped",
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
        "host names that clients may use, as a.com,b.com; * is any; default localhost if only "
        "this machine can reach the server, else any",
    )

    def __post_init__(self) -> None:
        if self.key is not None and not re.fullmatch(r"[!-~]+", self.key):
            raise ValueError("`api_key` must be printable ASCII characters without spaces")
        for origin in self.cors_origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(
                    "`cors_origin` must be * or like https://example.com, without a path, "
                    f"got {origin!r}"
                )
        names = r"(\*|[\w.-]+)(,(\*|[\w.-]+))*"
        if self.allowed_hosts is not None and not re.fullmatch(names, self.allowed_hosts):
            raise ValueError(
                "`allowed_hosts` must be * or names like example.com, without https:// or a port, "
                f"got {self.allowed_hosts!r}"
            )

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_k=self.top_k, max_tokens=self.max_tokens)

    @property
    def key(self) -> str | None:
        """The API key; None lets everyone in."""
        if self.api_key is not None:
            return self.api_key
        return os.environ.get(API_KEY_VARIABLE) or None

    @property
    def cors_origins(self) -> tuple[str, ...]:
        return tuple(self.cors_origin.split(",")) if self.cors_origin is not None else ()

    def hosts(self, sock: socket.socket) -> tuple[str, ...]:
        """Host names that requests to the server on `sock` may use; "*" is any."""
        if self.allowed_hosts is not None:
            return (self.host, *self.allowed_hosts.split(","))
        return (self.host,) if _address(sock).is_loopback else ("*",)

    def greeting(self, sock: socket.socket, model_id: str) -> str:
        """The server's addresses, and who can reach it."""
        address, port, host = _address(sock), sock.getsockname()[1], self.host
        if address.is_loopback:
            note = "Only this machine can reach it; `host=0.0.0.0` opens it to the network."
        elif self.key is not None:
            note = "Everyone who can reach this machine and has the key can use it. No encryption."
        else:
            note = (
                "WARNING: everyone who can reach this machine can use it. Set a key: "
                f"{API_KEY_VARIABLE}=$(openssl rand -hex 16), or `host=127.0.0.1` for yourself."
            )
        if address.is_unspecified:
            host = "127.0.0.1"
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        return f"Chat at {url}\nOpenAI API at {url}/v1, model {model_id}\n{note} Ctrl+C stops it."


def _address(sock: socket.socket) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(sock.getsockname()[0])
