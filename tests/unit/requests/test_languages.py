"""The detector of languages: what it recognises, where it doubts, and when it is needed at all."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm_serve.config import Rule
from calm_serve.config.languages import DETECTED_LANGUAGES
from calm_serve.requests import (
    ContextBuilder,
    Overrides,
    load_detector,
    needs_detector,
    parse_chat,
)
from calm_serve.requests.languages import LANGUAGE_CHARS, MIN_RATIO
from calm_serve.routing.filters import CERTAIN_LANGUAGE_RATIO
from calm_serve.testing import make_fleet, make_spec
from calm_serve.types import UNKNOWN_LANGUAGE

DETECTOR = load_detector()
SENTENCES = {
    "ar": ["كيف سيكون الطقس غدا في الإسكندرية؟", "أريد إلغاء طلبي", "كم عدد السفن في الميناء؟"],
    "de": ["Wie ist das Wetter morgen?", "Ich möchte meine Bestellung stornieren"],
    "en": ["Which ships are in the harbour?", "I want to cancel my order"],
    "es": ["¿Qué tiempo hará mañana en Sevilla?", "Quiero cancelar mi pedido"],
    "fr": ["Quel temps fera-t-il demain à Lyon ?", "Je voudrais annuler ma commande"],
    "it": ["Che tempo farà domani a Napoli?", "Vorrei annullare il mio ordine"],
    "ja": ["明日の札幌の天気はどうですか。", "注文をキャンセルしたいです"],
    "ko": ["내일 부산 날씨가 어떤가요?", "주문을 취소하고 싶어요"],
    "nl": ["Schrijf een kort gedicht over de herfst.", "Ik wil mijn bestelling annuleren"],
    "pl": ["Jaka będzie jutro pogoda w Krakowie?", "Chcę anulować moje zamówienie"],
    "pt": ["Escreve um poema curto sobre o outono.", "Quantos navios estão no porto?"],
    "ru": ["Какая завтра будет погода в Казани?", "Я хочу отменить заказ"],
    "sv": ["Förklara varför himlen är blå.", "Jag vill avboka min beställning"],
    "tr": ["Limanda kaç gemi var?", "Siparişimi iptal etmek istiyorum"],
    "zh": ["写一首关于秋天的短诗。", "我想取消订单", "请解释天空为什么是蓝色的。"],
}
DUTCH = "Hoeveel schepen liggen er vandaag in de haven van Rotterdam?"


def test_a_fleet_file_may_name_exactly_the_languages_that_can_be_detected() -> None:
    assert DETECTOR.languages == DETECTED_LANGUAGES


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_is_enough(language: str) -> None:
    assert {DETECTOR.detect(text)[0] for text in SENTENCES[language]} == {language}


@pytest.mark.parametrize(
    "text", ["", "hi", "12 + 30", "ls -la", "SELECT 1", "Paris", "😀😀", "xkcd qwrt zzkp", "okay"]
)
def test_what_is_in_no_language_is_unknown(text: str) -> None:
    assert DETECTOR.detect(text) == (UNKNOWN_LANGUAGE, 0.0)


@given(st.text())
def test_any_text_has_a_language_that_can_be_configured_or_none(text: str) -> None:
    language, ratio = DETECTOR.detect(text)
    if language == UNKNOWN_LANGUAGE:
        assert ratio == 0.0
    else:
        assert language in DETECTED_LANGUAGES
        assert MIN_RATIO <= ratio <= 1.0


@pytest.mark.parametrize(
    "text",
    [
        "How many points did agnieszka radwańska score ?",
        "when was albert einstein born",
        "how much do i owe visa",
    ],
)
def test_foreign_names_in_english_make_no_language_certain(text: str) -> None:
    language, ratio = DETECTOR.detect(text)
    assert language in ("en", UNKNOWN_LANGUAGE) or ratio < CERTAIN_LANGUAGE_RATIO


def test_the_time_does_not_grow_with_the_text() -> None:
    """Ten times the usual time, because the machine may be busy."""
    text = "a prompt in no hurry " * 50_000
    assert DETECTOR.detect(text) == DETECTOR.detect(text[:LANGUAGE_CHARS])
    best_s = 1.0
    for _ in range(50):
        started = time.perf_counter()
        DETECTOR.detect(text)
        best_s = min(best_s, time.perf_counter() - started)
    assert best_s < 1e-3


RULE = Rule(name="dutch", language="nl", slms=("small",))


@pytest.mark.parametrize(
    ("languages", "rules", "needed"),
    [
        ([["en"], ["en"]], (), False),
        ([["en", "de"], ["de", "en"]], (), False),
        ([[], []], (), False),
        ([["en"], []], (), True),
        ([["en"], ["nl"]], (), True),
        ([["en"], ["en"]], (RULE,), True),
    ],
)
def test_languages_are_detected_only_where_a_decision_can_depend_on_them(
    languages: list[list[str]], rules: tuple[Rule, ...], needed: bool
) -> None:
    ids = ("small", "large")
    slms = [make_spec(i, languages=spoken) for i, spoken in zip(ids, languages, strict=True)]
    fleet = make_fleet(*slms, rules=rules)
    assert needs_detector(fleet) == needed
    body: dict[str, Any] = {"messages": [{"role": "user", "content": DUTCH}]}
    context = ContextBuilder(fleet).build(parse_chat(body), Overrides(), "id")
    assert context.language == ("nl" if needed else UNKNOWN_LANGUAGE)
    assert (context.language_ratio > CERTAIN_LANGUAGE_RATIO) == needed


def test_slms_of_different_tasks_are_not_compared() -> None:
    embedding = make_spec("search", task="embed", languages=["nl"])
    assert not needs_detector(make_fleet(make_spec("small"), embedding))


def test_the_language_is_that_of_the_users_last_message() -> None:
    fleet = make_fleet(make_spec("small"), make_spec("large", languages=["nl"]))
    turns = [
        {"role": "system", "content": "Answer in one word, and in English only, please."},
        {"role": "user", "content": "How are you today, my dear friend?"},
        {"role": "assistant", "content": "Very well, thank you for asking."},
        {"role": "user", "content": DUTCH},
    ]
    context = ContextBuilder(fleet).build(parse_chat({"messages": turns}), Overrides(), "id")
    assert context.language == "nl"
