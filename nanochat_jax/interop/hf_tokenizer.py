"""Our vocabulary as the files that `transformers.AutoTokenizer` loads, and back."""

import json
from pathlib import Path
from typing import Any

from nanochat_jax.conversation import PARTS
from nanochat_jax.errors import UsageError, explaining
from nanochat_jax.files import parse_json
from nanochat_jax.tokenizer import Tokenizer

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")


def write_hf_tokenizer(tokenizer: Tokenizer, directory: Path, *, model_max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`.

    Token ids of any text, and of any conversation, equal ours. A text begins with bos, as documents
    do in training, unless `add_special_tokens=False`. One difference remains: the library parses
    the name of a special token in a text as the token. The chat template refuses messages that
    contain one.
    """
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|bos|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template(list(tokenizer.special_tokens)),
    }
    files = {"tokenizer.json": _tokenizer_json(tokenizer), "tokenizer_config.json": settings}
    for name, value in files.items():
        text = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
        (directory / name).write_text(text, encoding="utf-8")


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    character = {byte: char for char, byte in _byte_of_character().items()}

    def spell(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    ranks = tokenizer.mergeable_ranks
    by_rank = sorted(ranks, key=ranks.__getitem__)
    merges = [_parts(token, ranks) for token in by_rank if len(token) > 1]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = False
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        # as in tiktoken: a piece of text that is a token needs no merges
        "ignore_merges": True,
        "vocab": {spell(token): rank for token, rank in ranks.items()},
        "merges": [[spell(left), spell(right)] for left, right in merges],
    }
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer")),
        "added_tokens": [
            {"id": rank, "content": name, **flags, "special": True}
            for name, rank in tokenizer.special_tokens.items()
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"behavior": "Isolated", "invert": False}, byte_level],
        },
        "post_processor": _beginning(tokenizer.bos_id),
        "decoder": byte_level,
        "model": model,
    }


def _beginning(bos: int) -> dict[str, Any]:
    """The step that begins a text with bos."""
    name = "<|bos|>"
    first = {"SpecialToken": {"id": name, "type_id": 0}}
    texts = [{"Sequence": {"id": text, "type_id": 0}} for text in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [first, texts[0]],
        "pair": [first, *texts],
        "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}},
    }


def _parts(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that merge into this one: what remains when only earlier merges are done."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:])]
        lowest = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[lowest] >= ranks[token]:
            raise UsageError(
                f"token {ranks[token]} ({token!r}) is not a merge of two earlier tokens, so the "
                "vocabulary cannot be exported to Hugging Face"
            )
        parts[lowest : lowest + 2] = [parts[lowest] + parts[lowest + 1]]
    return parts[0], parts[1]


def chat_template(special_tokens: list[str]) -> str:
    """A Jinja template that renders a conversation as conversation.py does.

    Roles alternate, a system message is merged into the user's first message, and an assistant's
    message is text or a list of parts. A system message alone is rendered as a user's message.

    `generation` tags enclose what conversation.py's mask selects; transformers computes the mask
    for trainers from them. Consecutive learned parts share one pair of tags: transformers maps
    characters to tokens, and one character may consist of several tokens.
    """
    parts = {
        name: (start or "", end or "", learned) for name, (start, end, learned) in PARTS.items()
    }
    variables = {"special_tokens": special_tokens, "parts": parts}
    settings = [f"{{%- set {name} = {value!r} -%}}" for name, value in variables.items()]
    return "\n".join([*settings, CHAT_TEMPLATE.read_text("utf-8").rstrip("\n")])


def read_hf_tokenizer(path: Path) -> Tokenizer:
    """The vocabulary in a byte-level `tokenizer.json`. Merges are ignored: ids give their order."""
    with explaining(f"{path} is not a byte-level BPE like nanochat's"):
        content = parse_json(path.read_bytes())
        special = {token["content"]: token["id"] for token in content["added_tokens"]}
        byte = _byte_of_character()
        ranks = {
            bytes(byte[char] for char in token): rank
            for token, rank in content["model"]["vocab"].items()
            if token not in special
        }
        steps = content["pre_tokenizer"]["pretokenizers"]
        pattern = [step["pattern"]["Regex"] for step in steps if step["type"] == "Split"][0]
        return Tokenizer.from_ids(ranks, special, pattern)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable characters for bytes: printable bytes as they are, others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }
