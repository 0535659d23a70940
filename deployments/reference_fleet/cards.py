"""Writes the model cards and the README's table from `models/*/scores.json`.

`python -m deployments.reference_fleet.cards` reads measured numbers only; the words
about data and failures are kept here, beside the names of the sources.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODELS = HERE / "models"
BEGIN, FINISH = "<!-- scores -->", "<!-- end of scores -->"

SNIPS = "SNIPS (Coucke et al., 2018; github.com/sonos/nlu-benchmark), CC0-1.0"
WIKISQL = "WikiSQL (Zhong et al., 2017; github.com/jkkummerfeld/text2sql-data), BSD-3-Clause"
ADVISING = "advising (Finegan-Dollak et al., ACL 2018; same repository), CC-BY-4.0"
NL2BASH = "nl2bash data (Lin et al., LREC 2018; github.com/TellinaTool/nl2bash), MIT"
SVAMP = "SVAMP (Patel et al., NAACL 2021; github.com/arkilpatel/SVAMP), MIT"
CLINC = "CLINC150 (Larson et al., EMNLP 2019; github.com/clinc/oos-eval), CC-BY-3.0"
VERSE = "tiny Shakespeare and the sonnets, public domain"
OWN = "problems, chat and instruction templates of this project"


@dataclass(frozen=True)
class Card:
    """What a card says besides the numbers."""

    does: str
    data: tuple[str, ...]
    measure: str
    failures: str


CARDS = {
    "extract": Card(
        'Turns a request into `{"intent": ..., "slots": {...}}`.',
        (SNIPS, OWN),
        "exact: equal as JSON; partial: same intent. Published validation files.",
        "Long names with rare words are copied with a slip; track, album and artist are confused; "
        "an answer is always one of seven intents, whatever is asked.",
    ),
    "sql": Card(
        "Turns a question into one `SELECT` in a short normal form, without a schema.",
        (WIKISQL, ADVISING, OWN),
        "exact: equal text; partial: same SELECT part. Published test split, "
        "a tenth of it advising. Rows whose value does not occur in the question "
        "are left out of training and test.",
        "Column names are guessed from the words of the question, so a synonym is an error; "
        "rare values are copied with a slip; joins exist for the advising schema alone.",
    ),
    "shell": Card(
        "Turns English into one bash command.",
        (NL2BASH, OWN),
        "exact: equal words, a harsh measure as most requests have many right commands; "
        "partial: same first command. "
        "Test side: SHA-1 of the lower-cased English, mod 1000, below 50.",
        "Options are often plausible and wrong. Never run an answer unread.",
    ),
    "reason": Card(
        "Works out arithmetic word problems line by line and ends with `#### result`.",
        (SVAMP, OWN),
        "exact: same result; partial: same first line. "
        "Half SVAMP (SHA-1 of the problem, mod 1000, below 200), half generated.",
        "Multi-digit products; problems with numbers that are not needed; "
        "anything like GSM8K is out of reach.",
    ),
    "intent": Card(
        'Names one of 150 intents, or `oos`: `{"intent": "translate"}`.',
        (CLINC, OWN, "out-of-scope extras from the training sides of SNIPS, WikiSQL and nl2bash"),
        "exact: equal as JSON. Published test split with its out-of-scope share of 18 %.",
        "Out-of-scope requests that resemble a known intent; near neighbours "
        "such as balance and bill_balance.",
    ),
    "general": Card(
        "A deeper, dearer model that does all five tasks, continues verse and answers short chat.",
        (SNIPS, WIKISQL, ADVISING, NL2BASH, SVAMP, CLINC, VERSE, OWN),
        "as the specialists', 40 rows of each.",
        "A bare request that could be two tasks (a SNIPS and a CLINC150 sentence) is answered "
        "as either; verse has metre and no sense; chat knows its templates and nothing else.",
    ),
}
FORMS = {
    "flat": '`{"task": "play_music", ...}`',
    "music": '`{"action": "play", "music": {...}}`',
}
CHANGES = (
    "Changes made to the sources: slot annotations and labels written as JSON, "
    "SQL rewritten in a normal form, values exchanged between training rows, "
    "instructions added to half of the prompts."
)


def facts(name: str) -> dict[str, Any]:
    """The measured numbers of one model."""
    loaded: dict[str, Any] = json.loads((MODELS / name / "scores.json").read_text())
    return loaded


def _measured(row: dict[str, float]) -> str:
    return f"| {row['n']} | {row['exact']:.2f} | {row['partial']:.2f} |"


def card(name: str) -> str:
    """The model card as Markdown."""
    numbers, words = facts(name), CARDS[name]
    settings = json.loads((MODELS / name / "config.json").read_text())
    rows = [f"| {t} {_measured(r)}" for t, r in numbers["greedy"].items()]
    lines = [
        f"# {name}",
        "",
        words.does,
        "",
        f"- Architecture: `{settings['architectures'][0]}`, "
        f"{settings['num_hidden_layers']} layers x {settings['hidden_size']}, "
        f"vocabulary {settings['vocab_size']}, "
        f"{numbers['parameters'] / 1e6:.2f} M parameters, bf16, at most 2,048 tokens. "
        f"Answers end with `<|end|>`.",
        f"- Training: from scratch on one CPU core, "
        f"{numbers['training_seconds'] / 60:.0f} minutes, "
        f"{numbers['training_tokens'] / 1e6:.1f} M tokens, {numbers['steps']:,} steps of AdamW. "
        f"Recipe: `python -m deployments.reference_fleet.train {name}`.",
        f"- Licence of the weights: as the project. Data and attribution: {'; '.join(words.data)}.",
        f"- {CHANGES}",
        "",
        "| task | n | exact | partial |",
        "|---|--:|--:|--:|",
        *rows,
        "",
        f"Greedy, in domain, measured with the training code on held-out rows. {words.measure}",
        "",
        f"Known failures: {words.failures}",
        "",
        "![answer loss and greedy score over steps](loss.png)",
    ]
    return "\n".join(lines + _adapters(name)) + "\n"


def _adapters(name: str) -> list[str]:
    lines: list[str] = []
    for path in sorted((MODELS / name / "adapters").glob("*/scores.json")):
        row = json.loads(path.read_text())
        lines.append(
            f"- `adapters/{path.parent.name}`: LoRA of rank 8, answers {FORMS[path.parent.name]}; "
            f"exact {row['exact']:.2f} of {row['n']} held-out requests."
        )
    return ["", "## Adapters", *lines] if lines else []


def table() -> str:
    """The score table of the README."""
    lines = [
        "| model | layers | parameters | task | n | exact | partial |",
        "|---|--:|--:|---|--:|--:|--:|",
    ]
    for name in CARDS:
        numbers = facts(name)
        layers = json.loads((MODELS / name / "config.json").read_text())["num_hidden_layers"]
        for task, row in numbers["greedy"].items():
            lines.append(
                f"| {name} | {layers} | {numbers['parameters'] / 1e6:.1f} M "
                f"| {task} {_measured(row)}"
            )
    return "\n".join(lines)


def main() -> None:
    """Rewrites the six cards and the table between its two markers."""
    for name in CARDS:
        (MODELS / name / "README.md").write_text(card(name), encoding="utf-8")
    page = HERE / "README.md"
    head, rest = page.read_text(encoding="utf-8").split(BEGIN)
    tail = rest.split(FINISH)[1]
    page.write_text(f"{head}{BEGIN}\n{table()}\n{FINISH}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
