"""Our vocabulary as the files that `transformers.AutoTokenizer` loads, and back."""

import json
from pathlib import Path

from nanochat_jax.conversation import PARTS
from nanochat_jax.errors import UsageError
from nanochat_jax.files import parse_json
from nanochat_jax.tokenizer import Tokenizer


def write_hf_tokenizer(tokenizer: Tokenizer, directory: Path, *, model_max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`: the same ids for any text, and the same
    rendering of a conversation as conversation.py's.

    One difference cannot be closed from here: the library takes the name of a special token, where
    it stands in a text, for the token. The chat template refuses messages that hold one.
    """
    character = {byte: char for char, byte in _byte_of_character().items()}

    def spell(token: bytes) -> str:
        return "".join(character[byte] for byte in token)

    ranks = tokenizer.mergeable_ranks
    merges = [
        _parts(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1
    ]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "post_processor": None,
        "added_tokens": [
            {
                "id": rank,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for name, rank in tokenizer.special_tokens.items()
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": tokenizer.pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # as tiktoken: a chunk that is a token is that token, however its merges go
            "ignore_merges": True,
            "vocab": {spell(token): rank for token, rank in ranks.items()},
            "merges": [[spell(left), spell(right)] for left, right in merges],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model_max_length,
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|bos|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": chat_template(list(tokenizer.special_tokens)),
    }
    for name, value in (("tokenizer.json", content), ("tokenizer_config.json", settings)):
        (directory / name).write_text(
            json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )


def _parts(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens whose merge made this one: what is left when only earlier merges are done."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, len(ranks)) for left, right in zip(parts, parts[1:])]
        lowest = min(range(len(pairs)), key=pairs.__getitem__)
        if pairs[lowest] >= ranks[token]:
            raise UsageError(
                f"token {ranks[token]} ({token!r}) is no merge of two earlier ones: the "
                "vocabulary cannot be "
                "written for Hugging Face"
            )
        parts[lowest : lowest + 2] = [parts[lowest] + parts[lowest + 1]]
    return parts[0], parts[1]


def chat_template(special_tokens: list[str]) -> str:
    """A Jinja template that renders a conversation as conversation.py does.

    Roles alternate, a system message is merged into the user's first message, and an assistant's
    message is a text or a list of parts. A system message alone is rendered as a user's message.

    `generation` tags enclose what conversation.py's mask selects. From them, transformers computes
    the mask for trainers. Each pair of tags encloses a complete run of learned parts: transformers
    maps characters to tokens, and one character may have several tokens.
    """
    around = {
        part_type: (start or "", end or "", learned)
        for part_type, (start, end, learned) in PARTS.items()
    }
    # `checked` holds the text since the last control token: names that two parts make together are
    # found too.
    lines = [
        "{%- macro check(text) -%}",
        "{%- if text is not string -%}{{ raise_exception('the content of a message must be text') "
        "}}{%- endif -%}",
        f"{{%- for name in {special_tokens!r} -%}}",
        "{%- if name in text -%}{{ raise_exception('a message holds the special token ' ~ name) "
        "}}{%- endif -%}",
        "{%- endfor -%}",
        "{%- endmacro -%}",
        "{{- '<|bos|>' -}}",
        "{%- set turns = messages -%}",
        "{%- if messages[0].role == 'system' -%}",
        "{{- check(messages[0].content) -}}",
        "{%- set first = {'role': 'user', 'content': messages[0].content} -%}",
        "{%- if messages|length > 1 -%}",
        "{%- if messages[1].role != 'user' -%}",
        "{{ raise_exception('the user must follow the system message') }}",
        "{%- endif -%}",
        "{{- check(messages[1].content) -}}",
        "{%- set merged = messages[0].content ~ '\n\n' ~ messages[1].content -%}",
        "{%- set first = {'role': 'user', 'content': merged} -%}",
        "{%- endif -%}",
        "{%- set turns = [first] + messages[2:] -%}",
        "{%- endif -%}",
        "{%- for message in turns -%}",
        "{%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}",
        "{{ raise_exception('user and assistant must take turns, the user first') }}",
        "{%- endif -%}",
        "{%- if message.role == 'user' -%}",
        "{{- check(message.content) -}}",
        "{{- '<|user_start|>' ~ message.content ~ '<|user_end|>' -}}",
        "{%- else -%}",
        "{{- '<|assistant_start|>' -}}",
        "{%- set state = namespace(checked='', learned='') -%}",
        "{%- set content = message.content -%}",
        "{%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}",
        "{%- for part in parts -%}",
        "{{- check(part.text) -}}",
        f"{{%- set around = {around!r}[part.type] -%}}",
        "{%- set state.checked = part.text if around[0] else state.checked ~ part.text -%}",
        "{{- check(state.checked) -}}",
        "{%- if around[0] -%}{%- set state.checked = '' -%}{%- endif -%}",
        "{%- set rendered = around[0] ~ part.text ~ around[1] -%}",
        "{%- if around[2] -%}{%- set state.learned = state.learned ~ rendered -%}",
        "{%- else -%}",
        "{%- if state.learned -%}",
        "{% generation %}{{- state.learned -}}{% endgeneration %}",
        "{%- endif -%}",
        "{%- set state.learned = '' -%}",
        "{{- rendered -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{% generation %}{{- state.learned ~ '<|assistant_end|>' -}}{% endgeneration %}",
        "{%- endif -%}",
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}",
    ]
    return "".join(lines)


def read_hf_tokenizer(path: Path) -> Tokenizer:
    """The vocabulary in a byte-level `tokenizer.json` such as ours: the merges are not needed, ids
    say their order.
    """
    try:
        content = parse_json(path.read_bytes())
        special = {token["content"]: token["id"] for token in content["added_tokens"]}
        characters = _byte_of_character()
        ranks = {
            bytes(characters[c] for c in token): rank
            for token, rank in content["model"]["vocab"].items()
            if token not in special
        }
        splits = [
            step["pattern"]["Regex"]
            for step in content["pre_tokenizer"]["pretokenizers"]
            if step["type"] == "Split"
        ]
        names = sorted(special, key=special.__getitem__)
        if [special[name] for name in names] != list(range(len(ranks), len(ranks) + len(names))):
            raise ValueError(f"the special tokens do not follow the {len(ranks)} others")
        return Tokenizer(ranks, pattern=splits[0], special_tokens=names)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UsageError(
            f"{path} is not a byte-level BPE such as nanochat's ({error!r})"
        ) from error


def _byte_of_character() -> dict[str, int]:
    """GPT-2's way to write bytes as printable characters: those that are stay, the others follow
    from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }
