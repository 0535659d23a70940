"""English to bash: the pairs of nl2bash, reworded, and `find` requests composed from parts.

nl2bash has some twelve thousand pairs, which a model of this size memorises within minutes.
Rewording makes the same pair new; composed requests show what each condition means by itself.
"""

from __future__ import annotations

import re
from random import Random

from deployments.reference_fleet.corpora import sources
from deployments.reference_fleet.corpora.pairs import Draw, Pair

COMPOSED_RATIO, REWORDED_RATIO = 0.15, 0.6  # of the training pairs


_SHARED = re.compile(r"(?<![\w./-])(?:[\w.*?~/-]*[./*~][\w.*?~/-]*\w[\w.*?~/-]*|\d+)(?![\w/])")


def _shape(word: str) -> str:
    if word.isdigit():
        return f"digits{min(len(word), 4)}"
    return "path" if "/" in word else "glob" if "*" in word else "file"


def shared_words(english: str, bash: str) -> list[str]:
    """Names and numbers that both texts have, the longest first."""
    both = set(_SHARED.findall(english)) & set(_SHARED.findall(bash))
    # The second key makes the order, and with it a seed's stream, the same in every process.
    return sorted(both, key=lambda word: (-len(word), word))


def shell_pair(english: str, bash: str) -> Pair:
    """English to bash; the difficulty follows the length of the command."""
    level = "easy" if len(bash) < 30 else "medium" if len(bash) < 60 else "hard"
    return Pair(" ".join(english.split()), " ".join(bash.split()), level)


def shell_draw() -> Draw:
    """Training pairs, in which names and numbers that English and command share are swapped."""
    rows = [(e, b) for e, b in sources.nl2bash("train") if len(b) <= 140 and len(e) <= 240]
    pools: dict[str, list[str]] = {}
    shared: list[list[str]] = []
    for english, bash in rows:
        both = shared_words(english, bash)
        shared.append(both)
        for word in both:
            pools.setdefault(_shape(word), []).append(word)

    def draw(rng: Random) -> Pair:
        if rng.random() < COMPOSED_RATIO:
            return shell_pair(*composed(rng))
        index = rng.randrange(len(rows))
        english, bash = rows[index]
        swaps = {w: rng.choice(pools[_shape(w)]) for w in shared[index] if rng.random() < 0.5}
        if swaps:
            replace = lambda m: swaps.get(m[0], m[0])  # noqa: E731
            english, bash = _SHARED.sub(replace, english), _SHARED.sub(replace, bash)
        if rng.random() < REWORDED_RATIO:
            english = reworded(english, rng)
        return shell_pair(english, bash)

    return draw


# Phrases of a group are exchangeable: the command stays the same.
_SYNONYMS = (
    ("current directory", "current folder", "working directory", "present directory"),
    ("directory", "folder"),
    ("directories", "folders"),
    ("subdirectories", "sub-directories", "sub directories"),
    ("search for", "find", "locate", "look for"),
    ("display", "print", "show"),
    ("delete", "remove"),
    ("recursively", "and below", "and all subdirectories"),
    ("whose names end with", "with the extension", "ending in", "that end with"),
    ("containing", "that contain", "which contain"),
    ("named", "with the name", "called"),
    ("larger than", "bigger than", "greater than"),
    ("in the last", "within the last", "in the past"),
)
_OTHERS = {phrase: group for group in _SYNONYMS for phrase in group}
_ANY = re.compile(rf"\b(?:{'|'.join(sorted(map(re.escape, _OTHERS), key=len, reverse=True))})\b")
_SMALL_WORDS = {
    "the",
    "a",
    "an",
    "all",
    "of",
    "in",
    "and",
    "that",
    "which",
    "are",
    "is",
    "with",
    "to",
}

_EXTENSIONS = ("txt", "py", "log", "c", "html", "jpg", "php", "java", "sh", "xml", "conf", "mp3")
_PLACES = ("/home", "/tmp", "/etc", "/var/log", "/usr", "src", "/", "~", "dir", "/path/to/dir")


def reworded(english: str, rng: Random) -> str:
    """The request with some phrases replaced by synonyms and some small words dropped."""
    text = _ANY.sub(lambda m: rng.choice(_OTHERS[m[0]]) if rng.random() < 0.5 else m[0], english)
    kept = [w for w in text.split(" ") if w.lower() not in _SMALL_WORDS or rng.random() > 0.15]
    return " ".join(kept) if len(kept) > 2 else text


