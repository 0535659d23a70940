"""LoRA adapters of SmolLM2: `python -m deployments.reference_fleet.training.adapters mixture`.

`mixture` learns all tasks of the specialists, each other adapter one of them. The loss is that of
the answers alone. A run ends when its minutes are over or when the held-out loss has not fallen in
two evaluations; it can be interrupted at any time and goes on with `--resume`. Checkpoints go to
`.runs/` (git-ignored), the result to `models/general/adapters/<name>/`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from calm_serve.config import models_folder
from deployments.reference_fleet.corpora.examples import (
    ALL_STEPS,
    SPECIALISTS,
    Example,
    held_out,
    stream,
)
from deployments.reference_fleet.paths import MODELS, RUNS
from deployments.reference_fleet.training.packing import ChatEncoder, Row, rows

BASE = "smollm2-135m-instruct"
MIXTURE = "mixture"
NAMES = (MIXTURE, *SPECIALISTS)
# WikiSQL and advising are the longest answers, so that they need the fewest examples per token.
SHARES = {"extract": 0.2, "sql": 0.2, "shell": 0.2, "reason": 0.2, "intent": 0.2}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = {MIXTURE: 16}
RANK = 8  # of an adapter for one task
RATE = 1e-3
WARMUP_STEPS = 20
ROWS_PER_STEP = 4
MAX_GRADIENT_NORM = 1.0
HELD_OUT_PER_TASK = 40
EVALUATE_EVERY_TOKENS = 60_000
PATIENCE = 2  # evaluations without a lower held-out loss
FLAT_NATS = 0.003  # a smaller fall counts as flat
IGNORED = -100  # target of a token that is not part of an answer


@dataclass
class Progress:
    """How far a run is. Losses are of answer tokens, in nats per token."""

    seconds: float = 0.0
    tokens: int = 0  # read, the shared prefix once a row
    answer_tokens: int = 0
    steps: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)  # (tokens, smoothed loss)
    held_out: list[tuple[int, dict[str, float]]] = field(default_factory=list)  # by task

    def is_flat(self) -> bool:
        """Whether the mean held-out loss has not fallen in the last `PATIENCE` evaluations."""
        means = [sum(by_task.values()) / len(by_task) for _, by_task in self.held_out]
        if len(means) <= PATIENCE:
            return False
        return min(means[-PATIENCE:]) > min(means[:-PATIENCE]) - FLAT_NATS


def tasks_of(name: str) -> tuple[str, ...]:
    """The tasks that an adapter learns."""
    return SPECIALISTS if name == MIXTURE else (name,)


def examples(name: str, seed: int) -> Iterator[Example]:
    """Endless training examples of an adapter; the mixture draws its task for each example."""
    streams = {task: stream(task, seed, ALL_STEPS) for task in tasks_of(name)}
    rng = Random(f"adapter:{name}:{seed}")
    while True:
        (task,) = rng.choices(list(streams), [SHARES[t] for t in streams])
        yield next(streams[task])


class Run:
    """One adapter in training."""

    def __init__(self, name: str, minutes: float, threads: int) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(threads)
        self.name, self.minutes = name, minutes
        folder = models_folder() / BASE
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.encoder = ChatEncoder(self.tokenizer)
        base = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
        rank = RANKS.get(name, RANK)
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        self.model: PeftModel = get_peft_model(base, config)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.trained, lr=RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        )
        self.progress = Progress()
        self.checkpoint = RUNS / "adapters" / name / "checkpoint.pt"

    def losses(self, row: Row) -> torch.Tensor:
        """Loss of each answer token, in nats; logits are computed for these alone."""
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.model.base_model.model.model(
                input_ids=row.ids,
                position_ids=row.positions,
                attention_mask=row.mask,
                use_cache=False,
            ).last_hidden_state[0]
            wanted = row.targets != IGNORED
            logits = self.model.base_model.model.lm_head(hidden[wanted])
        return torch.nn.functional.cross_entropy(
            logits.float(), row.targets[wanted], reduction="none"
        )

    def step(self, batch: list[Row]) -> float:
        """One step of the optimizer over some rows; returns the loss before it."""
        answers = sum(int((row.targets != IGNORED).sum()) for row in batch)
        total = 0.0
        for row in batch:
            loss = self.losses(row).sum() / answers
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.trained, MAX_GRADIENT_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = RATE * self._rate_share()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.steps += 1
        self.progress.answer_tokens += answers
        self.progress.tokens += sum(row.ids.shape[1] for row in batch)
        return total

    def _rate_share(self) -> float:
        warm = min(1.0, (self.progress.steps + 1) / WARMUP_STEPS)
        left = 1.0 - self.progress.seconds / (self.minutes * 60)
        return warm * max(0.05, min(1.0, left / 0.6))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean loss of the held-out answer tokens of each task."""
        found = {}
        for task in tasks_of(self.name):
            packed = rows(self.encoder, held_out(task, HELD_OUT_PER_TASK), seed=0)
            each = torch.cat([self.losses(row) for row in packed])
            found[task] = round(float(each.mean()), 4)
        return found

    def save(self) -> None:
        """Write the checkpoint atomically, by a rename."""
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        part = self.checkpoint.with_suffix(".part")
        state = {
            "adapter": get_peft_model_state_dict(self.model),
            "optimizer": self.optimizer.state_dict(),
            "progress": asdict(self.progress),
        }
        torch.save(state, part)
        part.replace(self.checkpoint)

    def restore(self) -> None:
        """Continue from the checkpoint; a run without one begins anew."""
        if not self.checkpoint.exists():
            return
        state: dict[str, Any] = torch.load(self.checkpoint, weights_only=True)
        set_peft_model_state_dict(self.model, state["adapter"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])


