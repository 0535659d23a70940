"""Architecture and training settings of each model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

POSITIONS = 2048  # tokens


@dataclass(frozen=True)
class Shape:
    """Architecture and training settings of one model."""

    tokenizer: str
    layers: int
    inner: int  # width inside the MLP
    rate: float  # peak learning rate
    minutes: float  # default length of a training round
    prompt_weight: float = 0.1  # of the loss on a prompt token; an answer token has 1
    batch: int = 3072  # tokens, padding included
    width: int = 192  # hidden
    head_dim: int = 32  # the smallest that vLLM's CPU attention supports
    dropout: float = 0.0


SHAPES = {
    "extract": Shape("tokenizer_a", 4, 512, 0.02, 26, dropout=0.05),
    "sql": Shape("tokenizer_b", 4, 512, 0.02, 44),
    "shell": Shape("tokenizer_b", 3, 512, 0.02, 28, dropout=0.2),
    "reason": Shape("tokenizer_b", 3, 512, 0.02, 9),
    "intent": Shape("tokenizer_a", 2, 512, 0.02, 8, prompt_weight=0.3, width=256, dropout=0.15),
}


def build(shape: Shape, vocabulary: int, pad: int, end: int) -> PreTrainedModel:
    """A newly initialised model; embeddings are tied to keep the file small."""
    common = {
        "vocab_size": vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.width // shape.head_dim,
        "num_key_value_heads": shape.width // shape.head_dim,
        "head_dim": shape.head_dim,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": True,
        "pad_token_id": pad,
        "bos_token_id": None,
        "eos_token_id": end,
        "initializer_range": 0.04,
        # With matrices this small, the fused kernel's backward pass on a CPU costs several times
        # that of plain attention.
        "attn_implementation": "eager",
    }
    model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**common))
    # Residual branches start small, so that a deep stack trains at the same rate.
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.mul_((2 * shape.layers) ** -0.5)
    if shape.dropout:
        _add_dropout(model, shape.dropout)
    return model


def _add_dropout(model: PreTrainedModel, share: float) -> None:
    """Dropout after the embedding and after each residual branch, while training."""

    def drop(module: torch.nn.Module, _: object, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, share, module.training)

    for name, module in model.named_modules():
        if name.endswith(("embed_tokens", "o_proj", "down_proj")):
            module.register_forward_hook(drop)
