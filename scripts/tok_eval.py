"""Measure the tokenizer's compression, compared to GPT-2's and GPT-4's.

    python -m scripts.tok_eval

tiktoken downloads those two once. Without a network they are left out, with a warning.
"""

from dataclasses import dataclass

from nanochat_jax import cli
from nanochat_jax.cli import flag
from nanochat_jax.eval.compression import measure_compression
from nanochat_jax.files import make_directory
from nanochat_jax.paths import DATA_DIRS, Paths
from nanochat_jax.report import sections
from nanochat_jax.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Config:
    data: str = flag(
        "auto", "corpus to take text from; auto: the one on disk", choices=["auto", *DATA_DIRS]
    )


def main(config: Config) -> None:
    paths = Paths.from_env()
    make_directory(paths.report)
    tokenizer = Tokenizer.load(paths.tokenizer)
    corpus = paths.data(paths.find_data() if config.data == "auto" else config.data)
    results, content = measure_compression(tokenizer, corpus)
    sections.log_section(
        paths.report, "Tokenizer evaluation", content, stage="tok_eval", results=results
    )


if __name__ == "__main__":
    cli.run(main, Config, prog="scripts.tok_eval", description=__doc__)
