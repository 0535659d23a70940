"""Probing: every SLM of a running service answers every prompt, and the grades become a table.

The table is written line by line as prompts are done, and prompts that it has are not asked again,
so a probe that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import httpx

from calm_serve.datasets.grading import JUDGE_TOKENS, PromptRow, grade, judge_prompt, read_grade
from calm_serve.datasets.table import TableRow, difference, read_lines, row_of
from calm_serve.errors import ComponentError, ConfigError, RequestError
from calm_serve.types import Task

CHAT = "/v1/chat/completions"
FLEET = "/v1/fleet"
# What the service refuses for one SLM and not for another: it cannot take the prompt. Such an
# answer has the score 0.
_REFUSED = frozenset({400, 413, 422})
_BUSY = frozenset({429, 500, 502, 503, 504})  # asked again
ATTEMPTS = 5
FIRST_WAIT_S, MAX_WAIT_S = 1.0, 30.0  # between attempts, doubling; Retry-After counts

Progress = Callable[[int, int], None]  # (prompts done, prompts in all)


@dataclass(slots=True)
class ProbeReport:
    """What a probe did; `failed` has the line of a prompt and why it has no row."""

    written: int = 0
    skipped: int = 0
    failed: list[tuple[int, str]] = field(default_factory=list)


class _Failed(Exception):
    """No grade for one prompt; the others go on."""


class Probe:
    """Asks one service. `clock` counts seconds; `judge` is the SLM that grades, "" for none."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        judge: str = "",
    ) -> None:
        self._client, self._clock, self._sleep, self._judge = client, clock, sleep, judge

    async def run(
        self, prompts: Sequence[PromptRow], out: Path, concurrency: int, progress: Progress
    ) -> ProbeReport:
        """Ask all prompts that `out` does not have yet, `concurrency` at once, and append them.

        Raises ConfigError for a table of other SLMs and a judge that the service does not have,
        ComponentError when the service cannot be reached.
        """
        slms = await self.slms()
        if self._judge and self._judge not in slms:
            raise ConfigError(f"judge {self._judge!r} is not among the SLMs {', '.join(slms)}")
        done = _done(out, slms, prompts)
        todo = _todo(prompts, done)
        report = ProbeReport(skipped=len(prompts) - len(todo))
        progress(report.skipped, len(prompts))
        queue = iter(todo)

        with out.open("ab") as file:

            async def worker() -> None:
                for number, prompt in queue:
                    await self._append(file, number, prompt, slms, report)
                    finished = report.skipped + report.written + len(report.failed)
                    progress(finished, len(prompts))

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(concurrency):
                        group.create_task(worker())
            except* (ComponentError, ConfigError) as errors:
                raise errors.exceptions[0] from None
        report.failed.sort()
        return report

    async def slms(self) -> list[str]:
        """Ids of the SLMs that generate text. Raises RequestError and ComponentError."""
        try:
            response = await self._send("GET", FLEET, None)
            rows = response.raise_for_status().json()["slms"]
            found = [row["id"] for row in rows if row.get("task", Task.GENERATE) == Task.GENERATE]
        except _Failed as error:
            raise ComponentError(f"{FLEET}: {error}") from error
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{FLEET}: not the answer of calm_serve: {error!r}") from error
        if not found:
            raise RequestError(f"{FLEET}: the service has no SLM that generates text")
        return sorted(found)

    async def _append(
        self,
        file: BinaryIO,
        number: int,
        prompt: PromptRow,
        slms: Sequence[str],
        report: ProbeReport,
    ) -> None:
        try:
            row = await self._row(prompt, slms)
        except _Failed as error:
            report.failed.append((number, str(error)))
            return
        # One write of a whole line: an interruption leaves whole lines, but for a full disk.
        file.write(row.line().encode())
        file.flush()
        report.written += 1

    async def _row(self, prompt: PromptRow, slms: Sequence[str]) -> TableRow:
        scores: dict[str, float] = {}
        latencies_s: dict[str, float] = {}
        refused: list[str] = []
        for slm in slms:
            body = prompt.body() | {"model": slm}
            if prompt.max_tokens is not None:
                body["max_tokens"] = prompt.max_tokens
            response, latencies_s[slm] = await self._ask(slm, body)
            if response.status_code in _REFUSED:
                scores[slm] = 0.0
                refused.append(f"{slm}: {_message(response)}")
            else:
                scores[slm] = await self._score(prompt, slm, _answer(slm, response))
        if len(refused) == len(slms):
            raise _Failed(f"every SLM refused it; {refused[0]}")
        return TableRow(
            prompt=prompt.prompt,
            messages=prompt.messages,
            scores=scores,
            latencies_s=latencies_s,
            task=prompt.task,
            split=prompt.split,
        )

    async def _score(self, prompt: PromptRow, slm: str, text: str) -> float:
        # In a thread: a validator may take 100 ms, in which other answers would look slow.
        score = await asyncio.to_thread(grade, prompt, text)
        if score is not None:
            return score
        message = {"role": "user", "content": judge_prompt(prompt, text)}
        body = {"model": self._judge, "messages": [message], "max_tokens": JUDGE_TOKENS}
        response, _ = await self._ask(self._judge, body)
        if response.status_code in _REFUSED:
            raise _Failed(f"judge on the answer of {slm}: {_message(response)}")
        reply = _answer(self._judge, response)
        if (score := read_grade(reply)) is None:
            raise _Failed(f"judge on the answer of {slm}: no grade in {reply[:80]!r}")
        return score

    async def _ask(self, slm: str, body: Mapping[str, Any]) -> tuple[httpx.Response, float]:
        """The response to a chat request, and the seconds that it took.

        While the service is busy it is asked again; the seconds are those of the last attempt.
        """
        wait_s = FIRST_WAIT_S
        for attempt in range(ATTEMPTS):
            started = self._clock()
            response = await self._send("POST", CHAT, body)
            took_s = max(self._clock() - started, 0.0)
            if response.status_code not in _BUSY:
                break
            if attempt < ATTEMPTS - 1:
                await self._sleep(min(max(wait_s, _retry_after_s(response)), MAX_WAIT_S))
                wait_s *= 2.0
        else:
            raise _Failed(f"{slm}: {_message(response)}")
        if response.is_success or response.status_code in _REFUSED:
            return response, took_s
        raise ConfigError(f"{slm}: {_message(response)}")  # 401, 404, …: of every prompt

    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> httpx.Response:
        try:
            return await self._client.request(method, path, json=body)
        except httpx.TimeoutException as error:
            raise _Failed(f"no answer in time: {error!r}") from error
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise RequestError(f"{self._client.base_url}: {error}") from error
        except httpx.TransportError as error:
            raise ComponentError(f"cannot reach {self._client.base_url}: {error}") from error


