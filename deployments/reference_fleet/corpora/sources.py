"""Readers of the public data sets. Nothing is downloaded: `DATA_DIR` names the folder.

Each reader returns plain tuples and keeps the published split. Where a source has none (nl2bash,
SVAMP), `held_out` makes one from a hash of the text: it is the same on every machine, and a
duplicate text cannot be on both sides.
"""

from __future__ import annotations

import bz2
import csv
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SNIPS_INTENTS = (
    "AddToPlaylist",
    "BookRestaurant",
    "GetWeather",
    "PlayMusic",
    "RateBook",
    "SearchCreativeWork",
    "SearchScreeningEvent",
)
PER_MILLE = 1000


@dataclass(frozen=True)
class Utterance:
    """One SNIPS utterance: its intent and its pieces, (text, slot name or '')."""

    intent: str
    pieces: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Query:
    """One question with its SQL; `{0}`, `{1}` stand for `values` in both texts."""

    question: str
    sql: str
    values: tuple[str, ...]
    kinds: tuple[str, ...]
    source: str


def data_dir() -> Path:
    """The folder that holds the public sources, from the `DATA_DIR` variable."""
    value = os.environ.get("DATA_DIR")
    if not value:
        raise RuntimeError("set DATA_DIR to the folder that holds the public data sets")
    return Path(value)


def held_out(text: str, per_mille: int) -> bool:
    """Whether `text` belongs to the test side: SHA-1 of its lower-cased words, mod 1000."""
    words = " ".join(text.lower().split())
    return int(hashlib.sha1(words.encode()).hexdigest(), 16) % PER_MILLE < per_mille


def _decode(raw: bytes) -> str:
    # Some SNIPS files are latin-1, the others UTF-8.
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def snips(split: str) -> list[Utterance]:
    """SNIPS utterances; `split` is 'train' (full files) or 'validate'."""
    found: list[Utterance] = []
    for intent in SNIPS_INTENTS:
        suffix = "_full" if split == "train" else ""
        path = data_dir() / "snips_json_extraction" / f"{split}_{intent}{suffix}.json"
        for row in json.loads(_decode(path.read_bytes()))[intent]:
            pieces = tuple((p["text"], p.get("entity", "")) for p in row["data"])
            found.append(Utterance(intent, pieces))
    return found


def clinc(split: str) -> list[tuple[str, str]]:
    """CLINC150 (utterance, intent); out-of-scope rows carry the intent 'oos'."""
    table = json.loads((data_dir() / "clinc150" / "data_full.json").read_text("utf-8"))
    return [(text, label) for text, label in table[split] + table[f"oos_{split}"]]


def nl2bash(split: str) -> list[tuple[str, str]]:
    """English and bash, line aligned; `held_out(english, 50)` is the test side."""
    folder = data_dir() / "nl2bash"
    english = (folder / "all.nl").read_text("utf-8").splitlines()
    bash = (folder / "all.cm").read_text("utf-8").splitlines()
    pairs = [(e.strip(), b.strip()) for e, b in zip(english, bash, strict=True)]
    return [p for p in pairs if p[0] and held_out(p[0], 50) == (split == "test")]


def svamp(split: str) -> list[tuple[str, str]]:
    """SVAMP (problem, equation); `held_out(problem, 200)` is the test side."""
    rows = json.loads((data_dir() / "svamp" / "SVAMP.json").read_text("utf-8"))
    found = []
    for row in rows:
        body = row["Body"].strip()
        joined = f"{body}{'' if body.endswith(('.', '?', '!')) else ','} {row['Question'].strip()}"
        if held_out(joined, 200) == (split == "test"):
            found.append((joined, str(row["Equation"])))
    return found


def gsm8k_test() -> list[tuple[str, str]]:
    """GSM8K test (question, final number): beyond what these models can solve."""
    lines = (data_dir() / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(r["question"], r["answer"].split("####")[-1].strip()) for r in rows]


def open_questions(name: str) -> list[str]:
    """First turns of 'mt_bench' or 'vicuna_bench', which have no one right answer."""
    path = data_dir() / "mt_bench_questions" / f"{name}_question.jsonl"
    lines = path.read_text("utf-8").splitlines()
    return [str(json.loads(line)["turns"][0]) for line in lines]


