"""The messages of a body as one text, in the order in which the engine caches prefixes."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any
from zlib import crc32

from calm_serve.errors import RequestError
from calm_serve.requests.parsed import ROLE_END, START, needs, unmarked

# A message costs about 1 us, and the engine renders all of them by a template. Agents send some
# hundreds.
MAX_MESSAGES = 8192
_ROLES = frozenset(("system", "developer", "user", "assistant", "tool", "function"))
_ROLE = re.compile(r"\w{1,32}")
OTHER_ROLE = "other"
# Parts of vLLM's messages by type; parts of other types have no text that the decision reads.
_TEXTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}
_MEDIA = {
    "image": "vision",
    "image_url": "vision",
    "input_image": "vision",
    "image_embeds": "vision",
    "image_pil": "vision",
    "video_url": "video",
    "video_embeds": "video",
    "input_audio": "audio",
    "audio_url": "audio",
    "audio_embeds": "audio",
}
# Claude Code puts a line into its system prompt that changes with every request; vLLM drops it.
BILLING_HEADER = "x-anthropic-billing-header"


SYSTEM_ROLES = frozenset(("system", "developer"))
_TOOL_ROLES = frozenset(("tool", "function"))

# A follow-up means something only after the message that it continues. It is short, and starts like
# one, or consists of little but a pronoun; or it names the answer. Of 10,347 single requests, 1.6 %
# look like one; of 60 written as follow-ups, 59 (decision 0043).
_OPENS = re.compile(
    r"\W*(?:(?:ok(?:ay)?|so|well|hmm|oh|yes|please)\W+)?"
    r"(?:and|but|also|or|then|now|again|instead|otherwise|only|just|(?:the )?same"
    r"|(?:the |an)others?|more|less|shorter|longer|why|(?:what|how) about"
    r"|what (?:if|else)|go on|no|not|sorry|actually"
    r"|are you sure|i meant|und|et|y|oder|aber|mais|pero|mas|и|а|но)\b",  # noqa: RUF001
    re.IGNORECASE,
)
_REFERS = re.compile(
    r"\b(?:its?|them|they|those|these|that|this|he|she|him|her|ones?)\b", re.IGNORECASE
)
_NAMES_ANSWER = re.compile(
    r"\byour (?:last |previous |earlier |first )?(?:answer|response|reply|solution|explanation)\b"
    r"|\b(?:re(?:write|phrase)|shorten|translate|summari[sz]e|explain) (?:it|that|this)\b",
    re.IGNORECASE,
)
_OPENING_WORDS, _REFERRING_WORDS = 12, 4  # most words of such a message
_FOLLOW_UP_CHARS = 200  # a longer message says what it is about
_FOLLOWED_MESSAGES = 8  # of the user, searched for what a follow-up continues
# What tells conversations apart: the number of messages, and this much of the last ones.
_KEY_MESSAGES, _KEY_CHARS = 4, 256  # characters at each end


class Transcript:
    """Collects messages. One for each body."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._media: set[str] = set()
        self._users: deque[str] = deque(maxlen=_FOLLOWED_MESSAGES)
        self._dialogue: list[tuple[str, str]] = []  # role and text, without system prompts
        self._answer_at = 0  # of the last answer in `_dialogue`, which may be several messages
        self._chars = self._history_chars = 0
        self._ends_in_tool_results = False
        self._system_chars = 0
        self._turns = 0

    def add(self, role: str, text: str, *, with_tool_results: bool = False) -> None:
        """Append a message; `with_tool_results` if it came in one message with those before it."""
        text = unmarked(text)
        self._parts.append(f"{START}{role}{ROLE_END}{text}")
        self._chars += len(text)
        if role == "user":
            self._users.append(text)
            self._turns += 1
        if role in SYSTEM_ROLES:
            self._system_chars += len(text)
            return  # it may change from turn to turn, as by the time of day
        if role == "assistant":
            if not self._dialogue or self._dialogue[-1][0] != role:
                self._answer_at = len(self._dialogue)
            self._history_chars = self._chars
        self._dialogue.append((role, text))
        self._ends_in_tool_results = role in _TOOL_ROLES or with_tool_results

    def extend(self, other: Transcript) -> None:
        """Append the messages of another conversation."""
        self._parts += other._parts
        self._media |= other._media
        self._users += other._users
        self._system_chars += other._system_chars
        self._turns += other._turns

    def note_media(self, kind: object) -> None:
        """Note a part of the type `kind`; those of text and unknown ones need no capability."""
        if isinstance(kind, str) and kind in _MEDIA:
            self._media.add(_MEDIA[kind])

    def read_content(self, content: Any, where: str) -> str:
        """Return the text of a message's content: a text, a list of parts, or nothing.

        Raises RequestError naming `where` for content that is neither, and for parts that are
        neither texts nor objects.
        """
        if content is None:
            return ""
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            raise RequestError(f"'{where}' must be a string or a list of parts", param=where)
        texts = []
        for part in content:
            if isinstance(part, str):
                texts.append(part)
            elif not isinstance(part, Mapping):
                raise RequestError(f"'{where}' contains a part that is no object", param=where)
            elif text := self._read_part(part, where):
                texts.append(text)
        return "\n".join(texts)

    def _read_part(self, part: Mapping[str, Any], where: str) -> str:
        kind = part.get("type")
        if kind is None:  # vLLM goes by the field then
            kind = next((name for name in _MEDIA if name in part), None)
        field = _TEXTS.get(kind) if isinstance(kind, str) else None
        if field is None:
            self.note_media(kind)
            return ""
        text = part.get(field)
        if text is not None and not isinstance(text, str):
            raise RequestError(f"'{where}' contains a part whose {field!r} is no text", param=where)
        return text or ""

    def fields(self, name: str = "messages") -> dict[str, Any]:
        """The fields of a ParsedRequest that the messages determine.

        Raises RequestError when there is no message; `name` is the field that has none.
        """
        if not self._parts:
            raise RequestError(f"{name!r} must not be empty", param=name)
        return {
            "text": "".join(self._parts),
            "last_user": self._users[-1] if self._users else self._parts[-1],
            "followed_user": self._followed(),
            "parent_key": self._key(self._answer_at),
            "conversation_key": self._key(len(self._dialogue)),
            "history_chars": self._history_chars,
            "ends_in_tool_results": self._ends_in_tool_results,
            "system_chars": self._system_chars,
            "turns": self._turns,
        }

    def _key(self, count: int) -> int:
        """A hash of the first `count` messages, 0 for none."""
        if not count:
            return 0
        key = count
        for role, text in self._dialogue[max(count - _KEY_MESSAGES, 0) : count]:
            about = f"{role} {len(text)} {text[:_KEY_CHARS]} {text[-_KEY_CHARS:]}"
            key = crc32(about.encode("utf-8", "surrogatepass"), key)
        return key

    def _followed(self) -> str:
        """The nearest message of the user that stands for itself, if the last one does not."""
        if len(self._users) < 2 or not follows_up(self._users[-1]):
            return ""
        before = [*self._users][-2::-1]
        return next((text for text in before if not follows_up(text)), before[-1])

    def needs(self, **wanted: bool) -> tuple[str, ...]:
        """Capabilities: chat, those of the parts, and what is `wanted` beside them."""
        return needs(chat=True, **dict.fromkeys(self._media, True), **wanted)


