"""An int8 copy: `python -m deployments.reference_fleet.training.quantise general general-int8`.

Reads `models/general` and writes `models/general-int8` in the compressed-tensors format
"int-quantized" (W8A8), which vLLM's CPU build serves without further arguments. The layers'
projections become symmetric int8 with one float32 scale per output channel, rounded to nearest,
without calibration data. The engine rounds activations to int8 with one scale per token.
Embeddings, which are also the output layer, and norms stay bf16.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from deployments.reference_fleet.paths import MODELS

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
LARGEST = 127  # of int8; -128 stays unused, so that the range is symmetric
SMALLEST_SCALE = 1e-12


def quantisation_config() -> dict[str, Any]:
    """The `quantization_config` entry of config.json for this format."""
    shared = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**shared, "strategy": "channel", "dynamic": False},
                "input_activations": {**shared, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": ["lm_head"],
    }


def round_channels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Int8 weights and float32 scales of a (outputs, inputs) matrix.

    The scales have the shape (outputs, 1); weights times scales give the matrix back.
    """
    exact = weight.float()
    # A layer that was added as an identity may still have rows of zeros.
    scales = (exact.abs().amax(dim=1, keepdim=True) / LARGEST).clamp_min(SMALLEST_SCALE)
    return (exact / scales).round().clamp(-LARGEST, LARGEST).to(torch.int8), scales


def quantise(source: Path, target: Path) -> None:
    """Writes an int8 copy of the model folder `source` to the folder `target`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / WEIGHTS).items():
        if name.endswith("_proj.weight"):
            tensors[name], tensors[f"{name}_scale"] = round_channels(tensor)
        else:
            tensors[name] = tensor
    config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
    if "quantization_config" in config:
        raise ValueError(f"{source} is quantised already")
    config["quantization_config"] = quantisation_config()
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for name in COPIED:
        shutil.copyfile(source / name, target / name)


def main() -> None:
    """Command line; prints the size of both weight files in MB (10^6 bytes)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder in models/ with bf16 weights")
    parser.add_argument("target", help="folder in models/ to write")
    chosen = parser.parse_args()
    quantise(MODELS / chosen.source, MODELS / chosen.target)
    for name in (chosen.source, chosen.target):
        print(f"{name}: {(MODELS / name / WEIGHTS).stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
