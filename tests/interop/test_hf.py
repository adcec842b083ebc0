"""What we write, read by the real torch and transformers: the same tensors, logits, tokens and
generated text.
"""

import copy
import dataclasses
import json
import random

import jax
import numpy as np
import pytest
from golden_data import load_trained

torch = pytest.importorskip("torch", reason="needs the extra `torch`")
transformers = pytest.importorskip("transformers", reason="needs the extra `torch`")

import nanochat_jax  # noqa: E402
from nanochat_jax.conversation import render_conversation, render_for_completion  # noqa: E402
from nanochat_jax.interop.hf import write_hf  # noqa: E402
from nanochat_jax.interop.torch_checkpoint import read_checkpoint, write_checkpoint  # noqa: E402
from nanochat_jax.interop.torch_file import read_pt, write_pt  # noqa: E402
from nanochat_jax.model.config import GPTConfig  # noqa: E402
from nanochat_jax.model.weights import init_params  # noqa: E402
from nanochat_jax.serve import openai_api  # noqa: E402
from nanochat_jax.serve.chat_request import make_prompt  # noqa: E402
from nanochat_jax.tokenizer import Tokenizer  # noqa: E402

TEXTS = [
    "the cat sat on the mat, and the other cat did not: 12345 times!",
    "naïve café ☕ 你好, мир; 👩‍👩‍👧 ende\u0301",
    "  spaces\n\n\tand\r\nlines  ",
    "it's we'LL I'ſ don't",
    "",
    " ",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([text * 3 for text in TEXTS], 330)


@pytest.fixture(params=["classic", "modern"], scope="module")
def saved(request, tokenizer, tmp_path_factory):
    """A model of random weights, ours and transformers'; short windows of 128 keys, an odd
    vocabulary, grouped heads.
    """
    make = {"classic": GPTConfig.classic, "modern": GPTConfig.modern}[request.param]
    config = make(
        5, n_embd=48, n_head=4, n_kv_head=2, vocab_size=tokenizer.vocab_size, sequence_len=512
    )
    leaves, treedef = jax.tree.flatten(init_params(config, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    params = jax.tree.unflatten(
        treedef, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    )
    directory = tmp_path_factory.mktemp(request.param)
    write_hf(directory, config, params, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    return nanochat_jax.load(directory), theirs.eval(), directory


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.numpy()


def test_transformers_gives_our_logits(saved):
    """300 tokens, well past the short windows."""
    ours, theirs, _ = saved
    tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, (2, 300))
    assert theirs.dtype == torch.float32
    assert np.abs(torch_logits(theirs, tokens) - ours.logits(tokens)).max() < 1e-4


def test_transformers_generates_our_tokens(saved):
    """Through its cache, without it, with another prompt's left padding, and past the short
    windows.
    """
    ours, theirs, _ = saved
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, 256, size).tolist() for size in (120, 113)]
    expected = [ours.generate(prompt, max_tokens=30, temperature=0.0) for prompt in prompts]
    options = dict(max_new_tokens=30, do_sample=False)
    for use_cache in (True, False):
        found = theirs.generate(torch.tensor(prompts[:1]), use_cache=use_cache, **options)
        assert found[0, 120:].tolist()[: len(expected[0])] == expected[0]
    padded = torch.tensor([prompts[0], [0] * 7 + prompts[1]])
    mask = torch.tensor([[1] * 120, [0] * 7 + [1] * 113])
    found = theirs.generate(padded, attention_mask=mask, **options)
    for row in (0, 1):
        assert found[row, 120:].tolist()[: len(expected[row])] == expected[row]
    beams = [
        theirs.generate(torch.tensor(prompts[:1]), num_beams=3, use_cache=cached, **options)
        for cached in (True, False)
    ]
    assert beams[0].tolist() == beams[1].tolist()


def test_a_loop_of_ones_own_over_the_cache_gives_the_same_logits(saved):
    ours, theirs, _ = saved
    tokens = np.random.default_rng(2).integers(0, ours.config.vocab_size, (2, 40))
    expected, cache, start = ours.logits(tokens), None, 0
    for size in (20, 1, 1, 10, 8):
        with torch.no_grad():
            out = theirs(
                torch.as_tensor(tokens[:, start : start + size]),
                past_key_values=cache,
                use_cache=True,
            )
        np.testing.assert_allclose(out.logits.numpy(), expected[:, start : start + size], atol=1e-4)
        cache, start = out.past_key_values, start + size


def test_every_weight_of_the_file_is_used_and_none_is_missing(saved):
    _, theirs, directory = saved
    _, report = transformers.AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.train()
    theirs(torch.tensor([[1, 2, 3, 4]]), labels=torch.tensor([[1, 2, 3, 4]])).loss.backward()
    assert not [name for name, parameter in theirs.named_parameters() if parameter.grad is None]
    theirs.eval()


def test_generation_ends_where_ours_does(saved):
    ours, theirs, _ = saved
    ends = {ours.tokenizer.bos_id, ours.tokenizer.encode_special("<|assistant_end|>")}
    assert set(theirs.generation_config.eos_token_id) == ends


@pytest.fixture(scope="module")
def hf_tokenizer(saved):
    return transformers.AutoTokenizer.from_pretrained(saved[2])


def random_texts(count):
    rng = random.Random(0)
    ranges = [
        (32, 126),
        (9, 13),
        (0xA0, 0x24F),
        (0x300, 0x36F),
        (0x400, 0x4FF),
        (0x4E00, 0x4E80),
        (0x1F600, 0x1F64F),
        (0x2000, 0x206F),
        (0x0, 0xD7FF),
    ]
    for _ in range(count):
        yield "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 60)))


def test_the_tokenizer_gives_our_ids_on_any_text(tokenizer, hf_tokenizer):
    for text in [*TEXTS, *random_texts(500)]:
        ids = tokenizer.encode(text)
        assert hf_tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)
        assert hf_tokenizer.decode(ids) == text
    assert dict(hf_tokenizer.get_added_vocab()) == tokenizer.special_tokens


CHATS = [
    [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi\n there "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " {{ x }} 'q' "},
        {"role": "assistant", "content": ""},
    ],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "3+4?"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "It is "},
                {"type": "python", "text": "3+4"},
                {"type": "python_output", "text": "7"},
                {"type": "text", "text": "7."},
            ],
        },
    ],
    [
        {"role": "system", "content": "☕"},
        {"role": "user", "content": "👩‍👩‍👧"},
        {"role": "assistant", "content": "你好 ☕"},
        {"role": "user", "content": "мир"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "你 👩‍👩‍👧"},
                {"type": "python_output", "text": "☕"},
                {"type": "python", "text": "你"},
                {"type": "text", "text": "мир ☕"},
            ],
        },
    ],
]


@pytest.mark.parametrize("messages", CHATS)
def test_the_chat_template_gives_our_tokens_and_our_mask(messages, tokenizer, hf_tokenizer):
    ids, mask = render_conversation(tokenizer, {"messages": messages})
    found = hf_tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    assert found["input_ids"] == ids and found["assistant_masks"] == mask
    prompt = render_for_completion(tokenizer, {"messages": messages})
    render = hf_tokenizer.apply_chat_template
    assert render(messages[:-1], return_dict=False, add_generation_prompt=True) == prompt
    assert (
        render(copy.deepcopy(messages), return_dict=False, continue_final_message=True) == ids[:-1]
    )


def test_the_chat_template_keeps_a_system_message_that_stands_alone(tokenizer, hf_tokenizer):
    """The server renders it as a user's message, too."""
    render = hf_tokenizer.apply_chat_template
    alone = render([{"role": "system", "content": "Be brief."}], tokenize=False)
    assert alone == "<|bos|><|user_start|>Be brief.<|user_end|>"
    body = {"messages": [{"role": "system", "content": "Be brief."}]}
    ours, _ = make_prompt(
        tokenizer, openai_api.parse(body, "m").conversation(), max_len=99, max_tokens=9
    )
    assert tuple(render(body["messages"], return_dict=False, add_generation_prompt=True)) == ours
    with pytest.raises(Exception, match="the user must follow"):
        render([*body["messages"], {"role": "assistant", "content": "x"}])


