"""How a request is phrased: bare, with an instruction, with a system prompt, after other turns.

More than half of the training prompts are bare, so a model answers without being told its task; the
others name the task in several paraphrases, so both work.
"""

from __future__ import annotations

from random import Random

Message = dict[str, str]

INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "extract": (
        "Extract the intent and slots as JSON: {x}",
        "Extract intent and slots: {x}",
        "Return JSON with the intent and its slots for: {x}",
        "Parse this request into JSON.\n{x}",
        "Turn this utterance into JSON with intent and slots: {x}",
        "Give me the slots as JSON: {x}",
        "{x}\nExtract the slots as JSON.",
    ),
    "sql": (
        "Write SQL: {x}",
        "Translate to SQL: {x}",
        "Write a SQL query for this question: {x}",
        "Turn this question into SQL.\n{x}",
        "SQL query for: {x}",
        "Convert the question to a SQL SELECT statement: {x}",
        "{x}\nAnswer with a SQL query.",
    ),
    "shell": (
        "Write a bash command: {x}",
        "Bash command to do this: {x}",
        "Give me the shell command: {x}",
        "Translate to bash.\n{x}",
        "How do I do this in the shell? {x}",
        "Linux command line: {x}",
        "{x}\nAnswer with one bash command.",
    ),
    "reason": (
        "Solve this word problem: {x}",
        "Solve step by step: {x}",
        "Work out the answer: {x}",
        "Solve the problem and show the steps.\n{x}",
        "Math problem: {x}",
        "Compute: {x}",
        "{x}\nShow your steps and end with #### and the answer.",
    ),
    "intent": (
        "Classify the intent: {x}",
        "What is the intent of this message? {x}",
        "Label the intent as JSON: {x}",
        "Which intent is this, or oos?\n{x}",
        "Intent classification: {x}",
        "Detect the user's intent: {x}",
        "{x}\nReturn the intent label.",
    ),
}
SYSTEM: dict[str, tuple[str, ...]] = {
    "extract": (
        "You extract the intent and slots of a request as JSON.",
        "You are an extraction model. Answer with JSON only.",
        "Return {intent, slots} as JSON for every user message.",
        "You turn utterances into structured JSON.",
    ),
    "sql": (
        "You turn questions into SQL.",
        "You are a text-to-SQL model. Answer with one query.",
        "Answer every question with a SQL query.",
        "You write SQL queries for a single table.",
    ),
    "shell": (
        "You turn English into bash commands.",
        "You are a shell assistant. Answer with one command.",
        "Answer with a bash command only.",
        "You write Linux command lines.",
    ),
    "reason": (
        "You solve arithmetic word problems step by step.",
        "You are a careful maths tutor. Show the steps, then #### and the result.",
        "Solve the problem. End with #### answer.",
        "You calculate.",
    ),
    "intent": (
        "You classify the intent of a message, or answer oos.",
        "You are an intent classifier. Answer with JSON.",
        "Label each message with one of 150 intents or oos.",
        "You route banking, travel and home requests by intent.",
    ),
    "general": ("You are a helpful assistant.", "Answer briefly.", "You are a general assistant."),
}
SMALL_TALK = (
    ("Hello", "Hello! How can I help?"),
    ("Hi", "Hello! How can I help?"),
    ("Thanks", "You are welcome."),
    ("Are you there?", "Yes, I am here."),
    ("I have a few requests.", "Go ahead."),
    ("Ready?", "Ready."),
)

TWO_REQUESTS = (
    "1) {a}\n2) {b}",
    "First: {a}\nSecond: {b}",
    "Two things. {a}\nAnd also: {b}",
    "{a}\nThen: {b}",
)


def wrap(task: str, text: str, earlier: tuple[str, str] | None, rng: Random) -> list[Message]:
    """Messages for `text`: about 60 % bare, 25 % with an instruction, 10 % with a system prompt,
    5 % after another turn."""
    kind = rng.random()
    instructions = INSTRUCTIONS.get(task)
    system = SYSTEM[task] if task in SYSTEM else SYSTEM["general"]
    if kind < 0.6:
        return [user(text)]
    if kind < 0.85 and instructions:
        return [user(with_instruction(task, text, rng))]
    if kind < 0.95:
        named = instructions and rng.random() < 0.25
        request = with_instruction(task, text, rng) if named else text
        return [{"role": "system", "content": rng.choice(system)}, user(request)]
    before = earlier if earlier and rng.random() < 0.6 else rng.choice(SMALL_TALK)
    head = [{"role": "system", "content": rng.choice(system)}] if rng.random() < 0.3 else []
    return [*head, user(before[0]), {"role": "assistant", "content": before[1]}, user(text)]


def with_instruction(task: str, text: str, rng: Random) -> str:
    """The text with an instruction that names the task."""
    # Not str.format: utterances and commands contain braces of their own.
    return rng.choice(INSTRUCTIONS[task]).replace("{x}", text)


def user(text: str) -> Message:
    """A user message."""
    return {"role": "user", "content": text}
