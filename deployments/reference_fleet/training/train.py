"""Trains one model: `python -m deployments.reference_fleet.training.train extract [--resume]`.

The learning rate follows the clock: warm-up, constant, then linear to almost zero at the end of the
given minutes. A slower machine gives a weaker model in the same time. `--resume` continues an
interrupted run; to a finished run, or to the shipped weights where there is no run, it adds a round
at a lower rate. Checkpoints go to `.runs/` (git-ignored), the result to `models/<id>/`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from deployments.reference_fleet.corpora.examples import SPECIALISTS, held_out, stream
from deployments.reference_fleet.paths import MODELS, RUNS
from deployments.reference_fleet.training import tokens
from deployments.reference_fleet.training.batches import Batch, batches
from deployments.reference_fleet.training.optimizers import Optimizers, rate_at
from deployments.reference_fleet.training.scoring import score
from deployments.reference_fleet.training.shapes import SHAPES, build

WEIGHTS = "model.safetensors"
LATER_ROUND_RATIO = 0.3  # peak rate of a further round, as a share of the first one's
SAVE_EVERY_S = 120.0
MAX_GRADIENT_NORM = 1.0


@dataclass
class Progress:
    """How far a run is; `elapsed` and `minutes` are of the current round."""

    round: int = 0
    elapsed: float = 0.0  # seconds of training, scoring left out
    minutes: float = 0.0
    total_seconds: float = 0.0
    tokens: int = 0  # without padding
    scale: float = 1.0  # of the peak rates in this round
    steps: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)  # (step, answer loss in nats)
    scores: list[tuple[int, float]] = field(default_factory=list)  # (step, greedy exact share)


@dataclass
class Run:
    """The state of one training process."""

    task: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    optimizer: Optimizers
    progress: Progress
    seed: int

    @property
    def spec(self) -> tokens.TokenizerSpec:
        """The tokenizer's description."""
        return tokens.SPECS[SHAPES[self.task].tokenizer]

    @property
    def checkpoint(self) -> Path:
        """Path of the resumable state."""
        return RUNS / self.task / "checkpoint.pt"


def prepare(
    task: str, minutes: float, resume: bool, seed: int, share: float = LATER_ROUND_RATIO
) -> Run:
    """A new run, or the saved or shipped one.

    A finished run continues in a further round, whose peak rates are `share` of the first one's.
    """
    torch.manual_seed(seed)
    shape = SHAPES[task]
    saved = RUNS / task / "checkpoint.pt"
    spec = tokens.SPECS[shape.tokenizer]
    shipped = resume and not saved.exists()
    tokenizer = tokens.load(spec, RUNS if not shipped else MODELS / task)
    model = build(shape, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    progress = Progress(minutes=minutes)
    run = Run(task, model, tokenizer, Optimizers(model, shape.rate), progress, seed)
    if not resume:
        return run
    state = torch.load(saved, weights_only=True) if not shipped else _shipped(task)
    run.progress = Progress(**state["progress"])
    run.model.load_state_dict(state["model"], strict=False)  # shipped: no tied output layer
    if "optimizer" in state:
        run.optimizer.load_state_dict(state["optimizer"])
    if run.progress.elapsed >= run.progress.minutes * 60:
        run.progress.scale = share
        run.progress.round += 1
        run.progress.elapsed = 0.0
        run.progress.minutes = minutes
    return run


def _shipped(task: str) -> dict[str, Any]:
    """The weights in `models/` in the form of a finished run's checkpoint."""
    place = MODELS / task
    facts = json.loads((place / "scores.json").read_text())
    progress = Progress(
        total_seconds=facts["training_seconds"],
        tokens=facts["training_tokens"],
        steps=facts["steps"],
    )
    weights = {name: value.float() for name, value in load_file(place / WEIGHTS).items()}
    return {"model": weights, "progress": asdict(progress)}


def save(run: Run) -> None:
    """Writes the checkpoint atomically, by a rename."""
    run.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "progress": asdict(run.progress),
    }
    part = run.checkpoint.with_suffix(".part")
    torch.save(state, part)
    part.replace(run.checkpoint)


def losses(
    model: PreTrainedModel, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted loss and the loss of the answer tokens alone, in nats per token."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    each = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
    )
    flat = weights[:, 1:].flatten()
    answer = (flat == 1.0).float()
    return (each * flat).sum() / flat.sum(), (each.detach() * answer).sum() / answer.sum()


def compile_layers(model: PreTrainedModel) -> None:
    """Compiles each layer; they are alike, so a deep stack takes no longer than one layer."""
    for layer in model.model.layers:
        layer.compile(dynamic=True)


