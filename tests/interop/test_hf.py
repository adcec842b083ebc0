"""What we write, read by the real torch and transformers: tensors, logits, tokens, text."""

import copy
import dataclasses
import json
import random
import subprocess
import sys

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
    """A model of random weights, ours and transformers': windows of 128 keys, grouped heads."""
    make = {"classic": GPTConfig.classic, "modern": GPTConfig.modern}[request.param]
    shape = dict(n_embd=48, n_head=4, n_kv_head=2, sequence_len=512)
    config = make(5, vocab_size=tokenizer.vocab_size, **shape)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32),
        init_params(config, jax.random.key(0)),
    )
    directory = tmp_path_factory.mktemp(request.param)
    write_hf(directory, config, params, tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    return nanochat_jax.load(directory), theirs.eval(), directory


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.numpy()


def test_transformers_gives_our_logits(saved):
    ours, theirs, _ = saved
    tokens = np.random.default_rng(0).integers(0, ours.config.vocab_size, (2, 160))
    assert theirs.dtype == torch.float32
    assert np.abs(torch_logits(theirs, tokens) - ours.logits(tokens)).max() < 1e-4


def test_transformers_generates_our_tokens(saved):
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
        part = slice(start, start + size)
        with torch.no_grad():
            out = theirs(torch.as_tensor(tokens[:, part]), past_key_values=cache, use_cache=True)
        np.testing.assert_allclose(out.logits.numpy(), expected[:, part], atol=1e-4)
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


def test_the_tokenizer_loads_without_torch(saved):
    code = (
        "import sys; sys.modules['torch'] = None; import transformers; "
        "tokenizer = transformers.AutoTokenizer.from_pretrained("
        "sys.argv[1], trust_remote_code=True); print(tokenizer('ab').input_ids)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, saved[2]], capture_output=True, text=True, check=True
    )
    tokenizer = saved[0].tokenizer
    assert shown.stdout.strip() == str(tokenizer.encode("ab", prepend=tokenizer.bos_id))


RANGES = [(32, 126), (9, 13), (0xA0, 0x24F), (0x300, 0x36F), (0x400, 0x4FF), (0x4E00, 0x4E80)]
RANGES += [(0x1F600, 0x1F64F), (0x2000, 0x206F), (0x0, 0xD7FF)]


def random_texts(count):
    rng = random.Random(0)
    for _ in range(count):
        yield "".join(chr(rng.randint(*rng.choice(RANGES))) for _ in range(rng.randint(1, 60)))


def test_the_tokenizer_gives_our_ids_on_any_text(tokenizer, hf_tokenizer):
    for text in [*TEXTS, *random_texts(500)]:
        ids = tokenizer.encode(text)
        assert hf_tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)
        assert hf_tokenizer.encode(text) == [tokenizer.bos_id, *ids]
        assert hf_tokenizer.decode(ids) == text
    assert dict(hf_tokenizer.get_added_vocab()) == tokenizer.special_tokens


def said(*contents):
    """Messages of user and assistant in turn; a list of pairs is a message of parts."""
    return [
        {
            "role": role,
            "content": content
            if isinstance(content, str)
            else [{"type": part_type, "text": text} for part_type, text in content],
        }
        for role, content in zip(("user", "assistant") * 2, contents)
    ]


SYSTEM = {"role": "system", "content": "Be brief. ☕"}
CHATS = [
    said("Hello", "Hi\n there "),
    [SYSTEM, *said(" {{ x }} 'q' ", "")],
    said(
        *("a", "b", "3+4?"),
        [("text", "It is "), ("python", "3+4"), ("python_output", "7"), ("text", "7.")],
    ),
    [
        SYSTEM,
        *said(
            *("👩‍👩‍👧", "你好 ☕", "мир"),
            [("text", "你 👩‍👩‍👧"), ("python_output", "☕"), ("python", "你"), ("text", "мир ☕")],
        ),
    ],
]