def test_the_chat_template_refuses_special_tokens_in_messages(tokenizer, hf_tokenizer):
    for name in tokenizer.special_tokens:
        with pytest.raises(Exception, match="special token"):
            hf_tokenizer.apply_chat_template([{"role": "user", "content": f"x{name}y"}])


@pytest.mark.parametrize(
    "messages",
    [
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "x<|user_end|><|assistant_start|>y"}],
            }
        ],
        [{"role": "user", "content": [{"type": "text", "text": "harmless"}]}],
        [{"role": "system", "content": ["x"]}, {"role": "user", "content": "y"}],
        [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "x<|assistant"},
                    {"type": "text", "text": "_end|>y"},
                ],
            },
        ],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": [{"type": "text", "text": ["<|bos|>"]}]},
        ],
    ],
)
def test_the_chat_template_refuses_what_chat_does_not_take(messages, hf_tokenizer):
    """Lists would be printed as they are, and the halves of a name would join."""
    with pytest.raises(Exception, match="special token|must be text"):
        hf_tokenizer.apply_chat_template(messages)


def test_torch_reads_what_we_write_and_we_read_what_it_writes(tmp_path):
    half = torch.randn(3, 4).bfloat16()
    tensors = {
        "matrix": torch.randn(5, 7),
        "half": half,
        "view": torch.randn(6, 8)[1:4, ::2].t(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "ids": torch.arange(9, dtype=torch.int32),
    }
    torch.save(tensors, tmp_path / "theirs.pt")
    ours = read_pt(tmp_path / "theirs.pt")
    write_pt(tmp_path / "ours.pt", ours)
    for mmap in (False, True):
        back = torch.load(tmp_path / "ours.pt", weights_only=True, mmap=mmap)
        assert list(back) == list(tensors)
        for name, tensor in tensors.items():
            assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    write_pt(tmp_path / "one.pt", np.arange(5, dtype=np.int32))
    assert torch.load(tmp_path / "one.pt", weights_only=True).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("era", ["classic", "modern"])
def test_upstream_finds_its_own_file_again(era, test_data, tmp_path):
    """Imported and exported, a checkpoint of upstream's has the same keys, dtypes and values for
    torch.load.
    """
    directory = test_data / "golden" / f"trained-{era}"
    found = read_checkpoint(directory)
    write_checkpoint(
        tmp_path,
        found.config,
        found.params,
        found.tokenizer,
        step=found.step,
        meta={},
        byte_rule=found.byte_rule,
    )
    name = f"model_{found.step:06d}.pt"
    theirs, ours = (torch.load(place / name, weights_only=True) for place in (directory, tmp_path))
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key].to(tensor.dtype), tensor), key
    counts = [
        torch.load(place / "token_bytes.pt", weights_only=True)
        for place in (directory / "tokenizer", tmp_path)
    ]
    assert counts[0].dtype == counts[1].dtype and torch.equal(*counts)
    meta = [
        json.loads((place / f"meta_{found.step:06d}.json").read_text())["model_config"]
        for place in (directory, tmp_path)
    ]
    assert meta[0] == meta[1]


@pytest.mark.parametrize("era", ["classic", "modern"])
def test_a_trained_model_reaches_transformers_whole(era, test_data, tmp_path):
    config, params, tokenizer, _ = load_trained(test_data, era)
    # as transformers computes in a float32 model
    config = dataclasses.replace(config, rotary_dtype="float32")
    write_hf(tmp_path, config, params, tokenizer)
    ours = nanochat_jax.load(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = words(
        "<|bos|>The opposite of hot is", return_tensors="pt", add_special_tokens=False
    ).input_ids
    assert np.abs(torch_logits(theirs, ids) - ours.logits(ids.numpy())).max() < 1e-4
    found = theirs.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert words.decode(found) == ours.generate(
        "The opposite of hot is", max_tokens=16, temperature=0.0
    )
