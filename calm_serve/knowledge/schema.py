"""Schema: the store's tables in this program; `migrations` brings an older store to them."""

from __future__ import annotations

import sqlalchemy as sa

METADATA = sa.MetaData()
_ROW = sa.BigInteger().with_variant(sa.Integer, "sqlite")
_DOUBLE = sa.Float(53)
_JSON_OR_NULL = sa.JSON(none_as_null=True)

OUTCOMES = sa.Table(
    "outcomes",
    METADATA,
    sa.Column("row", _ROW, primary_key=True, autoincrement=True),
    sa.Column("outcome_id", sa.Text, nullable=False, unique=True),
    sa.Column("at", _DOUBLE, nullable=False),
    sa.Column("slm_id", sa.Text, nullable=False),
    sa.Column("adapter", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("rule", sa.Text, nullable=False),
    sa.Column("propensity", _DOUBLE, nullable=False),
    sa.Column("status", sa.Text, nullable=False),
    sa.Column("http_status", sa.Integer, nullable=False),
    sa.Column("retries", sa.Integer, nullable=False),
    sa.Column("predicted_replica", sa.Text, nullable=False),
    sa.Column("served_replica", sa.Text, nullable=False),
    sa.Column("cold", sa.Boolean, nullable=False),
    sa.Column("ttft_s", _DOUBLE, nullable=True),
    sa.Column("e2e_s", _DOUBLE, nullable=True),
    sa.Column("tpot_s", _DOUBLE, nullable=True),
    sa.Column("decision_s", _DOUBLE, nullable=False),
    sa.Column("prompt_tokens", sa.Integer, nullable=False),
    sa.Column("cached_tokens", sa.Integer, nullable=False),
    sa.Column("output_tokens", sa.Integer, nullable=False),
    sa.Column("energy_j", _DOUBLE, nullable=True),
    sa.Column("energy_source", sa.Text, nullable=False),
    sa.Column("task", sa.Text, nullable=False),
    # JSON keeps every float exactly.
    sa.Column("numbers", sa.JSON, nullable=False),
    sa.Column("buckets", sa.JSON, nullable=False),
    sa.Column("load", sa.JSON, nullable=False),
    sa.Column("predicted", sa.JSON, nullable=False),
    sa.Column("versions", sa.JSON, nullable=False),
    sa.Column("prompt", sa.Text, nullable=True),
    sa.Column("queue_s", _DOUBLE, nullable=True),
    sa.Column("labelled", sa.Boolean, nullable=False),
    sa.Column("load_at_decision", _JSON_OR_NULL, nullable=True),
    sa.Column("terms", _JSON_OR_NULL, nullable=True),
    sa.Column("preferred", sa.Text, nullable=False),
    sa.Column("preferred_hot", sa.Boolean, nullable=True),
    sa.Column("shadow", _JSON_OR_NULL, nullable=True),
    sa.Column("engine_ttft_s", _DOUBLE, nullable=False),
    sa.Column("engine_running", sa.Integer, nullable=False),
    sa.Column("engine_waiting", sa.Integer, nullable=False),
    sa.Column("engine_kv_usage_ratio", _DOUBLE, nullable=False),
    sa.Column("failure", sa.Text, nullable=False),
    sa.Column("failed_attempts", _JSON_OR_NULL, nullable=True),
    sa.Column("cost", _DOUBLE, nullable=True),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("bits", sa.JSON, nullable=False),
    sa.Column("novelty", _JSON_OR_NULL, nullable=True),
    sa.Index("outcomes_at", "at", "row"),
    sa.Index("outcomes_labelled", "labelled", "row"),
    sqlite_autoincrement=True,
)
# One row per outcome and source: a later signal replaces an earlier one, so signals are bounded.
SIGNALS = sa.Table(
    "signals",
    METADATA,
    sa.Column("row", _ROW, primary_key=True, autoincrement=True),
    sa.Column("outcome_id", sa.Text, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("value", sa.Float(53), nullable=False),
    sa.Column("at", sa.Float(53), nullable=False),
    sa.UniqueConstraint("outcome_id", "source"),
    sqlite_autoincrement=True,
)
GOAL_CHANGES = sa.Table(
    "goal_changes",
    METADATA,
    sa.Column("row", _ROW, primary_key=True, autoincrement=True),
    sa.Column("at", sa.Float(53), nullable=False),
    sa.Column("by", sa.Text, nullable=False),
    sa.Column("old", sa.JSON(none_as_null=True), nullable=True),
    sa.Column("new", sa.JSON, nullable=False),
    sqlite_autoincrement=True,
)
META = sa.Table(
    "meta",
    METADATA,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
