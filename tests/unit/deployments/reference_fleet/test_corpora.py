"""The rules that make training and held-out examples, without data sets, weights or a network."""

import json
import re
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from deployments.reference_fleet.corpora import (
    adapter_schemas,
    examples,
    knowledge,
    phrasing,
    problems,
    shell,
    sources,
)

ROOT = Path(__file__).parents[4]


def _query(question: str, value: str) -> sources.Query | None:
    sql = (
        "SELECT TABLEalias0.NOTES_FIELD FROM TABLE AS TABLEalias0 "
        'WHERE TABLEalias0.YEAR/S_FIELD = "var0" ;'
    )
    return sources._wikisql_query(sql, {"text": question, "variables": {"var0": value}})


def test_sql_has_a_short_normal_form_with_the_questions_spelling() -> None:
    query = _query("Notes for south australia ?", "South Australia")
    assert query is not None
    pair = examples.filled(query, query.values)
    assert pair.answer == 'SELECT notes FROM table WHERE year_s = "south australia"'


def test_sql_without_the_value_in_the_question_is_dropped() -> None:
    assert _query("Notes for 1995 ?", "5") is None


def test_numbers_are_not_quoted() -> None:
    query = _query("Notes for 1995 ?", "1995")
    assert query is not None
    assert examples.filled(query, query.values).answer.endswith("year_s = 1995")


def test_swapped_values_change_question_and_sql_together() -> None:
    query = _query("Notes for south australia ?", "South Australia")
    assert query is not None
    pair = examples.filled(query, ("Bremen",))
    assert "Bremen" in pair.prompt
    assert "Bremen" in pair.answer


def test_extraction_keeps_the_order_of_the_text() -> None:
    pieces = (("play ", ""), ("Bach", "artist"), (" on ", ""), ("Spotify", "service"))
    pair = examples.extraction(sources.Utterance("PlayMusic", pieces))
    assert pair.prompt == "play Bach on Spotify"
    assert pair.answer == (
        '{"intent": "PlayMusic", "slots": {"artist": "Bach", "service": "Spotify"}}'
    )


@pytest.mark.parametrize("seed", range(50))
@pytest.mark.parametrize("held_out", [True, False])
def test_worked_steps_are_right(seed: int, held_out: bool) -> None:
    steps = 1 + seed % 6
    question, answer = problems.generated(Random(seed), steps, held_out=held_out)
    *lines, last = answer.split("\n")
    assert len(lines) == steps
    for line in lines:
        left, operator, right, result = re.fullmatch(r"(\d+) ([-+*/]) (\d+) = (\d+)", line).groups()  # type: ignore[union-attr]
        assert problems.apply(operator, int(left), int(right)) == int(result)
    assert problems.final_number(answer) == lines[-1].split(" = ")[1] == last.split()[1]
    assert sources.held_out(question, problems.TEST_PER_MILLE) is held_out


def test_svamp_numbers_change_in_text_and_steps_together() -> None:
    found = problems.from_svamp("Ana has 76 pens and 25 cups.", "( 76.0 - 25.0 )", Random(1))
    assert found is not None
    question, answer = found
    assert set(re.findall(r"\d+", question)) <= set(re.findall(r"\d+", answer))
    assert "76" not in question


def test_svamp_without_a_generator_is_unchanged() -> None:
    found = problems.from_svamp("76 and 25?", "( 76.0 - 25.0 )", None)
    assert found == ("76 and 25?", "76 - 25 = 51\n#### 51")


def test_three_in_five_prompts_are_bare() -> None:
    rng = Random(0)
    drawn = [phrasing.wrap("sql", "how many?", ("a", "b"), rng) for _ in range(2000)]
    bare = sum(m == [phrasing.user("how many?")] for m in drawn) / len(drawn)
    assert 0.55 < bare < 0.65
    assert all(m[-1]["role"] == "user" for m in drawn)


def test_text_with_braces_survives_an_instruction() -> None:
    assert "rm {} +" in phrasing.with_instruction("shell", "rm {} +", Random(0))


def test_the_held_out_side_is_stable() -> None:
    assert sources.held_out("Find all files", 1000)
    assert not sources.held_out("Find all files", 0)
    assert sources.held_out("Find  ALL files", 500) == sources.held_out("find all files", 500)


def test_data_dir_has_to_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DATA_DIR", raising=False)
    with pytest.raises(RuntimeError, match="DATA_DIR"):
        sources.data_dir()


def test_words_of_two_intents_make_a_request_out_of_scope() -> None:
    assert (
        examples._crossed("what is my balance", "book a flight to rome") == "what is flight to rome"
    )


def test_another_case_keeps_the_questions_placeholders() -> None:
    for seed in range(20):
        changed = examples._recased("Which Venue has a Date of {0} ?", Random(seed))
        assert changed.lower() == "which venue has a date of {0} ?"


def test_knowledge_questions_are_all_different_and_have_answers() -> None:
    asked = knowledge.questions()
    assert len({question for question, _ in asked}) == len(asked) >= 150
    assert all(answers and all(a.strip() == a for a in answers) for _, answers in asked)
    # A question that says its own answer would be right for any echo.
    assert not [q for q, answers in asked if any(a in q for a in answers if len(a) > 3)]


def test_words_that_a_request_shares_with_its_command_have_one_order() -> None:
    found = shell.shared_words(
        "copy b.txt and a.txt to /tmp/x 30 times", "cp a.txt b.txt 30 /tmp/x"
    )
    assert found == ["/tmp/x", "a.txt", "b.txt", "30"]


def test_adapters_answer_in_a_schema_of_their_own() -> None:
    slots = {"artist": "Bach"}
    flat = json.loads(adapter_schemas.reshaped("flat", "PlayMusic", slots))
    music = json.loads(adapter_schemas.reshaped("music", "PlayMusic", slots))
    assert flat == {"task": "play_music", "artist": "Bach"}
    assert music == {"action": "play", "music": slots}
    assert not adapter_schemas.covers("music", "GetWeather")


def test_reading_the_data_rules_imports_no_training_library() -> None:
    code = (
        "import deployments.reference_fleet.corpora.examples, sys; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
