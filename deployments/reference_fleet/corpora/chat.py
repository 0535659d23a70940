"""Short chat and verse for the generalist: templates of this project, and public domain texts."""

from __future__ import annotations

from random import Random

from deployments.reference_fleet.corpora import problems, sources

GREETINGS = (
    "Hello",
    "Hi",
    "Hey",
    "Hello there",
    "Good morning",
    "Good evening",
    "Hi there",
    "Good day",
)
GREETED = (
    "Hello! How can I help?",
    "Hi! What can I do for you?",
    "Hello! What would you like to do?",
)
FIXED: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("Who are you?", "What are you?", "Introduce yourself."),
        "I am a small general model of the reference fleet.",
    ),
    (
        ("What can you do?", "How can you help me?", "What are you good at?", "Help"),
        "I can write JSON, SQL and bash, solve small problems, name intents and continue verse.",
    ),
    (("Thanks", "Thank you", "Thank you very much", "Great, thanks"), "You are welcome."),
    (("Bye", "Goodbye", "See you later", "Good night"), "Goodbye! Come back any time."),
    (
        ("How are you?", "How are you today?", "How do you do?"),
        "I am well, thank you. How can I help?",
    ),
    (
        ("Are you a human?", "Are you a robot?", "Are you real?"),
        "I am a language model, and a small one.",
    ),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh."),
        "Why did the token cross the road? It was next in line.",
    ),
    (
        ("What is the meaning of life?", "Why are we here?"),
        "People disagree. Kindness is a good start.",
    ),
    (("Yes", "Okay", "Sure", "Fine"), "Good. What is next?"),
    (("No", "No thanks", "Not now"), "All right. Tell me when you need me."),
    (("Sorry", "I am sorry", "My mistake"), "No problem at all."),
    (
        ("What is JSON?", "Explain JSON."),
        "JSON is a text format for objects, lists, numbers and strings.",
    ),
    (("What is SQL?", "Explain SQL."), "SQL is a language for asking questions of tables."),
    (("What is bash?", "Explain bash."), "Bash is a shell: it reads commands and runs programs."),
    (("What is a language model?",), "A language model predicts the next token of a text."),
    (("Say hello.", "Greet me."), "Hello!"),
    (
        ("Tell me a story.", "Tell me a short story."),
        "A small boat left the harbour at dawn, met the storm, and came home at night.",
    ),
    (("Give me some advice.", "What should I do?"), "Start small, measure, and rest."),
    (("Are you there?", "Can you hear me?", "Ping"), "Yes, I am here."),
)
WORDS: dict[str, tuple[str, ...]] = {
    "colour": ("red", "blue", "green", "yellow", "black", "white", "orange"),
    "animal": ("cat", "dog", "horse", "owl", "fox", "whale", "bear"),
    "fruit": ("apple", "pear", "plum", "cherry", "grape", "lemon"),
    "season": ("spring", "summer", "autumn", "winter"),
    "planet": ("Mercury", "Venus", "Earth", "Mars", "Jupiter", "Saturn"),
}
OPPOSITES = tuple(
    tuple(pair.split("/"))
    for pair in [
        "hot/cold",
        "big/small",
        "up/down",
        "left/right",
        "day/night",
        "fast/slow",
        "open/closed",
        "hard/soft",
        "high/low",
        "old/young",
        "rich/poor",
        "early/late",
        "full/empty",
        "light/dark",
        "love/hate",
        "war/peace",
    ]
)
CAPITALS = tuple(
    tuple(pair.split("/"))
    for pair in [
        "France/Paris",
        "Italy/Rome",
        "Spain/Madrid",
        "Germany/Berlin",
        "Japan/Tokyo",
        "China/Beijing",
        "Egypt/Cairo",
        "Greece/Athens",
        "Portugal/Lisbon",
        "Austria/Vienna",
        "Norway/Oslo",
        "Sweden/Stockholm",
        "Finland/Helsinki",
        "Poland/Warsaw",
        "Kenya/Nairobi",
        "Peru/Lima",
        "Canada/Ottawa",
        "India/Delhi",
    ]
)
NAMES = problems.NAMES[:18]


def chat(rng: Random) -> tuple[str, str]:
    """One short exchange (question, answer)."""
    kind = rng.randrange(7)
    if kind == 0:
        return rng.choice(GREETINGS) + rng.choice(("", "!", ".")), rng.choice(GREETED)
    if kind <= 2:
        questions, answer = rng.choice(FIXED)
        return rng.choice(questions), answer
    if kind == 3:
        group = rng.choice(sorted(WORDS))
        return rng.choice((f"Name a {group}.", f"Tell me a {group}")), rng.choice(WORDS[group])
    if kind == 4:
        pair = rng.choice(OPPOSITES)
        one, other = pair if rng.random() < 0.5 else pair[::-1]
        form = rng.choice(
            ("What is the opposite of {}?", "Opposite of {}", "Name the opposite of {}.")
        )
        return form.format(one), other
    if kind == 5:
        country, city = rng.choice(CAPITALS)
        form = rng.choice(
            ("What is the capital of {}?", "Capital of {}?", "Name the capital of {}.")
        )
        return form.format(country), city
    name = rng.choice(NAMES)
    form = rng.choice(("My name is {}.", "I am {}.", "Hello, I am {}.", "Hi, my name is {}"))
    return form.format(name), f"Hello {name}! How can I help?"


CONTINUE = (
    "Continue: {x}",
    "Continue this text:\n{x}",
    "Write the next lines.\n{x}",
    "What comes next?\n{x}",
    "Complete the verse:\n{x}",
)
STYLE = (
    "Write a line in the style of Shakespeare.",
    "Write a line of verse.",
    "Write two lines in the style of a sonnet.",
    "Write a line in the style of an old play.",
    "Give me some poetry.",
    "Write a short poem.",
)


class Prose:
    """Continuations of verse."""

    def __init__(self) -> None:
        self.passages = sources.prose()

    def sample(self, rng: Random) -> tuple[str, str]:
        """A prompt of one to three lines and the one or two lines after it."""
        lines = rng.choice(self.passages)
        if rng.random() < 0.15:
            start = rng.randrange(len(lines) - 1)
            return rng.choice(STYLE), "\n".join(lines[start + 1 : start + 3])
        length = rng.randint(1, min(3, len(lines) - 1))
        start = rng.randrange(len(lines) - length)
        shown = "\n".join(lines[start : start + length])
        return rng.choice(CONTINUE).replace("{x}", shown), "\n".join(
            lines[start + length : start + length + 2]
        )