def train(run: Run) -> None:
    """Train until the minutes are over or the held-out loss is flat."""
    progress = run.progress
    source = rows(run.encoder, examples(run.name, progress.steps), seed=progress.steps)
    smooth = progress.losses[-1][1] if progress.losses else 0.0
    evaluated = progress.held_out[-1][0] if progress.held_out else -EVALUATE_EVERY_TOKENS
    with tqdm(total=round(run.minutes * 60), initial=round(progress.seconds), unit="s") as bar:
        while progress.seconds < run.minutes * 60 and not progress.is_flat():
            if progress.tokens - evaluated >= EVALUATE_EVERY_TOKENS:
                evaluated = progress.tokens
                progress.held_out.append((evaluated, run.evaluate()))
                run.save()
                tqdm.write(f"{run.name} {evaluated} tokens {progress.held_out[-1][1]}")
            began = time.process_time()
            value = run.step([next(source) for _ in range(ROWS_PER_STEP)])
            # Processor time of this process: a run that waits for another one does not end early.
            progress.seconds += (time.process_time() - began) / torch.get_num_threads()
            smooth = value if not smooth else 0.95 * smooth + 0.05 * value
            progress.losses.append((progress.tokens, round(smooth, 4)))
            bar.set_postfix_str(f"loss {smooth:.3f}, {progress.tokens} tokens", refresh=False)
            bar.update(round(progress.seconds) - bar.n)
    progress.held_out.append((progress.tokens, run.evaluate()))
    run.save()


def export(run: Run) -> Path:
    """Save the adapter in PEFT form (bf16), its loss curve and its figures."""
    place = MODELS / "general" / "adapters" / run.name
    shutil.rmtree(place, ignore_errors=True)
    run.model.save_pretrained(place)
    file = place / "adapter_model.safetensors"
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in load_file(file).items()}, file)
    settings = json.loads((place / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = BASE
    settings["target_modules"] = sorted(settings["target_modules"])
    text = json.dumps(settings, indent=2, sort_keys=True)
    (place / "adapter_config.json").write_text(text + "\n")
    (place / "README.md").unlink(missing_ok=True)
    progress = run.progress
    facts = {
        "training_seconds": round(progress.seconds),
        "training_tokens": progress.tokens,
        "answer_tokens": progress.answer_tokens,
        "steps": progress.steps,
        "flat": progress.is_flat(),
        "held_out_loss": progress.held_out,
    }
    (place / "scores.json").write_text(json.dumps(facts, indent=1) + "\n")
    curve(progress, place / "loss.png")
    return place


def curve(progress: Progress, path: Path) -> None:
    """Draw the training loss and the held-out loss of each task over the tokens read."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3), dpi=80)
    axes.plot(*zip(*progress.losses, strict=True), color="lightgray", label="training")
    for task in progress.held_out[0][1]:
        points = [(tokens, by_task[task]) for tokens, by_task in progress.held_out]
        axes.plot(*zip(*points, strict=True), "o-", markersize=3, label=task)
    axes.set(xlabel="tokens", ylabel="answer loss (nats per token)", yscale="log")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--minutes", type=float, default=60.0, help="processor time per thread")
    parser.add_argument("--resume", action="store_true", help="continue the saved run")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    run = Run(chosen.name, chosen.minutes, chosen.threads)
    if chosen.resume:
        run.restore()
    train(run)
    print(export(run))


if __name__ == "__main__":
    main()
