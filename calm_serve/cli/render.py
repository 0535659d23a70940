"""Plain-text tables of `calm`, from configuration and from the service's JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calm_serve.config import Fleet, Scaling, SLMSpec
from calm_serve.errors import RequestError
from calm_serve.types import Task

_UNKNOWN = "-"
_FILE = "SLM WEIGHTS WHERE DOES RESIDENCY BATCHING REPLICAS CPUS GPUS MEMORY CONTEXT SKILLS"
_STATE = (
    "SLM STATE REPLICAS RUNNING WAITING KV CACHED MEMORY START TTFT TPOT J/TOKEN REQUESTS FAILURES "
    "NOTE"
)
_DECISION = "SLM SCORE QUALITY LATENCY ENERGY SWITCHING P(OK) TOKENS TTFT E2E JOULES NOTE"


def table(header: str, rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return aligned columns under the words of `header`.

    The first `left` columns and the last one are text; the others are numbers, right-aligned.
    """
    lines = [header.split(), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = {*range(left), len(widths) - 1}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in text else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def size(count: float | None) -> str:
    """Return bytes with a binary unit, "-" for None."""
    if count is None:
        return _UNKNOWN
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} GiB"


def seconds(value: float | None) -> str:
    """Return a time in us, ms or s, "-" for None."""
    if value is None:
        return _UNKNOWN
    if value < 1e-3:
        return f"{value * 1e6:.0f} us"
    return f"{value * 1e3:.4g} ms" if value < 1 else f"{value:.4g} s"


def number(value: float | None, form: str = ".3g") -> str:
    """Return a formatted number, "-" for None."""
    return _UNKNOWN if value is None else format(value, form)


def rendered(render: Callable[[Mapping[str, Any]], str], answer: Mapping[str, Any]) -> str:
    """Return `render(answer)`. Raises RequestError when the answer is not calm_serve's."""
    try:
        return render(answer)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # A service of another version, or another program at the URL.
        raise RequestError(f"the answer does not look like calm_serve's: {error!r}") from error


def fleet_file(fleet: Fleet) -> str:
    """Return the table of `calm check`: each SLM and the resources of one replica."""
    rows = [
        (
            slm.id,
            Path(slm.model).name,
            slm.locality,
            _does(slm),
            slm.residency,
            slm.batching.value,
            _replicas(slm.scaling),
            f"{slm.resources.num_cpus:g}",
            f"{slm.resources.num_gpus:g}",
            size(slm.resources.memory_bytes) if slm.remote is None else _UNKNOWN,
            str(slm.context_tokens),
            ", ".join(slm.skills),
        )
        for slm in fleet.slms
    ]
    return table(_FILE, rows, left=6)


def _does(slm: SLMSpec) -> str:
    """Return task and capabilities, as stated or found in the model's folder."""
    if slm.task is not Task.GENERATE:
        return slm.task.value
    able = [name for name, has in slm.capabilities.model_dump().items() if has]
    return ",".join(name for name in able if name != "json_output") or "prompts"


def fleet_state(answer: Mapping[str, Any]) -> str:
    """Return the table of `calm fleet` from GET /v1/fleet's answer."""
    rows = [
        (
            slm["id"],
            slm["state"],
            f"{slm['replicas']}/{slm['target_replicas']}",
            f"{slm['running']}/{slm['capacity']}",
            str(slm["waiting"]),
            number(slm["kv_usage_ratio"], ".0%"),
            number(slm["cached_prefix_ratio"], ".0%"),
            size(slm["memory_bytes"]),
            seconds((slm["ready_s"] or {}).get("total")),
            seconds(slm["ttft_s"]),
            seconds(slm["tpot_s"]),
            number(slm["energy_j_per_token"]),
            str(slm["requests"]),
            str(slm["failures"]),
            slm["detail"] or "",
        )
        for slm in answer["slms"]
    ]
    version = (answer.get("predictor") or {}).get("version") or "none"
    ready = "ready" if answer["ready"] else "not ready"
    return f"fleet {ready}, predictor {version}\n\n{table(_STATE, rows, left=2)}"


def decision(record: Mapping[str, Any]) -> str:
    """Return a decision record of `ModelSelector.explain` as text."""
    context, versions = record["context"], record["versions"]
    chosen = f"{record['slm_id']}:{record['adapter']}" if record["adapter"] else record["slm_id"]
    reason = f"{record['path']}, {record['reason']}"
    if record["rule"]:
        reason += f", rule {record['rule']}"
    prompt = [
        f"about {context['prompt_tokens']} tokens",
        f"output {context['output_shape']}",
        f"language {context['language']} ({context['language_ratio']:.2f})",
    ]
    if context["markers"]:
        prompt.append(f"markers {', '.join(context['markers'])}")
    if context["safety_class"] not in ("", "none"):
        prompt.append(f"safety class {context['safety_class']}")
    facts = [f"propensity {record['propensity']:.3g}"]
    facts.append(f"decided in {seconds(record['decided_in_s'])}")
    facts.append(f"predictor {versions['predictor']}")
    if novelty := record.get("novelty"):
        facts.append(f"novelty {novelty['ratio']:.2f}, unfamiliar above {novelty['threshold']:.2f}")
    if others := [slm_id for slm_id in record["ranking"] if slm_id != record["slm_id"]]:
        facts.append(f"failover to {', '.join(others)}")
    if unscored := record["unscored"]:
        facts.append(f"then, by score, to {', '.join(unscored)}")
    rows = [_candidate(c, record["slm_id"]) for c in record["candidates"]]
    return "\n".join(
        (
            f"-> {chosen}  ({reason})",
            f"   prompt: {'; '.join(prompt)}",
            f"   {'; '.join(facts)}",
            "",
            table(_DECISION, rows),
        )
    )


def _candidate(candidate: Mapping[str, Any], chosen: str) -> tuple[str, ...]:
    name = candidate["slm_id"]
    if candidate["excluded_by"]:
        return (f"  {name}", *[_UNKNOWN] * 10, f"excluded: {candidate['excluded_by']}")
    name = f"{'>' if name == chosen else ' '} {name}"
    prediction = candidate["prediction"]
    if prediction is None:  # chosen by a rule, without a prediction
        return (name, number(candidate["score"]), *[_UNKNOWN] * 9, "")
    e2e_s = prediction["ttft_s"] + prediction["tpot_s"] * max(prediction["output_tokens"] - 1, 0)
    return (
        name,
        number(candidate["score"]),
        *(number(candidate[term]) for term in ("quality", "latency", "energy", "switching")),
        number(prediction["success_ratio"], ".2f"),
        number(prediction["output_tokens"], ".0f"),
        seconds(prediction["ttft_s"]),
        seconds(e2e_s),
        number(prediction["energy_j"]),
        "",
    )


def _replicas(scaling: Scaling) -> str:
    low, high = scaling.min_replicas, scaling.max_replicas
    return str(low) if low == high else f"{low}-{high}"


def interval(value: float, ci95: list[float] | tuple[float, float]) -> str:
    """Return a value with its 95 % interval."""
    return f"{value:.4g} [{ci95[0]:.4g}, {ci95[1]:.4g}]"
