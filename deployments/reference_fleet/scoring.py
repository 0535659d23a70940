"""Greedy answers and their scores, with the training code (no server)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from deployments.reference_fleet.data import Example
from deployments.reference_fleet.problems import final_number
from deployments.reference_fleet.tokens import TokenizerSpec, render

NEW_TOKENS = {"intent": 28, "reason": 110, "sql": 280, "mixed": 320}
DEFAULT_NEW_TOKENS = 160


def parsed(text: str) -> Any:
    """The JSON value of `text`, or None."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def correct(task: str, answer: str, wanted: str) -> bool:
    """JSON is compared as a value, a word problem by its result, the rest by its words."""
    if task in ("extract", "intent"):
        return parsed(answer) is not None and parsed(answer) == parsed(wanted)
    if task == "reason":
        return final_number(answer) is not None and final_number(answer) == final_number(wanted)
    return " ".join(answer.split()) == " ".join(wanted.split())


def partly(task: str, answer: str, wanted: str) -> bool:
    """A weaker score: same intent, same SELECT column, same first command, valid steps."""
    if task in ("extract", "intent"):
        got, goal = parsed(answer), parsed(wanted)
        return isinstance(got, dict) and got.get("intent") == goal["intent"]
    if task == "sql":
        return answer.split(" FROM ")[0] == wanted.split(" FROM ")[0]
    if task == "shell":
        return answer.split()[:1] == wanted.split()[:1]
    return answer.split("\n")[0] == wanted.split("\n")[0]


@torch.no_grad()
def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    new_tokens: int,
) -> list[str]:
    """Greedy continuations of rendered prompts, in batches of 64, left padded."""
    answers: list[str] = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), 64):
        chosen = order[start : start + 64]
        batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=new_tokens,
                do_sample=False,
            )
        texts = tokenizer.batch_decode(
            out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for index, text in zip(chosen, texts, strict=True):
            answers[index] = text
    return answers


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    spec: TokenizerSpec,
    examples: list[Example],
) -> dict[str, dict[str, float]]:
    """Per task: `n`, `exact` and `partial`, both as fractions of n."""
    model.eval()
    table: dict[str, dict[str, float]] = {}
    for task in sorted({e.task for e in examples}):
        rows = [e for e in examples if e.task == task]
        prompts = [render(spec, e.messages) for e in rows]
        answers = greedy(model, tokenizer, prompts, NEW_TOKENS.get(task, DEFAULT_NEW_TOKENS))
        pairs = [(a, e.answer) for a, e in zip(answers, rows, strict=True)]
        table[task] = {
            "n": len(rows),
            "exact": round(sum(correct(task, a, w) for a, w in pairs) / len(rows), 4),
            "partial": round(sum(partly(task, a, w) for a, w in pairs) / len(rows), 4),
        }
    model.train()
    return table
