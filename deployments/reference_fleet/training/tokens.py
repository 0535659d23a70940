"""The two tokenizers and their chat templates.

Both are byte-level BPE whose pre-tokenizer separates letters, single digits and runs of anything
else. A word then has the same tokens after a space, a quote or a bracket, so copying it from the
prompt into the answer means repeating tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from deployments.reference_fleet.corpora.examples import stream

END = "<|end|>"
PAD = "<|pad|>"
MODEL_MAX_LENGTH = 2048  # tokens
SAMPLES_PER_TASK = 12_000


@dataclass(frozen=True)
class TokenizerSpec:
    """Name, vocabulary size, role tokens and the tasks whose text trains it."""

    name: str
    vocabulary: int
    system: str
    user: str
    assistant: str
    tasks: tuple[str, ...]


SPECS = {
    "tokenizer_a": TokenizerSpec(
        "tokenizer_a",
        1536,
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        ("extract", "intent"),
    ),
    "tokenizer_b": TokenizerSpec(
        "tokenizer_b", 2048, "<|sys|>", "<|usr|>", "<|bot|>", ("sql", "shell", "reason")
    ),
}


def chat_template(spec: TokenizerSpec) -> str:
    """Jinja: each turn is a role token, the text and `<|end|>`."""
    return (
        "{% for message in messages %}"
        f"{{% if message['role'] == 'system' %}}{spec.system}"
        f"{{% elif message['role'] == 'assistant' %}}{spec.assistant}"
        f"{{% else %}}{spec.user}{{% endif %}}"
        "{{ message['content'] }}" + END + "{% endfor %}"
        f"{{% if add_generation_prompt %}}{spec.assistant}{{% endif %}}"
    )


def render(spec: TokenizerSpec, messages: list[dict[str, str]]) -> str:
    """The same text as the chat template with a generation prompt, without the cost of Jinja."""
    role = {"system": spec.system, "user": spec.user, "assistant": spec.assistant}
    return "".join(f"{role[m['role']]}{m['content']}{END}" for m in messages) + spec.assistant


def build(spec: TokenizerSpec) -> PreTrainedTokenizerFast:
    """Trains the tokenizer on its tasks' training streams."""
    core = Tokenizer(models.BPE())
    pattern = Regex(r"\p{L}+|\p{N}|[^\p{L}\p{N}]+")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=spec.vocabulary,
        special_tokens=[PAD, END, spec.system, spec.user, spec.assistant],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = []
    for task in spec.tasks:
        for example in islice(stream(task, seed=1), SAMPLES_PER_TASK):
            texts += [m["content"] for m in example.messages] + [example.answer]
    core.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[spec.system, spec.user, spec.assistant],
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    tokenizer.chat_template = chat_template(spec)
    return tokenizer


def load(spec: TokenizerSpec, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in a model's `folder`, else the one below it, which is trained if missing."""
    place = folder if (folder / "tokenizer.json").exists() else folder / spec.name
    if not (place / "tokenizer.json").exists():
        build(spec).save_pretrained(place)
    loaded = AutoTokenizer.from_pretrained(place)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded
