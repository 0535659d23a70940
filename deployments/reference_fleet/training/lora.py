"""Two LoRA adapters on `extract`: `python -m deployments.reference_fleet.training.lora flat`.

`flat` answers every SNIPS request with one flat object, `music` answers music requests with a
nested one. Both differ from the base model in every answer, so a wrong adapter is noticed.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from deployments.reference_fleet.corpora import sources
from deployments.reference_fleet.corpora.adapter_schemas import ADAPTERS, covers, reshaped
from deployments.reference_fleet.corpora.examples import (
    Example,
    Swapper,
    extraction,
    slots_of,
)
from deployments.reference_fleet.corpora.phrasing import user, wrap
from deployments.reference_fleet.grading.marks import parsed
from deployments.reference_fleet.paths import MODELS
from deployments.reference_fleet.training import tokens
from deployments.reference_fleet.training.batches import batches
from deployments.reference_fleet.training.optimizers import rate_at
from deployments.reference_fleet.training.scoring import greedy
from deployments.reference_fleet.training.tokens import render
from deployments.reference_fleet.training.train import losses

BASE = MODELS / "extract"
SPEC = tokens.SPECS["tokenizer_a"]
RANK = 8
SCALE = 16  # lora_alpha
RATE = 4e-3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INTENTS = {a: tuple(i for i in sources.SNIPS_INTENTS if covers(a, i)) for a in ADAPTERS}


def answer(adapter: str, utterance: sources.Utterance) -> str:
    """The answer in the adapter's schema."""
    return reshaped(adapter, utterance.intent, slots_of(utterance.pieces))


def examples(adapter: str, seed: int) -> Iterator[Example]:
    """Endless training examples with swapped slot values."""
    rng = Random(f"{adapter}:{seed}")
    swapper = Swapper(INTENTS[adapter])
    while True:
        row = swapper.sample(rng)
        text = extraction(row).prompt
        yield Example(wrap("extract", text, None, rng), answer(adapter, row), adapter, "medium")


def held_out(adapter: str, count: int) -> list[Example]:
    """Held-out SNIPS requests of the adapter's intents."""
    rows = [u for u in sources.snips("validate") if u.intent in INTENTS[adapter]]
    Random(f"eval:{adapter}").shuffle(rows)
    return [
        Example([user(extraction(u).prompt)], answer(adapter, u), adapter, "medium")
        for u in rows[:count]
    ]


def train(adapter: str, minutes: float) -> PeftModel:
    """Trains the adapter for `minutes` with the base frozen."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    base = AutoModelForCausalLM.from_pretrained(
        BASE, dtype=torch.float32, attn_implementation="eager"
    )
    config = LoraConfig(
        r=RANK, lora_alpha=SCALE, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    source = batches(tokenizer, SPEC, examples(adapter, 0), 3072, 0.0, 0)
    start = time.monotonic()
    with tqdm(total=round(minutes * 60), unit="s", mininterval=20) as bar:
        while (elapsed := time.monotonic() - start) < minutes * 60:
            for group in optimizer.param_groups:
                group["lr"] = RATE * rate_at(elapsed / (minutes * 60))
            loss, value = losses(model, *next(source))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.set_postfix_str(f"loss {float(value):.3f}", refresh=False)
            bar.update(math.floor(elapsed) - bar.n)
    return model


def export(adapter: str, model: PeftModel, count: int) -> None:
    """Saves the adapter in PEFT form (bf16) with its greedy score."""
    place = BASE / "adapters" / adapter
    shutil.rmtree(place, ignore_errors=True)
    model.eval()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    rows = held_out(adapter, count)
    found = greedy(model, tokenizer, [render(SPEC, e.messages) for e in rows], 160)
    same = [parsed(a) == parsed(e.answer) for a, e in zip(found, rows, strict=True)]
    exact = sum(same) / len(rows)
    model.save_pretrained(place)
    _normalise(place)
    facts = {"n": len(rows), "exact": round(exact, 4)}
    (place / "scores.json").write_text(json.dumps(facts) + "\n")
    print(adapter, json.dumps(facts), found[:3])


def _normalise(place: Path) -> None:
    """Rounds to bf16, and removes the local path of the base from the settings."""
    file = place / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in load_file(file).items()}, file)
    settings = json.loads((place / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "extract"
    settings["target_modules"] = sorted(settings["target_modules"])
    (place / "adapter_config.json").write_text(
        json.dumps(settings, indent=2, sort_keys=True) + "\n"
    )
    (place / "README.md").unlink(missing_ok=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("adapter", choices=sorted(ADAPTERS))
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--examples", type=int, default=200)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    export(chosen.adapter, train(chosen.adapter, chosen.minutes), chosen.examples)


if __name__ == "__main__":
    main()
