"""Architecture and training settings of each model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

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
    architecture: str = "llama"
    head_dim: int = 32  # the smallest that vLLM's CPU attention supports
    dropout: float = 0.0
    core: int = 0  # layers that are trained first, before the others are added


SHAPES = {
    "extract": Shape("tokenizer_a", 4, 512, 0.02, 26, dropout=0.05),
    "sql": Shape("tokenizer_b", 4, 512, 0.02, 44),
    "shell": Shape("tokenizer_b", 3, 512, 0.02, 28, dropout=0.2),
    "reason": Shape("tokenizer_b", 3, 512, 0.02, 9),
    "intent": Shape("tokenizer_a", 2, 512, 0.02, 8, prompt_weight=0.3, width=256, dropout=0.15),
    "general": Shape("tokenizer_a", 24, 384, 0.02, 84, batch=4096, architecture="qwen3", core=6),
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
    if shape.architecture == "qwen3":
        model: PreTrainedModel = Qwen3ForCausalLM(Qwen3Config(**common))
    else:
        model = LlamaForCausalLM(LlamaConfig(**common))
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


def build_core(shape: Shape, layers: int, vocabulary: int, pad: int, end: int) -> PreTrainedModel:
    """The same model with fewer layers, to be deepened later."""
    return build(replace(shape, layers=layers), vocabulary, pad, end)


@torch.no_grad()
def deepen(core: PreTrainedModel, full: PreTrainedModel) -> None:
    """Copies `core` into `full`, whose further layers start as identities.

    A layer whose two output projections are zero adds nothing to the residual stream, so `full`
    answers exactly as `core` did. Most of the training is thus done at the cost of the small core.
    """
    full.model.embed_tokens.load_state_dict(core.model.embed_tokens.state_dict())
    full.model.norm.load_state_dict(core.model.norm.state_dict())
    spread = len(full.model.layers) // len(core.model.layers)
    for index, layer in enumerate(full.model.layers):
        if index % spread == 0:
            layer.load_state_dict(core.model.layers[index // spread].state_dict())
        else:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()


@torch.no_grad()
def shallow(full: PreTrainedModel, core: PreTrainedModel) -> None:
    """Copies the core's layers out of `full` into `core`, the reverse of `deepen`.

    A further round can then train the core again, at several times the speed. The layers left out
    change the general model's loss by less than 2 %.
    """
    core.model.embed_tokens.load_state_dict(full.model.embed_tokens.state_dict())
    core.model.norm.load_state_dict(full.model.norm.state_dict())
    spread = len(full.model.layers) // len(core.model.layers)
    for index, layer in enumerate(core.model.layers):
        layer.load_state_dict(full.model.layers[index * spread].state_dict())
