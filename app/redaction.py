"""The last defence of the log, the ledger and the API: what must never be in them is replaced wherever it turns up.

Nothing tells a key on purpose. But errors of libraries quote what they were given, so every text is searched for the
secrets that this process was started with; and every line of the log also for what looks like one.
"""

import base64
import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, quote_plus

REDACTED = "[redacted]"

SHORTEST = 6
"""Characters of a secret that is searched for. Ours: shorter ones are part of ordinary words."""

SHORTEST_PART = 8
"""Characters of a part of a secret that a text may begin or end with, having been cut there. Ours: not by chance."""

SHORTEST_LINE = 20
"""Characters of a line of a secret of several lines, as a private key is. Ours: its last line may be a word."""

_MASK = re.compile(r"\*{3,}|•{3,}|…|\.{3,}")
"""What stands for the rest of a key where a part of it is shown: `sk-abc***xyz`, `sk-abc…`."""

_PATTERNS = (
    (re.compile(r"\b(Bearer|Basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE), rf"\1 {REDACTED}"),
    (re.compile(r"([a-z][a-z0-9+.-]*://[^\s:/@]*):[^\s/]+@", re.IGNORECASE), rf"\1:{REDACTED}@"),
    (re.compile(r"\b(password|passwd|pwd)(['\"]?\s*[=:]\s*)[^\s,;)}&]+", re.IGNORECASE), rf"\1\2{REDACTED}"),
    # pydantic, asyncpg and Postgres quote what they were given in what they raise
    (re.compile(r"input_value=.*?(?=, input_type=)", re.DOTALL), f"input_value={REDACTED}"),
    (re.compile(r"(invalid input for query argument \$\d+:) .*"), rf"\1 {REDACTED}"),
    (re.compile(r"(invalid input syntax for type [\w ]+:) .*"), rf"\1 {REDACTED}"),
    (re.compile(r"DETAIL:.*?(?=\n(?:HINT:|\[SQL|The above|During handling)|\Z)", re.DOTALL), f"DETAIL: {REDACTED}"),
)


class Secrets:
    """Values to be taken out of what is told, in every form in which errors repeat them: as they are; with JSON's,
    Python's, URLs' and HTML's escapes; in base64, also as a part of more; masked; cut off at an end of a text."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._values = sorted({value for value in values if len(value) >= SHORTEST}, key=len, reverse=True)
        forms = sorted({form for value in self._values for form in _forms(value)}, key=len, reverse=True)
        self._forms = re.compile("|".join(map(re.escape, forms))) if forms else None

    def occur_in(self, text: str) -> bool:
        return self._forms is not None and self._forms.search(text) is not None

    def redact(self, text: str) -> str:
        if self._forms is None:
            return text
        text = self._forms.sub(REDACTED, text)
        text = self._without_masked(text)
        for value in self._values:
            if begins := _overlap(value, text, SHORTEST_PART):
                text = REDACTED + text[begins:]
            if ends := _overlap(text, value, SHORTEST_PART):
                text = text[:-ends] + REDACTED
        return text

    def _without_masked(self, text: str) -> str:
        parts, done = [], 0
        for mask in _MASK.finditer(text):
            before, after = text[done : mask.start()], text[mask.end() : mask.end() + len(self._values[0])]
            least = 3 if mask[0][0] in "*•" else SHORTEST  # dots are also what a sentence trails off in
            for value in self._values:
                shown_first = _overlap(before, value)
                shown_last = _overlap(value, re.split(r"[^\w+/=~-]", after, maxsplit=1)[0], whole=True)
                if shown_first + shown_last >= least:
                    parts += [before[: len(before) - shown_first], REDACTED]
                    done = mask.end() + shown_last
                    break
        return "".join([*parts, text[done:]])


def _overlap(left: str, right: str, least: int = 1, *, whole: bool = False) -> int:
    """How many characters, `least` or more, the end of `left` and the beginning of `right` have in common; 0: none.
    `whole`: all of `right`."""
    most = min(len(left), len(right))
    lengths = (len(right),) if whole else range(most, least - 1, -1)
    return next((n for n in lengths if least <= n <= most and left.endswith(right[:n])), 0)


def _forms(value: str) -> Iterator[str]:
    yield value
    yield " ".join(value.split())
    for line in value.splitlines():
        if len(line) >= SHORTEST_LINE and not line.startswith("-----"):
            yield line
    for escaped in {json.dumps(value), json.dumps(value, ensure_ascii=False)}:
        yield escaped[1:-1]
        yield json.dumps(escaped[1:-1])[1:-1]  # an answer in JSON that an error quotes in JSON
    yield repr(value)[1:-1]
    yield ascii(value)[1:-1]
    yield html.escape(value)
    for quoted in (quote(value), quote(value, safe=""), quote_plus(value)):
        yield quoted
        yield re.sub(r"%[0-9A-F]{2}", lambda found: found[0].lower(), quoted)
    raw = value.encode(errors="surrogateescape")
    for shift in range(3):  # base64 takes three bytes at a time: what comes before moves the others
        encoded = base64.b64encode(b"\0" * shift + raw).decode()
        inner = encoded[-(-shift * 8 // 6) : (shift + len(raw)) * 8 // 6]
        yield inner
        yield inner.replace("+", "-").replace("/", "_")


class Redaction:
    """A processor of structlog, to be the last one before the rendering. `secrets`: values."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._secrets = Secrets(secrets)

    def __call__(self, _: Any, __: str, event: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self._clean(value) for key, value in event.items()}

    def _clean(self, value: Any) -> Any:
        if value is None or isinstance(value, bool | int | float):
            return value
        if isinstance(value, Mapping):
            return {self.text(str(k)): self._clean(v) for k, v in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            return [self._clean(item) for item in value]
        return self.text(str(value))

    def text(self, text: str) -> str:
        text = self._secrets.redact(text)
        for pattern, instead in _PATTERNS:
            text = pattern.sub(instead, text)
        return text
