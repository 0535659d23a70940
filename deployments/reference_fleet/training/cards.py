"""Writes the model cards and the README's tables.

Command: `python -m deployments.reference_fleet.training.cards`.

Scores and costs come from `scores.json`, which `python -m load_tests fleet --json` writes; facts
about training from `models/*/scores.json`. The texts about data and failures are here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.reference_fleet.paths import MODELS, README, SCORES

COSTS = ("tpot_ms", "energy_j_per_token_estimated")
BUSY = "tpot_16_ms"
BEGIN, FINISH = "<!-- scores -->", "<!-- end of scores -->"

SNIPS = "SNIPS (Coucke et al., 2018; github.com/sonos/nlu-benchmark), CC0-1.0"
WIKISQL = "WikiSQL (Zhong et al., 2017; github.com/jkkummerfeld/text2sql-data), BSD-3-Clause"
ADVISING = "advising (Finegan-Dollak et al., ACL 2018; same repository), CC-BY-4.0"
NL2BASH = "nl2bash data (Lin et al., LREC 2018; github.com/TellinaTool/nl2bash), MIT"
SVAMP = "SVAMP (Patel et al., NAACL 2021; github.com/arkilpatel/SVAMP), MIT"
CLINC = "CLINC150 (Larson et al., EMNLP 2019; github.com/clinc/oos-eval), CC-BY-3.0"
OWN = "problems and instruction templates of this project"


@dataclass(frozen=True)
class Card:
    """The texts of a model card."""

    purpose: str
    data: tuple[str, ...]
    measure: str
    failures: str


CARDS = {
    "extract": Card(
        'Turns a request into `{"intent": ..., "slots": {...}}`.',
        (SNIPS, OWN),
        "exact: equal as JSON. The published validation files, repeated requests once.",
        "Long names with rare words are copied with a slip; track, album and artist are confused; "
        "an answer is always one of seven intents, also for other requests.",
    ),
    "sql": Card(
        "Turns a question into one `SELECT` in a short normal form, without a schema.",
        (WIKISQL, ADVISING, OWN),
        "exact: equal but for case, spaces and the order of conditions. advising: the published "
        "question split, in which every question has its template in training. wikisql: 1,200 "
        "drawn rows of the published test split; the 11 % whose value does not occur in the "
        "question are left out, so on all rows the share is at most 0.89 of the one given. "
        "Without a schema many columns cannot be known: about 0.60 of the rows name all of theirs.",
        "Column names are guessed from the words of the question, so a synonym is an error; "
        "rare values are copied with a slip; joins exist for the advising schema alone.",
    ),
    "shell": Card(
        "Turns English into one bash command.",
        (NL2BASH, OWN),
        "exact: equal words, harsh as most requests have many right commands; template: utilities, "
        "options and operators equal, arguments left out; utility: same first word. The best of "
        "all commands given for the same English counts. Test side: SHA-1 of the lower-cased "
        "English, mod 1000, below 50.",
        "Options are often plausible and wrong. Never run an answer unread.",
    ),
    "reason": Card(
        "Works out short arithmetic word problems line by line and ends with `#### result`.",
        (SVAMP, OWN),
        "exact: same result; steps: same calculations. SVAMP: SHA-1 of the problem, mod 1000, "
        "below 200; generated: the same hash below 50.",
        "Trained on problems of one to three steps only, so that longer ones are the "
        "generalist's; numbers that are not needed; anything like GSM8K is out of reach.",
    ),
    "intent": Card(
        'Names one of 150 intents, or `oos`: `{"intent": "translate"}`.',
        (CLINC, WIKISQL, NL2BASH, OWN),
        "exact: same label, greedy, so in and out of scope are at one threshold. The published "
        "test split; 80 % of the published validation rows were trained on.",
        "Out-of-scope requests that resemble a known intent; near neighbours "
        "such as balance and bill_balance.",
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


MODELS_SHOWN = ("extract", "sql", "shell", "reason", "intent", "general", "general:mixture")
COLUMNS = ("model", "slice", "n", "exact", "95 % interval", "parts")
COST_COLUMNS = (
    "model",
    "ms per token, alone",
    "with 16",
    "J per token (est.)",
    "general costs more by",
)


def _json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def rows(figures: dict[str, Any], model: str) -> list[list[str]]:
    """One row per slice that `model` answered, as cells of `COLUMNS`."""
    found = []
    for key in figures:
        name, _, measure = key.rpartition(".")
        if measure != "n" or not name.startswith(f"{model}."):
            continue
        low, high = figures[f"{name}.exact_ci95"]
        parts = [
            f"{other.rpartition('.')[2].replace('_', ' ')} {value:.2f}"
            for other, value in figures.items()
            if other.rpartition(".")[0] == name and not other.endswith((".n", ".exact", "_ci95"))
        ]
        part = name.removeprefix(f"{model}.").replace(".", ": ").replace("_", " ")
        exact, interval = f"{figures[f'{name}.exact']:.2f}", f"{low:.2f} to {high:.2f}"
        found.append([model, part, str(figures[key]), exact, interval, ", ".join(parts)])
    return found


def markdown(cells: list[list[str]], head: tuple[str, ...] = COLUMNS) -> list[str]:
    """A table as lines of Markdown; columns with figures are right aligned."""
    rule = ["--:" if c in ("n", "exact") else "---" for c in head]
    return [f"| {' | '.join(row)} |" for row in (list(head), rule, *cells)]


def card(name: str, measured: dict[str, Any]) -> str:
    """The model card as Markdown."""
    numbers, texts = _json(MODELS / name / "scores.json"), CARDS[name]
    settings, figures = _json(MODELS / name / "config.json"), measured["figures"]
    tpot, energy = (figures[f"{name}.cost.{key}"] for key in COSTS)
    lines = [
        f"# {name}",
        "",
        texts.purpose,
        "",
        f"- Architecture: `{settings['architectures'][0]}`, "
        f"{settings['num_hidden_layers']} layers x {settings['hidden_size']}, "
        f"vocabulary {settings['vocab_size']}, "
        f"{numbers['parameters'] / 1e6:.2f} M parameters, bf16, at most 2,048 tokens. "
        f"Answers end with `<|end|>`.",
        f"- Training: from scratch on one CPU core, "
        f"{numbers['training_seconds'] / 60:.0f} minutes, "
        f"{numbers['training_tokens'] / 1e6:.1f} M tokens, {numbers['steps']:,} steps of Muon. "
        f"Recipe: `python -m deployments.reference_fleet.training.train {name}`.",
        f"- Cost: {tpot:.2f} ms per token alone, {energy:.4f} J per token (estimated from CPU "
        f"time), on {measured['machine']['cores']} cores of {measured['machine']['processor']}.",
        f"- Licence of the weights: as the project. Data and attribution: {'; '.join(texts.data)}.",
        f"- {CHANGES}",
        "",
        *markdown([row[1:] for row in rows(figures, name)], COLUMNS[1:]),
        "",
        f"Greedy, as served, in domain, {sampling_note(measured)}: `python -m load_tests fleet`. "
        f"{texts.measure}",
        "",
        f"Known failures: {texts.failures}",
        "",
        "![answer loss and greedy score over steps](loss.png)",
    ]
    return "\n".join(lines + _variants(name, figures)) + "\n"


def sampling_note(measured: dict[str, Any]) -> str:
    """Which held-out rows were used."""
    limit = measured["config"]["limit"]
    return f"held-out rows, at most {limit} of each slice" if limit else "all held-out rows"


def _variants(name: str, figures: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for path in sorted((MODELS / name / "adapters").glob("*")):
        found = f"adapter.{path.name}.exact"
        own, base = figures[f"extract:{path.name}.{found}"], figures[f"extract.{found}"]
        lines.append(
            f"- `adapters/{path.name}`: LoRA of rank 8, answers {FORMS[path.name]}; exact "
            f"{own:.2f} of {figures[f'extract.adapter.{path.name}.n']} held-out requests "
            f"(the base, which knows its own schema alone: {base:.2f})."
        )
    return ["", "## Adapters", *lines] if lines else []


def table(figures: dict[str, Any]) -> list[str]:
    """The score table of the README."""
    return markdown([row for name in MODELS_SHOWN for row in rows(figures, name)])


def costs(figures: dict[str, Any]) -> list[str]:
    """The cost table of the README."""
    dearest = figures["general.cost.tpot_ms"]
    cells = []
    for name in (m for m in MODELS_SHOWN if f"{m}.cost.tpot_ms" in figures):
        tpot, busy, joules = (figures[f"{name}.cost.{k}"] for k in (COSTS[0], BUSY, COSTS[1]))
        ratio = f"{dearest / tpot:.1f}"
        cells.append([name, f"{tpot:.2f}", f"{busy:.2f}", f"{joules:.4f}", ratio])
    return markdown(cells, COST_COLUMNS)


def main() -> None:
    """Rewrites the five cards and the tables between their two markers."""
    measured = _json(SCORES)
    for name in CARDS:
        (MODELS / name / "README.md").write_text(card(name, measured), encoding="utf-8")
    head, rest = README.read_text(encoding="utf-8").split(BEGIN)
    tail = rest.split(FINISH)[1]
    figures = measured["figures"]
    note = f"{sampling_note(measured).capitalize()}; {measured['machine']['at']}."
    body = "\n".join([note, "", *table(figures), "", *costs(figures)])
    README.write_text(f"{head}{BEGIN}\n{body}\n{FINISH}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
