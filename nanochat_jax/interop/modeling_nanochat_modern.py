"""The nanochat model of July 2026 for Hugging Face transformers, saved beside its weights.

Load it with `trust_remote_code=True`. Parameters have nanochat's own names. Letters of shapes: B
batch, T new tokens, S cached and new tokens, D width, H query heads, K key/value heads, h head
width.

The smear adds the embedding of the previous token to each position, so a decoding step needs that
token. `generate` passes it as `previous_input_ids`; if it is missing, the cache has the embedding.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_nanochat_modern import NanoChatModernConfig

VE_GATE_CHANNELS = 12
SMEAR_GATE_CHANNELS = 24


def rms_norm(x, eps):
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype)


def rotate(x, cos, sin):
    """Rotary embedding of x [B, T, heads, h]: rotates its halves by the negative angle."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.eps, self.qk_scale = layer, config.rms_norm_eps, config.qk_scale
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        width = config.hidden_size
        self.head_dim = width // self.heads
        self.c_q = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.c_k = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.c_v = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.c_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)
        if layer in config.value_embed_layers:
            self.ve_gate = nn.Linear(VE_GATE_CHANNELS, self.kv_heads, bias=False)

    def forward(self, x, value_embed, cos, sin, mask, cache):
        batch, length, width = x.shape
        q = self.c_q(x).view(batch, length, self.heads, self.head_dim)
        k = self.c_k(x).view(batch, length, self.kv_heads, self.head_dim)
        v = self.c_v(x).view(batch, length, self.kv_heads, self.head_dim)
        if value_embed is not None:
            gate = 3.0 * torch.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS]))
            v = v + gate.unsqueeze(-1) * value_embed.view_as(v)
        q, k = (self.qk_scale * rms_norm(rotate(t, cos, sin), self.eps) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, heads, T, h]
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        if self.kv_heads != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.c_proj(out.transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.c_proj = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, *attention_inputs):
        x = x + self.attn(rms_norm(x, self.eps), *attention_inputs)
        return x + self.mlp(rms_norm(x, self.eps))


class NanoChatModernForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoChatModernConfig
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _can_compile_fullgraph = False

    def __init__(self, config):
        super().__init__(config)
        rows, width, depth = config.padded_vocab_size, config.hidden_size, config.num_hidden_layers
        kv_width = width // config.num_attention_heads * config.num_key_value_heads
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(rows, width),
                "h": nn.ModuleList([Block(config, layer) for layer in range(depth)]),
            }
        )
        self.value_embeds = nn.ModuleDict(
            {str(i): nn.Embedding(rows, kv_width) for i in config.value_embed_layers}
        )
        self.lm_head = nn.Linear(width, rows, bias=False)
        self.resid_lambdas = nn.Parameter(torch.ones(depth))
        self.x0_lambdas = nn.Parameter(torch.zeros(depth))
        self.smear_gate = nn.Linear(SMEAR_GATE_CHANNELS, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def set_input_embeddings(self, value):
        self.transformer["wte"] = value

    def get_output_embeddings(self):
        return self.lm_head

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        new = inputs["input_ids"].shape[1]
        if input_ids.shape[1] > new:
            inputs["previous_input_ids"] = input_ids[:, -new - 1 : -new]
        return inputs

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        cache=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        previous_input_ids=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Logits [B, T, V] in float32 of input_ids [B, T].

        attention_mask [B, S] is 0 for padding. previous_input_ids [B, 1] is the token before
        input_ids. cache (past_key_values before transformers 5.24) has the earlier keys and values.
        """
        cache = past_key_values if cache is None else cache
        config = self.config
        batch, length = input_ids.shape
        use_cache = config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache()
        seen = cache.get_seq_length() if cache is not None else 0
        device = input_ids.device
        if attention_mask is not None and attention_mask.shape != (batch, seen + length):
            raise ValueError(
                f"attention_mask must be {[batch, seen + length]}, got {list(attention_mask.shape)}"
            )

        x = rms_norm(self.transformer.wte(input_ids), config.rms_norm_eps)
        x = self._smear(x, cache, seen, attention_mask, previous_input_ids)
        if position_ids is None:
            position_ids = torch.arange(seen, seen + length, device=device)[None]
        cos, sin = self._rotary(position_ids)
        new = (seen, length, attention_mask, device)
        masks = {window: self._mask(window, *new) for window in set(config.windows)}

        x0, middle = x, None
        for i, block in enumerate(self.transformer.h):
            x = self.resid_lambdas[i].to(x.dtype) * x + self.x0_lambdas[i].to(x.dtype) * x0
            value_embed = (
                self.value_embeds[str(i)](input_ids) if str(i) in self.value_embeds else None
            )
            x = block(x, value_embed, cos, sin, masks[config.windows[i]], cache)
            if i == config.num_hidden_layers // 2:
                middle = x
        x = rms_norm(x - self.backout_lambda.to(x.dtype) * middle, config.rms_norm_eps)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept])[..., : config.vocab_size].float()
        softcap = config.final_logit_softcapping
        logits = softcap * torch.tanh(logits / softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _smear(self, x, cache, seen, attention_mask, previous_input_ids):
        """Add a gated share of the previous position's embedding, before its own smear."""
        if seen == 0:
            before = torch.zeros_like(x[:, :1])
        elif previous_input_ids is not None:
            before = rms_norm(self.transformer.wte(previous_input_ids), self.config.rms_norm_eps)
        else:
            position, before = getattr(cache, "nanochat_last_embedding", (None, None))
            if position != seen:
                raise ValueError(
                    "the cache was truncated or copied: pass previous_input_ids [B, 1], the token "
                    "before input_ids"
                )
        if cache is not None:
            cache.nanochat_last_embedding = (seen + x.shape[1], x[:, -1:])
        previous = torch.cat([before, x[:, :-1]], dim=1)
        if attention_mask is not None:  # padding before a sequence does not count
            padded = F.pad(attention_mask, (1, 0))[:, seen : seen + x.shape[1]]
            previous = previous * (padded != 0)[..., None]
        gate = torch.sigmoid(self.smear_gate(x[..., :SMEAR_GATE_CHANNELS]))
        return x + self.smear_lambda.to(x.dtype) * gate * previous

    def _rotary(self, position_ids):
        """Cosines and sines [B, T, 1, h/2], float32."""
        width = self.config.hidden_size // self.config.num_attention_heads
        channels = torch.arange(0, width, 2, dtype=torch.float32, device=position_ids.device)
        angles = position_ids[..., None].float() * self.config.rotary_base ** (-channels / width)
        return angles.cos()[:, :, None], angles.sin()[:, :, None]

    @staticmethod
    def _mask(window, seen, length, attention_mask, device):
        """[B or 1, 1, T, S], True for a query's keys: itself, and real tokens in its window."""
        query = torch.arange(seen, seen + length, device=device)[:, None]
        distance = query - torch.arange(seen + length, device=device)[None]
        visible = ((distance >= 0) & (distance <= window))[None, None]
        if attention_mask is not None:
            visible = (visible & (attention_mask[:, None, None] != 0)) | (distance == 0)[None, None]
        return visible