@pytest.mark.parametrize("messages", CHATS)
def test_the_chat_template_gives_our_tokens_and_our_mask(messages, tokenizer, hf_tokenizer):
    ids, mask = render_conversation(tokenizer, {"messages": messages})
    render = hf_tokenizer.apply_chat_template
    rendered = render(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert rendered["input_ids"] == ids and rendered["assistant_masks"] == mask
    prompt = render_for_completion(tokenizer, {"messages": messages})
    assert render(messages[:-1], return_dict=False, add_generation_prompt=True) == prompt
    messages = copy.deepcopy(messages)
    assert render(messages, return_dict=False, continue_final_message=True) == ids[:-1]


def test_the_chat_template_keeps_a_system_message_that_stands_alone(tokenizer, hf_tokenizer):
    render = hf_tokenizer.apply_chat_template
    rendered = render([SYSTEM], tokenize=False)
    assert rendered == "<|bos|><|user_start|>Be brief. ☕<|user_end|>"
    request = openai_api.parse({"messages": [SYSTEM]}, "m")
    ours, _ = make_prompt(tokenizer, request.conversation(), max_len=99, max_tokens=9)
    assert tuple(render([SYSTEM], return_dict=False, add_generation_prompt=True)) == ours
    with pytest.raises(Exception, match="the user must follow"):
        render([SYSTEM, {"role": "assistant", "content": "x"}])


def test_the_chat_template_refuses_special_tokens_in_messages(tokenizer, hf_tokenizer):
    for name in tokenizer.special_tokens:
        with pytest.raises(Exception, match="special token"):
            hf_tokenizer.apply_chat_template([{"role": "user", "content": f"x{name}y"}])


@pytest.mark.parametrize(
    "messages",
    [
        said([("text", "x<|user_end|><|assistant_start|>y")]),
        said([("text", "harmless")]),
        [{"role": "system", "content": ["x"]}, *said("y")],
        said("a", [("text", "x<|assistant"), ("text", "_end|>y")]),
        said("a", [("text", ["<|bos|>"])]),
    ],
)
def test_the_chat_template_refuses_what_chat_does_not_take(messages, hf_tokenizer):
    """Lists would be printed, and the halves of a name would join."""
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
    theirs_dir = test_data / "golden" / f"trained-{era}"
    found = read_checkpoint(theirs_dir)
    step, model = found.step, (found.config, found.params, found.tokenizer)
    write_checkpoint(tmp_path, *model, step=step, meta={}, byte_rule=found.byte_rule)
    load = lambda path: torch.load(path, weights_only=True)
    theirs, ours = (load(d / f"model_{step:06d}.pt") for d in (theirs_dir, tmp_path))
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key].to(tensor.dtype), tensor), key
    counts = [load(d / "token_bytes.pt") for d in (theirs_dir / "tokenizer", tmp_path)]
    assert counts[0].dtype == counts[1].dtype and torch.equal(*counts)
    meta = [(d / f"meta_{step:06d}.json").read_text() for d in (theirs_dir, tmp_path)]
    assert len({json.dumps(json.loads(text)["model_config"], sort_keys=True) for text in meta}) == 1


@pytest.mark.parametrize("era", ["classic", "modern"])
def test_a_trained_model_reaches_transformers_whole(era, test_data, tmp_path):
    config, params, tokenizer, _ = load_trained(test_data, era)
    # as transformers computes in a float32 model
    config = dataclasses.replace(config, rotary_dtype="float32")
    write_hf(tmp_path, config, params, tokenizer)
    ours = nanochat_jax.load(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    words, prompt = transformers.AutoTokenizer.from_pretrained(tmp_path), "The opposite of hot is"
    ids = words(f"<|bos|>{prompt}", return_tensors="pt", add_special_tokens=False).input_ids
    start = ids.shape[1]
    ids = theirs.generate(ids, max_new_tokens=16, do_sample=False)
    logits = ours.logits(ids.numpy())
    assert np.abs(torch_logits(theirs, ids) - logits).max() < 1e-4
    assert ids[0, start:].tolist() == logits[0, start - 1 : -1].argmax(-1).tolist()
    assert words.decode(ids[0, 1:]) == ours.tokenizer.decode(ids[0, 1:].tolist())
