"""The last defence of the log: what must never be in it is replaced wherever it turns up.

Nothing logs a key or a prompt on purpose. But errors of libraries quote what they were given, so every string of every
line is searched for the secrets that this process was started with, and for what looks like one.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

REDACTED = "[redacted]"

SHORTEST = 6
"""Characters of a secret that is searched for. Ours: shorter ones are part of ordinary words."""

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


class Redaction:
    """A processor of structlog, to be the last one before the rendering. `secrets`: values, the longest replaced first."""

    def __init__(self, secrets: Iterable[str]) -> None:
        known = sorted({s for s in secrets if len(s) >= SHORTEST}, key=len, reverse=True)
        self._known = re.compile("|".join(re.escape(s) for s in known)) if known else None

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
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        for pattern, instead in _PATTERNS:
            text = pattern.sub(instead, text)
        return text