def composed(rng: Random) -> tuple[str, str]:
    """A `find` request composed of its parts: (English, command)."""
    what, kind = rng.choice(
        (
            ("files", "-type f"),
            ("regular files", "-type f"),
            ("directories", "-type d"),
            ("symbolic links", "-type l"),
            ("files and directories", ""),
            ("files", ""),
        )
    )
    conditions = rng.sample(_CONDITIONS, rng.choice((0, 1, 1, 1, 2)))
    phrases, tests = [], [kind] if kind else []
    for condition in conditions:
        phrase, test = condition(rng)
        phrases.append(phrase)
        tests.append(test)
    place, path = _place(rng)
    ask, action, after = rng.choice(_ACTIONS)
    english = ask.replace("{x}", " ".join([what, *phrases])) + f" {place}"
    command = " ".join(part for part in ("find", path, *tests, action) if part) + after
    return english, command


def _place(rng: Random) -> tuple[str, str]:
    if rng.random() < 0.6:
        words = ("in the current directory", "under current directory", "in the current folder")
        return rng.choice(words), "."
    path = rng.choice(_PLACES)
    return rng.choice(("in {p}", "under {p}", "in the {p} directory")).replace("{p}", path), path


def _name(rng: Random) -> tuple[str, str]:
    end = rng.choice(_EXTENSIONS)
    word = rng.choice(
        ("with the extension .{e}", "ending in .{e}", "whose names end with .{e}", "named *.{e}")
    )
    option = "-iname" if rng.random() < 0.12 else "-name"
    text = word.replace("{e}", end)
    return text + (" ignoring case" if option == "-iname" else ""), f'{option} "*.{end}"'


def _size(rng: Random) -> tuple[str, str]:
    size, (unit, letter) = rng.randint(1, 900), rng.choice((("MB", "M"), ("KB", "k"), ("GB", "G")))
    if rng.random() < 0.7:
        return f"larger than {size}{unit}", f"-size +{size}{letter}"
    return f"smaller than {size} {unit}", f"-size -{size}{letter}"


def _age(rng: Random) -> tuple[str, str]:
    days, option = rng.randint(2, 90), rng.choice(("mtime", "atime", "ctime"))
    verb = {"mtime": "modified", "atime": "accessed", "ctime": "changed"}[option]
    if rng.random() < 0.5:
        return f"{verb} in the last {days} days", f"-{option} -{days}"
    return f"{verb} more than {days} days ago", f"-{option} +{days}"


def _minutes(rng: Random) -> tuple[str, str]:
    minutes = rng.randint(2, 600)
    return f"modified in the last {minutes} minutes", f"-mmin -{minutes}"


def _owner(rng: Random) -> tuple[str, str]:
    name = rng.choice(("root", "john", "apache", "www-data", "tom", "admin"))
    return rng.choice(("owned by user {n}", "belonging to user {n}")).replace(
        "{n}", name
    ), f"-user {name}"


def _mode(rng: Random) -> tuple[str, str]:
    mode = rng.choice(("777", "644", "755", "600", "0777", "664"))
    return f"with permissions {mode}", f"-perm {mode}"


def _empty(_: Random) -> tuple[str, str]:
    return "that are empty", "-empty"


_CONDITIONS = (_name, _name, _name, _size, _age, _age, _minutes, _owner, _mode, _empty)
_ACTIONS = (
    ("Find all {x}", "", ""),
    ("Search for {x}", "", ""),
    ("Print {x}", "-print", ""),
    ("List {x} in long format", "-ls", ""),
    ("Find all {x} and list them with details", r"-exec ls -l {} \;", ""),
    ("Delete all {x}", "-delete", ""),
    ("Find and delete {x}", r"-exec rm {} \;", ""),
    ("Remove {x}", r"-exec rm -f {} \;", ""),
    ("Count {x}", "", " | wc -l"),
    ("Count the lines of all {x}", "-print0", " | xargs -0 wc -l"),
    ('Search for "word" in {x}', r'-exec grep "word" {} \;', ""),
    ('Find {x} containing "text" and print their names', r'-exec grep -l "text" {} \;', ""),
    ("Archive {x}", "-print0", " | xargs -0 tar -czf archive.tar.gz"),
    ("Change permissions to 644 of {x}", r"-exec chmod 644 {} \;", ""),
    ("Sort {x} by name", "", " | sort"),
)
