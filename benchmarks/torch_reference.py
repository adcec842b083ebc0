"""The classic model and its optimizer in plain PyTorch, the baseline of the benchmarks.

Weights are [out, in], as in torch. Needs the extra `torch`.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.c_q, self.c_k, self.c_v, self.c_proj = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.mlp_fc, self.mlp_proj = (
            nn.Linear(width, 4 * width, bias=False),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        normed = F.rms_norm(x, (width,))
        q, k, v = (
            projection(normed).view(batch, length, self.num_heads, -1)
            for projection in (self.c_q, self.c_k, self.c_v)
        )
        q, k = (F.rms_norm(rotate(x, cos, sin), (x.shape[-1],)) for x in (q, k))
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
        )
        x = x + self.c_proj(out.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp_proj(F.relu(self.mlp_fc(F.rms_norm(x, (width,)))).square())


def choose(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    """A token [B, 1] per row of logits [B, V].

    Sampled from the `top_k` most likely, or at temperature 0 the most likely.
    """
    if temperature == 0.0:
        return logits.argmax(-1, keepdim=True)
    values, ids = torch.topk(logits, top_k)
    return ids.gather(1, torch.multinomial((values / temperature).softmax(-1), 1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos + second * sin, second * cos - first * sin], dim=-1).to(x.dtype)


class GPT(nn.Module):
    def __init__(
        self, *, depth: int, num_heads: int, width: int, vocab_size: int, sequence_len: int
    ) -> None:
        super().__init__()
        self.wte, self.lm_head = (
            nn.Embedding(vocab_size, width),
            nn.Linear(width, vocab_size, bias=False),
        )
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        head_dim = width // num_heads
        angles = torch.arange(sequence_len)[:, None] * 10_000.0 ** (
            -torch.arange(0, head_dim, 2) / head_dim
        )
        # The classic tables are rounded to bfloat16.
        self.register_buffer("cos", angles.cos().bfloat16().float()[:, None])
        self.register_buffer("sin", angles.sin().bfloat16().float()[:, None])

    @classmethod
    def of(cls, config: Any, params: dict[str, Any]) -> "GPT":
        """The model of a `classic` `GPTConfig` and its parameters as numpy arrays."""
        model = cls(
            depth=config.n_layer,
            num_heads=config.n_head,
            width=config.n_embd,
            vocab_size=config.vocab_size,
            sequence_len=config.sequence_len,
        )
        model.load(params)
        return model

    @torch.no_grad()
    def load(self, params: dict[str, Any]) -> None:
        """Set the weights from numpy arrays [in, out]."""
        self.wte.weight.copy_(torch.from_numpy(params["wte"]))
        self.lm_head.weight.copy_(torch.from_numpy(params["lm_head"].T))
        for i, block in enumerate(self.blocks):
            for name, stack in params["blocks"].items():
                getattr(block, name).weight.copy_(torch.from_numpy(stack[i].T))

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats of targets [B, T] after inputs [B, T]."""
        x = F.rms_norm(self.wte(inputs), (self.wte.embedding_dim,))
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = self.lm_head(F.rms_norm(x, (x.shape[-1],))).float()
        return F.cross_entropy(
            (15.0 * torch.tanh(logits / 15.0)).view(-1, logits.shape[-1]), targets.view(-1)
        )

    def empty_cache(self, batch: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of each block, [B, H, S, h], for `extend` to fill."""
        heads, length = self.blocks[0].num_heads, len(self.cos)
        shape = (batch, heads, length, self.wte.embedding_dim // heads)
        return [(torch.empty(shape), torch.empty(shape)) for _ in self.blocks]

    def extend(self, tokens: Tensor, cache: list[tuple[Tensor, Tensor]], start: int) -> Tensor:
        """Logits [B, V] after tokens [B, T] at positions from `start`.

        Writes their keys and values to the cache.
        """
        rows, length = tokens.shape
        end, width = start + length, self.wte.embedding_dim
        x = F.rms_norm(self.wte(tokens), (width,))
        for block, (keys, values) in zip(self.blocks, cache, strict=True):
            normed = F.rms_norm(x, (width,))
            q, k, v = (
                projection(normed).view(rows, length, block.num_heads, -1)
                for projection in (block.c_q, block.c_k, block.c_v)
            )
            q, k = (
                F.rms_norm(
                    rotate(heads, self.cos[start:end], self.sin[start:end]), (heads.shape[-1],)
                )
                for heads in (q, k)
            )
            keys[:, :, start:end], values[:, :, start:end] = k.transpose(1, 2), v.transpose(1, 2)
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), keys[:, :, :end], values[:, :, :end], is_causal=length > 1
            )
            x = x + block.c_proj(out.transpose(1, 2).reshape(rows, length, width))
            x = x + block.mlp_proj(F.relu(block.mlp_fc(F.rms_norm(x, (width,)))).square())
        return 15.0 * torch.tanh(self.lm_head(F.rms_norm(x[:, -1], (width,))) / 15.0)


def orthogonalize(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Five Newton-Schulz iterations on a stack of matrices [K, out, in]."""
    x = x.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(dtype)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x.mT if tall else x).float()


def muon_update(
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    momentum: float,
    rate: float,
    dtype: torch.dtype,
) -> None:
    """Muon on matrices of one shape, orthogonalized as one stack."""
    for buffer, grad in zip(buffers, grads, strict=True):
        buffer.lerp_(grad, 1.0 - momentum)
    steps = orthogonalize(
        torch.stack(
            [grad.lerp(buffer, momentum) for grad, buffer in zip(grads, buffers, strict=True)]
        ),
        dtype,
    )
    scale = rate * math.sqrt(max(1.0, steps.shape[-2] / steps.shape[-1]))
    for param, step in zip(params, steps, strict=True):
        param.sub_(step, alpha=scale)


class Trainer:
    """`step(inputs, targets)` trains once and returns the loss, with the classic recipe's rates."""

    def __init__(self, model: GPT, *, dtype: torch.dtype, compiled: bool) -> None:
        self.model, self.dtype = model, dtype
        scale = (model.wte.embedding_dim / 768) ** -0.5
        self.adamw = torch.optim.AdamW(
            [
                {"params": [model.lm_head.weight], "lr": 0.004 * scale},
                {"params": [model.wte.weight], "lr": 0.2 * scale},
            ],
            betas=(0.8, 0.95),
            eps=1e-10,
            weight_decay=0.0,
            fused=True,
        )
        self.groups: dict[torch.Size, list[Tensor]] = {}
        for param in model.blocks.parameters():
            self.groups.setdefault(param.shape, []).append(param)
        self.buffers = {
            shape: [torch.zeros_like(p) for p in params] for shape, params in self.groups.items()
        }
        self.loss = torch.compile(model) if compiled else model
        self.muon = torch.compile(muon_update) if compiled else muon_update

    def step(self, inputs: Tensor, targets: Tensor) -> float:
        with torch.autocast(
            inputs.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        ):
            loss = self.loss(inputs, targets)
        loss.backward()
        with torch.no_grad():
            for shape, params in self.groups.items():
                self.muon(
                    params, [p.grad for p in params], self.buffers[shape], 0.95, 0.02, self.dtype
                )
            self.adamw.step()
        self.model.zero_grad(set_to_none=True)
        return loss.item()