def train(run: Run, compiled: bool, score_every: float) -> None:
    """Trains until the minutes of this round are used up."""
    shape, progress = SHAPES[run.task], run.progress
    seed = run.seed + 1000 * progress.round + int(progress.elapsed)
    source = batches(
        run.tokenizer, run.spec, stream(run.task, seed), shape.batch, shape.prompt_weight, seed
    )
    if compiled:
        compile_layers(run.model)
    examples = held_out(run.task, 100)
    budget = progress.minutes * 60
    saved = scored = time.monotonic()
    smooth = progress.losses[-1][1] if progress.losses else float("nan")
    with tqdm(
        total=round(budget), initial=round(progress.elapsed), unit="s", mininterval=20
    ) as bar:
        while progress.elapsed < budget:
            began = time.monotonic()
            value = _one_step(run, next(source), progress.elapsed / budget)
            smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
            if progress.steps % 20 == 0:
                progress.losses.append((progress.steps, round(smooth, 4)))
            now = time.monotonic()
            progress.elapsed += now - began
            progress.total_seconds += now - began
            bar.set_postfix_str(f"loss {smooth:.3f}, step {progress.steps}", refresh=False)
            bar.update(round(progress.elapsed) - bar.n)
            if now - saved > SAVE_EVERY_S:
                save(run)
                saved = now
            if now - scored > score_every:
                with torch.compiler.set_stance("force_eager"):
                    table = score(run.model, run.tokenizer, run.spec, examples)
                progress.scores.append((progress.steps, _mean(table)))
                tqdm.write(f"{run.task} {progress.total_seconds:.0f} s {json.dumps(table)}")
                scored = time.monotonic()
    save(run)


def _mean(table: dict[str, dict[str, float]]) -> float:
    return round(sum(row["exact"] for row in table.values()) / len(table), 4)


def _one_step(run: Run, batch: Batch, share: float) -> float:
    ids, weights = batch
    loss, answer = losses(run.model, ids, weights)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), MAX_GRADIENT_NORM)
    run.optimizer.step(rate_at(share) * run.progress.scale)
    run.progress.steps += 1
    run.progress.tokens += int((weights > 0).sum())
    return float(answer)


def export(run: Run, examples: int) -> None:
    """Saves bf16 weights, tokenizer, generation settings, scores and the loss curve."""
    place = MODELS / run.task
    place.mkdir(parents=True, exist_ok=True)
    # Scored as shipped, after rounding to bf16.
    run.model.to(torch.bfloat16)
    run.model.generation_config = GenerationConfig(
        eos_token_id=run.tokenizer.eos_token_id,
        pad_token_id=run.tokenizer.pad_token_id,
        do_sample=False,
    )
    run.model.save_pretrained(place)
    run.tokenizer.save_pretrained(place)
    with torch.compiler.set_stance("force_eager"):
        table = score(run.model, run.tokenizer, run.spec, held_out(run.task, examples))
    print(run.task, "final", json.dumps(table))
    facts = {
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "training_seconds": round(run.progress.total_seconds),
        "training_tokens": run.progress.tokens,
        "steps": run.progress.steps,
        "greedy": table,
    }
    (place / "scores.json").write_text(json.dumps(facts, indent=1) + "\n")
    curve(run.progress, place / "loss.png")


def curve(progress: Progress, path: Path) -> None:
    """Draws answer loss and greedy score over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, left = plt.subplots(figsize=(5, 2.6), dpi=80)
    left.semilogy(
        [s for s, _ in progress.losses], [v for _, v in progress.losses], color="tab:blue"
    )
    left.set_xlabel("step")
    left.set_ylabel("answer loss (nats per token)", color="tab:blue")
    right = left.twinx()
    right.plot(
        [s for s, _ in progress.scores], [v for _, v in progress.scores], "o-", color="tab:orange"
    )
    right.set_ylim(0, 1)
    right.set_ylabel("greedy exact share", color="tab:orange")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=SPECIALISTS)
    parser.add_argument("--minutes", type=float, help="of this round; the shape has a default")
    parser.add_argument("--resume", action="store_true", help="continue the saved run")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile (needs a C++ compiler)"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score-every", type=float, default=150.0, help="seconds")
    parser.add_argument(
        "--examples", type=int, default=300, help="held-out examples of the final score"
    )
    parser.add_argument(
        "--rate-share",
        type=float,
        default=LATER_ROUND_RATIO,
        help="peak rate of a further round, as a share of the first one's",
    )
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    minutes = chosen.minutes if chosen.minutes is not None else SHAPES[chosen.task].minutes
    run = prepare(chosen.task, minutes, chosen.resume, chosen.seed, chosen.rate_share)
    train(run, chosen.compile, chosen.score_every)
    export(run, chosen.examples)


if __name__ == "__main__":
    main()