def follows_up(text: str) -> bool:
    """Whether a message of the user says too little to be understood without those before it.

    >>> follows_up("and in Oslo?"), follows_up("How is the weather in Oslo?")
    (True, False)
    """
    if len(text) > _FOLLOW_UP_CHARS:
        return False
    words = len(text.split())
    if words <= _OPENING_WORDS and _OPENS.match(text):
        return True
    if words <= _REFERRING_WORDS and _REFERS.search(text):
        return True
    return _NAMES_ANSWER.search(text) is not None


def messages_of(text: str) -> Iterator[tuple[str, str]]:
    """Yield role and text of each message; a prompt without messages is one of the user.

    >>> list(messages_of("hello"))
    [('user', 'hello')]
    """
    before, *parts = text.split(START)
    if before:
        yield "user", before
    for part in parts:
        role, _, content = part.partition(ROLE_END)
        yield role, content


def read_messages(body: Mapping[str, Any], transcript: Transcript, name: str = "messages") -> None:
    """Add the messages of a chat body. Raises RequestError naming the message."""
    messages = check_messages(body.get(name), name)
    for position, message in enumerate(messages):
        read_message(message, transcript, f"{name}[{position}]")


def check_messages(messages: Any, name: str) -> list[Any]:
    """Return the list. Raises RequestError when it is none, empty or longer than MAX_MESSAGES."""
    if not isinstance(messages, list):
        raise RequestError(f"{name!r} must be a list", param=name)
    if not messages:
        raise RequestError(f"{name!r} must not be empty", param=name)
    if len(messages) > MAX_MESSAGES:
        raise RequestError(
            f"{name!r} has {len(messages)} entries; at most {MAX_MESSAGES} are accepted", param=name
        )
    return messages


def read_message(message: Any, transcript: Transcript, where: str) -> None:
    """Add one message of OpenAI's chat. Raises RequestError naming `where`."""
    if not isinstance(message, Mapping):
        raise RequestError(f"'{where}' must be an object", param=where)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise RequestError(f"'{where}.role' must be a string", param=where)
    content = transcript.read_content(message.get("content"), f"{where}.content")
    if role == "system" and content.startswith(BILLING_HEADER):
        content = content.partition("\n")[2]
    if role == "assistant" and (calls := message.get("tool_calls")):
        content += tool_call_text(calls)
    transcript.add(role_word(role), content)


def role_word(role: str) -> str:
    """Return `role` as it may stand in the text; chat templates know roles beyond OpenAI's."""
    return role if role in _ROLES or _ROLE.fullmatch(role) else OTHER_ROLE


def tool_call_text(calls: Any) -> str:
    """Return names and arguments of an earlier answer's tool calls; templates write them out."""
    if not isinstance(calls, list):
        return ""
    found = []
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping):
            found.append(f"\n{function.get('name', '')} {function.get('arguments', '')}")
    return "".join(found)