def read_prompts(path: Path, *, has_judge: bool) -> list[PromptRow]:
    """Read and check the prompts. Raises ConfigError that names the line and the field."""
    rows = read_lines(path, PromptRow)
    if not rows:
        raise ConfigError(f"{path.name}: there is no prompt")
    for number, row in enumerate(rows, start=1):
        where = f"{path.name}: line {number}"
        if row.needs_judge and not has_judge:
            raise ConfigError(f"{where}: answers: no answers, no validator, and --judge names none")
        for name in ("task", "split"):
            if (getattr(row, name) is None) != (getattr(rows[0], name) is None):
                raise ConfigError(f"{where}: {name}: it is on every line or on none")
    return rows


def _todo(prompts: Sequence[PromptRow], done: set[str]) -> list[tuple[int, PromptRow]]:
    """Prompts that are not done, each text once, with their lines."""
    first = {prompt.key: number for number, prompt in reversed(list(enumerate(prompts, 1)))}
    return [
        (number, prompt)
        for number, prompt in enumerate(prompts, 1)
        if prompt.key not in done and first[prompt.key] == number
    ]


def _done(out: Path, slms: Sequence[str], prompts: Sequence[PromptRow]) -> set[str]:
    """Keys of the rows of an existing table, which must be of the same SLMs and columns."""
    if not out.exists():
        return set()
    _drop_torn_line(out)
    found = set()
    for number, row in enumerate(read_lines(out, TableRow), start=1):
        where = f"{out.name}: line {number}"
        if wrong := difference(row.scores, slms):
            raise ConfigError(f"{where}: scores: {wrong}; write to another file")
        for name in ("task", "split"):
            if (getattr(row, name) is None) != (getattr(prompts[0], name) is None):
                raise ConfigError(f"{where}: {name}: the prompts differ; write to another file")
        found.add(row.key)
    return found


def _drop_torn_line(out: Path) -> None:
    """End the file with a whole line: an interrupted write is taken back."""
    data = out.read_bytes()
    last = data[data.rfind(b"\n") + 1 :]
    if not last:
        return
    try:
        row_of(last, TableRow, out.name)
    except ConfigError:
        with out.open("r+b") as file:
            file.truncate(len(data) - len(last))
    else:
        with out.open("ab") as file:
            file.write(b"\n")


def _answer(slm: str, response: httpx.Response) -> str:
    try:
        return str(response.json()["choices"][0]["message"]["content"] or "")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _Failed(f"{slm}: not a chat completion: {error!r}") from error


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"


def _retry_after_s(response: httpx.Response) -> float:
    try:
        return float(response.headers.get("retry-after", 0.0))
    except ValueError:  # a date
        return 0.0