def mmlu() -> list[str]:
    """MMLU test questions with their four options, as in RouteLLM's tables; no key is published."""
    found: list[str] = []
    for path in sorted((data_dir() / "routellm" / "mmlu" / "responses").glob("mmlu_*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            found += [row["prompt"] for row in csv.DictReader(file)]
    return found


def wikisql(split: str) -> list[Query]:
    """WikiSQL questions by the published question split ('train', 'dev', 'test').

    Normal form: `SELECT MAX(points) FROM table WHERE team = "Ferrari" AND year > 1990`,
    columns in lower case with `_`, values spelled as in the question. A row whose value
    does not occur in its question is dropped (about one in ten).
    """
    raw = bz2.decompress((data_dir() / "text2sql" / "wikisql.json.bz2").read_bytes())
    found = []
    for entry in json.loads(raw):
        for sentence in entry["sentences"]:
            if sentence["question-split"] == split:
                query = _wikisql_query(entry["sql"][0], sentence)
                if query:
                    found.append(query)
    return found


def _column(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "col"


_HEAD = re.compile(r"SELECT (?:(COUNT|MAX|MIN|SUM|AVG) )?TABLEalias0\.(.+?)_FIELD FROM")
_TERM = re.compile(r'TABLEalias0\.(.+?)_FIELD ([=<>]) "?(var\d+)"?')


def _wikisql_query(sql: str, sentence: dict[str, Any]) -> Query | None:
    head = _HEAD.match(sql)
    where = sql.split(" WHERE ", 1)
    if head is None or len(where) < 2:
        return None
    question = " ".join(str(sentence["text"]).split())
    terms: list[str] = []
    values: list[str] = []
    kinds: list[str] = []
    for column, operator, name in _TERM.findall(where[1]):
        value = str(sentence["variables"].get(name, "")).strip()
        question, spelled = _mark(question, name, value, len(values))
        if spelled is None:
            return None
        slot = f"{{{len(values)}}}"
        numeric = re.fullmatch(r"-?\d+(\.\d+)?", spelled) is not None
        terms.append(f"{_column(column)} {operator} " + (slot if numeric else f'"{slot}"'))
        values.append(spelled)
        kinds.append("number" if numeric else _column(column))
    # Some rows carry a broken marker ("wvar1at" for "what"); they are dropped.
    if not terms or re.search(r"var\d", question):
        return None
    column = _column(head[2])
    chosen = f"{head[1]}({column})" if head[1] else column
    text = f"SELECT {chosen} FROM table WHERE " + " AND ".join(terms)
    return Query(question, text, tuple(values), tuple(kinds), "wikisql")


def _mark(question: str, name: str, value: str, index: int) -> tuple[str, str | None]:
    """The question with `{index}` for the value, and the value as the question spells it.

    The second is None where the question does not contain the value.
    """
    slot = f"{{{index}}}"
    if "{" in value or '"' in value or not value:
        return question, None
    if re.search(rf"\b{name}\b", question):
        return re.sub(rf"\b{name}\b", slot, question), value
    # Word boundaries, or "5" would be found inside "1995".
    match = re.search(rf"(?<!\w){re.escape(value)}(?!\w)", question, re.IGNORECASE)
    if match is None:
        return question, None
    return question[: match.start()] + slot + question[match.end() :], match[0]


def advising(split: str, longest: int = 720) -> list[Query]:
    """Advising questions with a normal form of at most `longest` characters."""
    path = data_dir() / "text2sql" / "advising.json"
    found = []
    for entry in json.loads(path.read_text("utf-8")):
        sql = _plain_sql(entry["sql"][0])
        if len(sql) > longest:
            continue
        for sentence in entry["sentences"]:
            if sentence["question-split"] == split:
                found.append(_advising_query(sql, sentence))
    return [q for q in found if q is not None]


def _plain_sql(sql: str) -> str:
    sql = re.sub(r"\bAS [A-Z_]+alias\d+\b", "", sql)
    sql = re.sub(r"\b([A-Z_]+)alias0\b", r"\1", sql)
    sql = re.sub(r"\b([A-Z_]+)alias(\d)\b", r"\1\2", sql)
    if " JOIN " not in sql and "," not in sql.split(" FROM ", 1)[1].split(" WHERE ")[0]:
        sql = re.sub(r"\b[A-Z_]+\.", "", sql)
    sql = re.sub(r"\s+", " ", sql.replace(";", "").replace("( * )", "(*)")).strip()
    sql = re.sub(r"\s+,", ",", sql).replace("INNER JOIN", "JOIN")
    keep = {"SELECT", "FROM", "WHERE", "AND", "OR", "NOT", "IN", "ON", "JOIN", "COUNT", "LIKE"}
    keep |= {"DISTINCT", "ORDER", "BY", "GROUP", "LIMIT", "DESC", "ASC", "MAX", "MIN", "BETWEEN"}
    words = re.split(r'("[^"]*"|\b[A-Z_0-9]+\b)', sql)
    return "".join(w if w in keep or w.startswith('"') else w.lower() for w in words)


def _advising_query(sql: str, sentence: dict[str, Any]) -> Query | None:
    question = " ".join(str(sentence["text"]).split())
    values: list[str] = []
    kinds: list[str] = []
    if "{" in sql or "{" in question:
        return None
    for name, value in sentence["variables"].items():
        pattern = rf"\b{name}\b"
        if not re.search(pattern, sql):
            continue
        # A variable that only the SQL has cannot be inferred from the question, so its value is
        # filled in. Where the published row gives no value, the name stays in both texts.
        if not re.search(pattern, question) or not value:
            sql = re.sub(pattern, value, sql) if value else sql
            continue
        slot = f"{{{len(values)}}}"
        sql = re.sub(pattern, slot, sql)
        question = re.sub(pattern, slot, question)
        values.append(value)
        kinds.append(name.rstrip("0123456789"))
    # `EECS` is implied where no department is named.
    sql = re.sub(r"\bdepartment\d\b", "EECS", sql)
    return Query(question, sql, tuple(values), tuple(kinds), "advising")
