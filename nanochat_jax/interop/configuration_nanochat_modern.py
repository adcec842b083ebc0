"""The config of nanochat's model of July 2026 for Hugging Face transformers, beside its weights.

In a file of its own, without torch: `AutoTokenizer` reads it too.
"""

from transformers import PretrainedConfig


class NanoChatModernConfig(PretrainedConfig):
    model_type = "nanochat_modern"

    def __init__(
        self,
        vocab_size=32768,
        padded_vocab_size=32768,  # rows of the tables; logits beyond vocab_size are cut off
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=2048,
        windows=(),  # per layer: number of earlier keys that a query attends to
        value_embed_layers=(),
        rotary_base=100000.0,
        qk_scale=1.2,
        final_logit_softcapping=15.0,
        rms_norm_eps=1.1920929e-07,
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.padded_vocab_size = padded_vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.windows = list(windows) or [max_position_embeddings] * num_hidden_layers
        self.value_embed_layers = list(value_embed_layers)
        self.rotary_base = rotary_base
        self.qk_scale = qk_scale
        self.final_logit_softcapping = final_logit_softcapping
        self.rms_norm_eps = rms_norm_eps
        self.use_cache = use_cache
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
