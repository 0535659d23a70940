"""Formats: what is written is read, older versions are upgraded, newer ones refused by name."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.errors import KnowledgeError
from calm_serve.protocol.formats import RecordFormat
from calm_serve.protocol.outcomes import OUTCOME, SIGNALS
from calm_serve.protocol.reports import (
    DEMAND_REPLY,
    DEMAND_REPORT,
    ENERGY_REPORT,
    REPLICA_REPORT,
    DemandReply,
    ReplicaReport,
)
from calm_serve.protocol.topics import (
    FORMATS,
    GOAL_CHANGES,
    REGISTRATION,
    PublishedPredictor,
    Topic,
    Update,
    decode,
)
from tests.unit.protocol.strategies import records

ALL: dict[str, RecordFormat[Any]] = {
    f.name: f
    for f in (
        *FORMATS.values(),
        REPLICA_REPORT,
        ENERGY_REPORT,
        DEMAND_REPORT,
        DEMAND_REPLY,
        OUTCOME,
        SIGNALS,
        REGISTRATION,
        GOAL_CHANGES,
    )
}


@dataclass(frozen=True)
class Reading:
    """What `READING` writes: version 1 had "celsius", version 2 "kelvin" and no place."""

    kelvin: float
    place: str


def to_2(plain: dict[str, Any]) -> dict[str, Any]:
    return {"kelvin": plain["celsius"] + 273.15}


def to_3(plain: dict[str, Any]) -> dict[str, Any]:
    return {**plain, "place": "unknown"}


READING: RecordFormat[Reading] = RecordFormat("reading", 3, Reading, {1: to_2, 2: to_3}, bare=1)


def document(version: Any, record: Any, name: str = "reading") -> bytes:
    return json.dumps({"format": name, "version": version, "record": record}).encode()


def test_every_topic_has_a_format_of_its_own_name() -> None:
    assert {topic: str(topic) for topic in Topic} == {t: f.name for t, f in FORMATS.items()}
    assert len(ALL) == len(Topic) + 8


@pytest.mark.parametrize("name", ALL)
@given(st.data())
def test_every_record_comes_back_as_it_was(name: str, data: st.DataObject) -> None:
    found = ALL[name]
    record = data.draw(records(found._record))
    written = found.encode(record)
    assert b"\n" not in written
    assert found.decode(written) == record
    assert found.decode(written.decode()) == record


def test_infinity_and_bytes_are_kept() -> None:
    reply = DemandReply({"small": math.inf, "large": -math.inf})
    assert DEMAND_REPLY.decode(DEMAND_REPLY.encode(reply)) == reply
    blob = bytes(range(256)) * 10
    predictor = PublishedPredictor("v1", "trained", blob)
    topic = FORMATS[Topic.PREDICTOR]
    assert topic.decode(topic.encode(predictor)).blob == blob


def test_a_text_that_utf8_cannot_encode_is_replaced_and_no_error() -> None:
    report = ReplicaReport("failed", detail="half \ud800 a character", ready_s={"\udfff": 1.0})
    found = REPLICA_REPORT.decode(REPLICA_REPORT.encode(report))
    assert found == ReplicaReport("failed", detail="half ? a character", ready_s={"?": 1.0})


def test_name_and_version_are_in_front_of_the_record() -> None:
    written = json.loads(READING.encode(Reading(280.0, "here")))
    assert list(written.items()) == [
        ("format", "reading"),
        ("version", 3),
        ("record", {"kelvin": 280.0, "place": "here"}),
    ]


def test_an_older_version_is_upgraded_step_by_step() -> None:
    assert READING.decode(document(2, {"kelvin": 280.0})) == Reading(280.0, "unknown")
    assert READING.decode(document(1, {"celsius": 0.0})) == Reading(273.15, "unknown")


def test_data_without_a_version_is_of_the_version_that_had_none() -> None:
    assert READING.decode(b'{"celsius": 0.0}') == Reading(273.15, "unknown")
    with pytest.raises(KnowledgeError, match="reply: no version in front of it"):
        RecordFormat("reply", 1, Reading).decode(b'{"kelvin": 1.0, "place": ""}')


@pytest.mark.parametrize("name", ALL)
def test_a_newer_version_is_refused_naming_both_versions(name: str) -> None:
    mine = ALL[name].version
    with pytest.raises(KnowledgeError) as refused:
        ALL[name].decode(document(mine + 1, None, name))
    assert f"{name}: version {mine + 1} was written by a newer program" in refused.value.message
    assert f"reads versions up to {mine}" in refused.value.message


def test_a_version_that_nothing_upgrades_is_too_old() -> None:
    recent: RecordFormat[Reading] = RecordFormat("reading", 3, Reading, {2: to_3})
    assert recent.decode(document(2, {"kelvin": 280.0})) == Reading(280.0, "unknown")
    with pytest.raises(KnowledgeError, match="reading: version 1 is too old to be read"):
        recent.decode(document(1, {"celsius": 0.0}))


@pytest.mark.parametrize(
    "record", [None, 5, "text", [], {}, {"celsius": "warm"}, {"celsius": None}, {"celsius": {}}]
)
def test_a_malformed_old_record_is_refused_by_its_version(record: Any) -> None:
    with pytest.raises(KnowledgeError, match="malformed reading of version 1"):
        READING.decode(document(1, record))


def test_an_upgrade_that_finds_another_type_is_no_crash() -> None:
    def upgrade(plain: dict[str, Any]) -> dict[str, Any]:
        return {"kelvin": plain["text"].split("+")}

    broken: RecordFormat[Reading] = RecordFormat("reading", 2, Reading, {1: upgrade})
    with pytest.raises(KnowledgeError, match="malformed reading of version 1"):
        broken.decode(document(1, {"text": 5}))


def test_another_format_is_refused_by_name() -> None:
    with pytest.raises(KnowledgeError, match="expected 'reading', found 'energy'"):
        READING.decode(document(3, {"kelvin": 1.0, "place": ""}, "energy"))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\x00", b"not json", b'{"format": "\\ud800"}'])
def test_what_is_not_json_is_refused(data: bytes) -> None:
    with pytest.raises(KnowledgeError, match="reading: not JSON"):
        READING.decode(data)


@pytest.mark.parametrize("data", [b"5", b"null", b"[1]", b'"text"'])
def test_json_that_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(KnowledgeError, match="reading: not a record but"):
        READING.decode(data)


@pytest.mark.parametrize("version", [None, "3", 0, -1, 1.5, [3]])
def test_a_version_that_is_no_number_is_refused(version: Any) -> None:
    with pytest.raises(KnowledgeError, match="reading: no version in front of it"):
        READING.decode(document(version, {"kelvin": 1.0, "place": ""}))


@pytest.mark.parametrize(
    ("record", "where"),
    [({"kelvin": "warm", "place": ""}, "kelvin"), ({"kelvin": 1.0}, "place"), (5, ""), (None, "")],
)
def test_a_malformed_record_is_refused_naming_the_field(record: Any, where: str) -> None:
    with pytest.raises(KnowledgeError, match=f"malformed reading: {where}"):
        READING.decode(document(3, record))


def test_a_field_that_a_later_release_added_is_passed_over() -> None:
    record = {"kelvin": 1.0, "place": "here", "humidity": 0.5}
    assert READING.decode(document(3, record)) == Reading(1.0, "here")


def test_an_unknown_topic_is_refused_by_name() -> None:
    with pytest.raises(KnowledgeError, match="unknown topic 'weather'"):
        decode("weather", Update(1, b"{}"))


@pytest.mark.parametrize("topic", Topic)
def test_a_topics_update_is_read_by_its_format_alone(topic: Topic) -> None:
    others = [t for t in Topic if t is not topic]
    for other in others:
        with pytest.raises(KnowledgeError, match=f"expected '{topic}', found '{other}'"):
            decode(topic, Update(1, document(1, {}, str(other))))
