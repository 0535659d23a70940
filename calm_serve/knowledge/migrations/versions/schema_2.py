"""Untyped `extra` becomes typed columns; versions become records instead of one string."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "2"
down_revision = "1"

PAGE_ROWS = 1000  # rows in memory at a time
_JSON = sa.JSON(none_as_null=True)
_TABLE = sa.table(
    "outcomes",
    sa.column("row", sa.BigInteger),
    sa.column("predicted", sa.JSON),
    sa.column("versions", sa.JSON),
    sa.column("extra", sa.JSON),
    sa.column("load_at_decision", _JSON),
    sa.column("terms", _JSON),
    sa.column("preferred", sa.Text),
    sa.column("preferred_hot", sa.Boolean),
    sa.column("shadow", _JSON),
)
_META = sa.table("meta", sa.column("key", sa.Text), sa.column("value", sa.Text))
_WEIGHTS = (
    "latency_per_s",
    "energy_per_j",
    "switching",
    "quality",
    "late_ttft_per_s",
    "late_ttft_after_s",
    "late_e2e_per_s",
    "late_e2e_after_s",
)
_PREDICTION = ("success_ratio", "output_tokens", "ttft_s", "tpot_s", "energy_j")
_DEFAULT_SPREAD = 0.5  # of a prediction whose spread was not logged


def upgrade() -> None:
    """Add the columns, fill them page by page, drop `extra`."""
    for column in (
        sa.Column("load_at_decision", _JSON, nullable=True),
        sa.Column("terms", _JSON, nullable=True),
        sa.Column("preferred", sa.Text, nullable=False, server_default=""),
        sa.Column("preferred_hot", sa.Boolean, nullable=True),
        sa.Column("shadow", _JSON, nullable=True),
        sa.Column("engine_ttft_s", sa.Float(53), nullable=False, server_default="0"),
        sa.Column("engine_running", sa.Integer, nullable=False, server_default="0"),
        sa.Column("engine_waiting", sa.Integer, nullable=False, server_default="0"),
        sa.Column("engine_kv_usage_ratio", sa.Float(53), nullable=False, server_default="0"),
    ):
        op.add_column("outcomes", column)
    connection = op.get_bind()
    for page in _pages(connection):
        update = sa.update(_TABLE).where(_TABLE.c.row == sa.bindparam("its_row"))
        columns = ("predicted", "versions", "load_at_decision", "terms", "preferred")
        names = (*columns, "preferred_hot", "shadow")
        values = {name: sa.bindparam(f"new_{name}", type_=_TABLE.c[name].type) for name in names}
        connection.execute(update.values(values), [_changed(row) for row in page])
    op.drop_column("outcomes", "extra")
    # Programs without migrations read the version here, and refuse a newer one.
    version = sa.update(_META).where(_META.c.key == "schema_version").values(value=revision)
    if not connection.execute(version).rowcount:
        connection.execute(sa.insert(_META).values(key="schema_version", value=revision))


def _pages(connection: sa.Connection) -> Iterator[Sequence[Any]]:
    last = 0
    query = sa.select(_TABLE.c.row, _TABLE.c.predicted, _TABLE.c.versions, _TABLE.c.extra)
    while True:
        after = query.where(_TABLE.c.row > last).order_by(_TABLE.c.row).limit(PAGE_ROWS)
        page = connection.execute(after).all()
        if not page:
            return
        yield page
        last = page[-1].row


def _changed(row: Any) -> dict[str, Any]:
    extra = row.extra or {}
    load, shadow = extra.get("load_met"), extra.get("shadow")
    if load is not None:
        load = dict(zip(("running", "in_flight", "ttft_ratio"), load, strict=True))
    if shadow is not None:
        shadow = {**shadow, "success_ratio": shadow["success"]}
        del shadow["success"]
    predicted = list(row.predicted or ()) or None
    return {
        "its_row": row.row,
        "new_predicted": predicted and [*predicted, _DEFAULT_SPREAD, _DEFAULT_SPREAD],
        "new_versions": _versions(row.versions),
        "new_load_at_decision": load,
        "new_terms": _terms(extra),
        "new_preferred": extra.get("preferred", ""),
        "new_preferred_hot": extra.get("preferred_hot"),
        "new_shadow": shadow,
    }


def _versions(versions: Sequence[str]) -> dict[str, Any]:
    predictor, goals, fleet = versions
    champion, *parts = predictor.split("+")
    return {
        "predictor": {
            "champion": champion,
            "cold_start": next((p for p in parts if p.startswith("new-")), ""),
            "shipped": "shipped" in parts,
        },
        "goals": goals,
        "fleet": fleet,
    }


def _terms(extra: Mapping[str, Any]) -> dict[str, Any] | None:
    if "candidates" not in extra or "weights" not in extra:
        return None
    rows = extra["candidates"]
    ttft_ms, tpot_ms, deadline_s = extra.get("slo") or (None, None, None)
    weights = {"quality": 1.0, **dict.fromkeys(_WEIGHTS[4:], 0.0)}
    return {
        "candidates": {
            "slm_id": [row[0] for row in rows],
            **{name: [row[i] for row in rows] for i, name in enumerate(_PREDICTION, 1)},
            "ttft_spread": [row[8] if len(row) > 8 else _DEFAULT_SPREAD for row in rows],
            "e2e_spread": [row[9] if len(row) > 9 else _DEFAULT_SPREAD for row in rows],
            "hot": [bool(row[6]) for row in rows],
            "calibration_factor": [row[7] for row in rows],
        },
        # Schema 1 left out the last weights when no target had set them.
        "weights": {**weights, **dict(zip(_WEIGHTS, extra["weights"], strict=False))},
        "left_out": extra.get("left_out", 0),
        "slo": {"ttft_ms": ttft_ms, "tpot_ms": tpot_ms, "deadline_s": deadline_s},
        "quality_floor": extra.get("floor", 0.0),
    }
