"""Uploading an exported model to the Hugging Face Hub, with a model card."""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from nanochat_jax.checkpoint import Loaded
from nanochat_jax.errors import UsageError, one_line
from nanochat_jax.files import write_file
from nanochat_jax.model.size import num_params

CARD = "README.md"
LOG_IN = "; log in with `hf auth login`, or set HF_TOKEN to a token that may write"
STAGES = {
    "base": "pretrained: it continues text",
    "mid": "midtrained on conversations",
    "sft": "finetuned for chat",
    "rl": "finetuned for chat, then with reinforcement learning",
}


def valid_name(repo: str) -> bool:
    """Whether a name has the form OWNER/NAME of the Hub."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo, re.ASCII) is not None


def create_repository(repo: str, *, private: bool) -> None:
    """Create a model repository unless it exists.

    Called before the export, because a missing token is found here. An existing repository stays
    public or private. Raises `UsageError`.
    """
    try:
        HfApi().create_repo(repo, private=private or None, exist_ok=True)
    except Exception as error:  # the HTTP client's errors have no common class
        raise _refused(f"cannot create {repo} on the Hub", error) from error


def push(directory: Path, repo: str, message: str) -> str:
    """Upload the files of a directory. Returns the model's URL. Raises `UsageError`."""
    try:
        HfApi().upload_folder(repo_id=repo, folder_path=directory, commit_message=message)
    except Exception as error:
        raise _refused(f"cannot upload to {repo}", error) from error
    return f"{HfApi().endpoint}/{repo}"


def _refused(what: str, error: Exception) -> UsageError:
    by_hub = isinstance(error, HfHubHTTPError | LocalTokenNotFoundError)
    return UsageError(f"{what}: {one_line(error)}{LOG_IN if by_hub else ''}")


def write_card(
    directory: Path, loaded: Loaded, repo: str, figures: Sequence[tuple[str, str]]
) -> None:
    """Write the model card: what the model is, `figures` (name and value), how to use it."""
    config = loaded.config
    modern = config.arch == "modern"
    vllm = (
        "vLLM cannot run this architecture."
        if modern
        else f"vLLM runs it too: `vllm serve {repo} --model-impl transformers`."
    )
    rows = [f"| {name} | {value} |" for name, value in figures]
    table = ["## Results", "", "| metric | value |", "|---|---|", *rows, ""] if rows else []
    lines = [
        *("---", "library_name: transformers", "pipeline_tag: text-generation"),
        *("tags:", "- nanochat", "---", ""),
        *(f"# {repo.rpartition('/')[2]}", ""),
        "A small language model of [nanochat](https://github.com/karpathy/nanochat)'s "
        f"{config.arch} architecture, trained with nanochat_jax, a JAX implementation. "
        f"It is {STAGES[loaded.source]}.",
        "",
        f"- {num_params(config):,} parameters: {config.n_layer} layers of width {config.n_embd}",
        f"- context of {config.sequence_len:,} tokens, vocabulary of {config.vocab_size:,}",
        f"- stage {loaded.source}, step {loaded.step:,}",
        "",
        *table,
        *("## Use", "", "```python", *_example(repo, loaded.source, modern), "```", ""),
        "A text begins with `<|bos|>`, which the tokenizer adds. " + vllm,
    ]
    write_file(directory / CARD, "\n".join(lines) + "\n")


def _example(repo: str, source: str, modern: bool) -> list[str]:
    """Three lines of Python that use the model."""
    trust = ", trust_remote_code=True" if modern else ""
    prompt, answer = '"The capital of France is"', '["generated_text"]'
    if source != "base":
        prompt = '[{"role": "user", "content": "Why is the sky blue?"}]'
        answer += '[-1]["content"]'
    return [
        "from transformers import pipeline",
        f'generate = pipeline("text-generation", "{repo}"{trust})',
        f"print(generate({prompt}, max_new_tokens=64)[0]{answer})",
    ]
