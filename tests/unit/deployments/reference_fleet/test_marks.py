"""Marks of the reference fleet's answers."""

import pytest

from deployments.reference_fleet.grading.marks import (
    credit,
    marks,
    normal_sql,
    template,
)

SQL = 'SELECT MAX(points) FROM table WHERE team = "Ferrari" AND year > 1990'
SLOTS = '{"intent": "PlayMusic", "slots": {"artist": "Bach", "service": "Spotify"}}'
STEPS = "12 - 5 = 7\n7 + 1 = 8\n#### 8"


def test_sql_is_compared_without_case_and_order_of_conditions() -> None:
    other = 'select max(points) from table where year > 1990 and team = "ferrari"'
    assert normal_sql(other) == normal_sql(SQL)
    assert marks("sql", other, [SQL])["exact"] == 1.0


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        (SQL.replace("MAX(points)", "MIN(points)"), "aggregate"),
        (SQL.replace("MAX(points)", "MAX(wins)"), "select"),
        (SQL.replace("year", "season"), "where_columns"),
        (SQL.replace("1990", "1991"), "where_values"),
    ],
)
def test_each_part_of_a_query_is_marked_by_itself(answer: str, wrong: str) -> None:
    found = marks("sql", answer, [SQL])
    assert [name for name, value in found.items() if not value] == ["exact", wrong]


def test_an_answer_that_is_no_query_scores_on_no_part() -> None:
    plain = SQL.replace("MAX(points)", "points")
    assert not any(marks("sql", "hello", [plain]).values())


def test_a_join_has_no_parts() -> None:
    assert marks("sql", "SELECT a FROM b", ["SELECT a FROM b JOIN c ON b.x = c.x"]) == {
        "exact": 0.0
    }


def test_extraction_counts_slots() -> None:
    found = marks("extract", SLOTS.replace("Spotify", "Deezer"), [SLOTS])
    assert found == {"exact": 0.0, "intent": 1.0, "slot_f1": 0.5}


@pytest.mark.parametrize("answer", ["", "[1]", '{"intent": "PlayMusic", "slots": 3}'])
def test_malformed_extraction_is_wrong(answer: str) -> None:
    assert marks("extract", answer, [SLOTS])["exact"] == 0.0


@pytest.mark.parametrize(
    ("command", "shape"),
    [
        ("find . -name '*.py' -print0 | xargs -0 grep -l \"a b\" 2>/dev/null",
         "find ARG -name ARG -print0 | xargs ARG grep -l ARG 2> ARG"),
        (r"find /tmp -size +1M -exec rm -rf {} \; && echo done > out",
         "find ARG -size ARG -exec rm -rf ARG ; && echo ARG > ARG"),
        ("for i in $(seq 1 3); do echo $i; done",
         "for ARG ARG ARG ( seq ARG ARG ); do echo ARG ; done"),
    ],
)  # fmt: skip
def test_a_template_keeps_utilities_and_options(command: str, shape: str) -> None:
    assert template(command) == shape


def test_the_best_of_several_right_commands_counts() -> None:
    assert marks("shell", "wc -l a.txt", ["cat a.txt | wc -l", "wc -l a.txt"])["exact"] == 1.0


def test_a_problem_is_right_by_its_result_and_its_steps_apart() -> None:
    assert marks("reason", "#### 8", [STEPS]) == {"exact": 1.0, "steps": 0.0}
    assert marks("reason", STEPS, [STEPS]) == {"exact": 1.0, "steps": 1.0}
    assert marks("reason", "8", [STEPS])["exact"] == 0.0


def test_both_answers_of_a_mixed_request_have_to_be_right() -> None:
    wanted = f"1) {SLOTS}\n2) {STEPS}"
    assert marks("mixed", wanted, [wanted])["exact"] == 1.0
    half = marks("mixed", f"1) {SLOTS}\n2) #### 9", [wanted])
    assert (half["exact"], half["first"], half["second"]) == (0.0, 1.0, 0.0)
    assert marks("mixed", SLOTS, [wanted])["exact"] == 0.0


def test_credit_is_whole_for_exact_and_nothing_for_a_wrong_number_or_label() -> None:
    assert credit("reason", STEPS, [STEPS]) == 1.0
    assert credit("reason", "#### 9", [STEPS]) == 0.0
    assert credit("intent", '{"intent": "a"}', ['{"intent": "b"}']) == 0.0
    assert credit("shell", "wc -l b.txt", ["wc -l a.txt"]) == 0.7


PROSE = (
    "Time management gets better with a list of the three most important tasks of a day, "
    "and with a fixed hour in which nobody may disturb you."
)
QUESTION_WORDS = "improve management skills"


@pytest.mark.parametrize(
    "answer",
    [
        '{"intent": "translate"}',
        '{"intent": "GetWeather", "slots": {"improve": "management skills of all the people who',
        'SELECT management FROM table WHERE skills = "improve" AND a = 1 AND b = 2 AND c = 3',
        "find . -name management",
        "management " * 40,
        PROSE.replace("management", "gardening"),
        "",
    ],
    ids=["json", "broken json", "sql", "too short", "a loop", "about something else", "nothing"],
)
def test_only_prose_about_the_question_passes_for_an_answer_to_an_open_one(answer: str) -> None:
    assert marks("open", PROSE, [QUESTION_WORDS])["exact"] == 1.0
    assert marks("open", answer, [QUESTION_WORDS])["exact"] == 0.0


@pytest.mark.parametrize(
    ("answer", "named"),
    [
        ("B", 1.0),
        ("(c) because", 1.0),
        ("Answer: D. Urethra", 1.0),
        ("It is collected in the bladder.", 1.0),
        ("Because it is so.", 0.0),
        ('{"intent": "oos"}', 0.0),
        ('SELECT a FROM table WHERE organ = "Bladder"', 0.0),
    ],
)
def test_a_choice_has_to_name_one_of_its_options(answer: str, named: float) -> None:
    options = "A. Bladder\nB. Kidney\nC. Ureter\nD. Urethra"
    assert marks("choice", answer, [options])["exact"] == named


def test_knowledge_is_found_in_a_sentence_but_not_inside_a_word() -> None:
    assert marks("knowledge", "The capital of France is Paris.", ["Paris"])["exact"] == 1.0
    assert marks("knowledge", "It froze.", ["ice", "O"])["exact"] == 0.0
    assert credit("knowledge", "There are seven days.", ["7", "seven"]) == 1.0
