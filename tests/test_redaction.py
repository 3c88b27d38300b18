"""Secrets are taken out of texts in whatever form errors repeat them."""

import base64
import html
import json
from urllib.parse import quote, quote_plus

import pytest

from app.redaction import REDACTED, Secrets

KEY = 'sk-proj-4f9Qd81/x+Zz=="\\é~end'
PLAIN = "sk-proj-0123456789abcdef"
PEM = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0B\nAQEFAASCBKcwggSjAgEAAoIB\n-----END PRIVATE KEY-----\n"


@pytest.mark.parametrize(
    "form",
    [
        KEY,
        json.dumps(KEY),
        json.dumps(KEY, ensure_ascii=False),
        json.dumps(json.dumps({"key": KEY})),
        repr(KEY),
        ascii(KEY),
        quote(KEY),
        quote(KEY, safe=""),
        quote(KEY, safe="").lower().replace("sk-proj-4f9qd81", "sk-proj-4f9Qd81").replace("zz", "Zz"),
        quote_plus(KEY),
        html.escape(KEY),
        f"Traceback: File 'x.py', line 3\n    raise Refused({KEY!r})\nRefused: {KEY}",
    ],
)
def test_a_secret_is_taken_out_in_every_form(form: str) -> None:
    secrets = Secrets({KEY, PLAIN})
    told = secrets.redact(f"the key {form} is wrong")
    assert secrets.occur_in(form)
    assert told.startswith("the key ")
    assert told.endswith(" is wrong")
    assert REDACTED in told
    assert "4f9Qd81" not in told


@pytest.mark.parametrize("before", ["", "u", "us", "user:"])
def test_a_secret_is_taken_out_of_base64_wherever_it_begins(before: str) -> None:
    encoded = base64.b64encode(f"{before}{PLAIN}:more".encode()).decode()
    told = Secrets({PLAIN}).redact(f"Basic {encoded} was sent")
    assert REDACTED in told
    assert encoded[6:26] not in told


@pytest.mark.parametrize(
    "masked",
    [
        "sk-p***",
        "sk-proj-****************cdef",
        "sk-proj-***",
        "***cdef",
        "sk-proj-0123…",
        "sk-proj-01...cdef",
        "sk-••••ef",
    ],
)
def test_what_is_shown_of_a_masked_key_is_taken_out_too(masked: str) -> None:
    told = Secrets({PLAIN}).redact(f"Incorrect API key provided: {masked}. You can find your key elsewhere.")
    assert told == f"Incorrect API key provided: {REDACTED}. You can find your key elsewhere."


@pytest.mark.parametrize(
    "text", ["***bold***", "and so on...", "sk-… is how keys begin", "a ** b", "", "prefix sk-proj"]
)
def test_what_only_looks_masked_stays(text: str) -> None:
    assert Secrets({PLAIN}).redact(text) == text


def test_a_secret_that_a_cut_has_left_a_part_of_is_taken_out() -> None:
    secrets = Secrets({PLAIN})
    assert secrets.redact(f"it said {PLAIN[:12]}") == f"it said {REDACTED}"
    assert secrets.redact(f"it said {PLAIN[:12]}…") == f"it said {REDACTED}"
    assert secrets.redact(f"{PLAIN[9:]} it said") == f"{REDACTED} it said"


def test_the_lines_of_a_private_key_are_taken_out_one_by_one() -> None:
    secrets = Secrets({PEM})
    for told in (
        secrets.redact(PEM),
        secrets.redact("  " + PEM.replace("\n", "\n  ")),
        secrets.redact(" ".join(PEM.split())),
    ):
        assert "MIIE" not in told
        assert "AQEF" not in told


def test_what_is_too_short_to_be_told_from_words_stays() -> None:
    assert Secrets({"abc", ""}).redact("abc") == "abc"
    assert not Secrets().occur_in("abc")
