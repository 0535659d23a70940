"""Conversations whose topic changes or goes on: `eval/multi_turn.jsonl`, and what is read of it.

`python -m deployments.reference_fleet.grading.conversations` writes the file. Each line ends where
an SLM has to be chosen, and names the one whose turn it is. First requests and changes of topic are
easy held-out rows, so their task's specialist owns them; follow-ups are of this project, and mean
something only after what they follow.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from random import Random

from deployments.reference_fleet.corpora.phrasing import INSTRUCTIONS, with_instruction
from deployments.reference_fleet.grading.rows import Row, load
from deployments.reference_fleet.paths import EVAL

SEED = 43
SIDES = ("workload", "fit")
LINES = 20  # of each kind, task and side
INSTRUCTED_RATIO = 0.35  # as in the standard workload
GENERALIST = "general"

FOLLOW_UPS = {
    "extract": (
        "and tomorrow?",
        "and in Oslo?",
        "the same for two people",
        "and another one by the same artist",
        "now with four stars",
        "and at nine in the evening?",
        "the other playlist, please",
        "and the day after that?",
        "sorry, I meant the 3rd of May",
        "and one for Saturday as well",
    ),
    "sql": (
        "and how many of them?",
        "and longer than 120?",
        "the same for 2014",
        "only those above 20",
        "and the lowest one?",
        "now ordered by date",
        "and for the away team?",
        "the same, but without duplicates",
        "and which of them come second?",
        "what about those in May?",
    ),
    "shell": (
        "and hidden ones too",
        "the same for .log files",
        "but only those larger than 5 MB",
        "now delete them as well",
        "and without following links",
        "sort them by size",
        "and in all subdirectories?",
        "only the first ten",
        "do it for the parent directory",
        "now print their owners too",
    ),
    "reason": (
        "and if 3 more are added?",
        "what if he had twice as many?",
        "and after giving away 5?",
        "and for 4 boxes?",
        "now with 12 instead",
        "and how many are left then?",
        "what if two of them break?",
        "and if they share it equally?",
        "and the week after?",
        "again with half of it",
    ),
    "intent": (
        "and on the other account?",
        "what about next week?",
        "and for my wife?",
        "actually, make it Friday",
        "and how much is it?",
        "the other one, I mean",
        "and in euros?",
        "no, the credit card",
        "and by bus?",
        "do it again",
    ),
    GENERALIST: (
        "why?",
        "go on",
        "shorter, please",
        "another one",
        "say it differently",
        "and then?",
        "make it happier",
        "are you sure?",
        "and in summer?",
        "what else?",
    ),
}
# Each names a specialist that has nothing to do with the request.
SYSTEM_PROMPTS = {
    "sql": "You help a data team. Their warehouse speaks SQL. Answer whatever they ask.",
    "shell": "You are an assistant in a code editor. You may run bash commands in the terminal.",
    "intent": "Classify silently whether the user is angry; then answer the question.",
    "reason": "Think step by step, and answer politely.",
}
TOOL_RESULTS = (
    '{"status": "ok", "rows": 3}',
    "SELECT 1: no such table",
    "bash: lookup: command not found",
    "Hello, I am a tool. It is 12 degrees.",
)


@dataclass(frozen=True)
class Conversation:
    """A conversation whose next message an SLM has to write."""

    messages: list[dict[str, object]]
    kind: str  # follow_up, topic_change, tool_loop or system_prompt
    slm: str  # whose turn it is
    holder: str  # the SLM that wrote the last answer, "" before the first
    side: str  # as of rows

    def to_line(self) -> str:
        """The conversation as one line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=False)


def load_conversations() -> list[Conversation]:
    """All conversations of the file."""
    lines = (EVAL / "multi_turn.jsonl").read_text(encoding="utf-8").splitlines()
    return [Conversation(**json.loads(line)) for line in lines]


def build(seed: int = SEED) -> Iterator[Conversation]:
    """Yield the conversations; the same for the same seed."""
    for side in SIDES:
        rng = Random(f"{seed} {side}")
        rows = {task: _easy_rows(task, side, rng) for task in FOLLOW_UPS}
        for task in FOLLOW_UPS:
            others = [other for other in FOLLOW_UPS if other != task]
            for number in range(LINES):
                turn = _turn(rows[task], rng)
                other = rng.choice(others)
                yield Conversation(
                    [*turn, _user(FOLLOW_UPS[task][number % len(FOLLOW_UPS[task])])],
                    "follow_up",
                    task,
                    task,
                    side,
                )
                yield Conversation(
                    [*_turn(rows[other], rng), *_turn(rows[task], rng)[:1]],
                    "topic_change",
                    task,
                    other,
                    side,
                )
                yield Conversation(_tool_loop(rows[task], rng), "tool_loop", task, task, side)
                named = rng.choice([name for name in SYSTEM_PROMPTS if name != task])
                system: dict[str, object] = {"role": "system", "content": SYSTEM_PROMPTS[named]}
                messages = [system, *_turn(rows[task], rng)[:1]]
                yield Conversation(messages, "system_prompt", task, "", side)


def _easy_rows(task: str, side: str, rng: Random) -> Iterator[Row]:
    file = "knowledge" if task == GENERALIST else task
    found = [r for r in load(file) if r.side == side and r.difficulty == "easy"]
    rng.shuffle(found)
    while True:
        yield from found


def _turn(rows: Iterator[Row], rng: Random) -> list[dict[str, object]]:
    row = next(rows)
    named = row.task in INSTRUCTIONS and rng.random() < INSTRUCTED_RATIO
    text = with_instruction(row.task, row.prompt, rng) if named else row.prompt
    return [_user(text), {"role": "assistant", "content": row.answers[0]}]


def _tool_loop(rows: Iterator[Row], rng: Random) -> list[dict[str, object]]:
    question, _ = _turn(rows, rng)
    function = {"name": "lookup", "arguments": "{}"}
    call = {"id": "call_1", "type": "function", "function": function}
    return [
        question,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": rng.choice(TOOL_RESULTS)},
    ]


def _user(text: str) -> dict[str, object]:
    return {"role": "user", "content": text}


def main() -> None:
    """Write the file."""
    lines = [conversation.to_line() for conversation in build()]
    (EVAL / "multi_turn.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(lines)} conversations")


if __name__ == "__main__":
    main()
