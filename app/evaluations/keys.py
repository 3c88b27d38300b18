"""Keys in a spec: it is stored for good and shown to everybody who may use the API, so none belongs there."""

import re
from collections.abc import Iterator
from typing import Any

from app.redaction import Secrets
from app.spec import Spec

_WAY = (
    "a spec is stored, and shown to all who may use the API, so it must not hold a key. Give the service the provider's own"
    " variable instead (OPENAI_API_KEY, ANTHROPIC_API_KEY, NAME_API_KEY for openai-api/NAME): in the environment of"
    " `proctor local` or `proctor serve`; on Cloud Run in service.yaml, by reference to a secret of Secret Manager."
)

_SECRET_WORDS = frozenset(
    [
        "key",
        "apikey",
        "accesskey",
        "token",
        "accesstoken",
        "apitoken",
        "authtoken",
        "bearertoken",
        "secret",
        "clientsecret",
        "password",
        "passwd",
        "passphrase",
        "authorization",
        "auth",
        "credential",
        "credentials",
        "bearer",
        "cookie",
    ]
)
"""Last words of names that hold a secret: `api_key`, `x-api-key`, `azureADToken`, `Authorization`."""

_OTHERWISE = frozenset(
    [
        "cache",
        "sort",
        "primary",
        "foreign",
        "partition",
        "prompt",
        "public",
        "eos",
        "bos",
        "pad",
        "unk",
        "sep",
        "cls",
        "mask",
        "stop",
        "start",
        "end",
        "special",
        "image",
    ]
)
"""Words before `key` and `token` that make something else of it: `prompt_cache_key`, `eos_token`."""

_NO_KEY = frozenset({"", "none", "null", "empty", "dummy", "unused", "no-key", "not-needed"})
"""What people write for a server that asks for none, where a client insists on one."""

_LOOKS_LIKE_A_KEY = re.compile(
    r"""^(Bearer|Basic|Token)\s+\S{6,}                       # as in a header
      | ://[^\s/@]*:[^\s/@]+@                               # a password in an address
      | [?&](api[-_]?key|key|token|access[-_]token|sig)=\S{6,}
      | \b(sk|pk|rk)-[\w-]{16,} | \bAIza[\w-]{30,} | \bAKIA[A-Z0-9]{16}\b
      | \b(hf|gsk|xai|ghp|gho|ghs|r8|tgp|nvapi|glpat)[_-][\w-]{16,} | \bgithub_pat_\w{20,}
      | \bya29\.[\w-]{10,} | \beyJ[\w-]{8,}\.[\w-]{8,}\.         # OAuth, JWT
      | -----BEGIN\ [A-Z ]*PRIVATE\ KEY-----""",
    re.IGNORECASE | re.VERBOSE,
)


def keys_in(spec: Spec, secrets: Secrets) -> list[dict[str, str]]:
    """Where it holds one, as the fields of a problem: `secrets` anywhere, what looks or is called like a key in
    `model_args`. Never says the value."""
    found = {field for field, _, text in _texts(spec.model_dump(mode="json"), ()) if secrets.occur_in(text)}
    for field, names, text in _texts(spec.model_args, ("model_args",)):
        named = any(map(_names_a_secret, names[1:])) and text.lower() not in _NO_KEY
        if named or _LOOKS_LIKE_A_KEY.search(text):
            found.add(field)
    return [{"field": secrets.redact(field), "message": _WAY} for field in sorted(found)]


def _texts(value: Any, names: tuple[str, ...]) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """All texts below, names of fields among them, each with its place."""
    if isinstance(value, dict):
        for name, one in value.items():
            yield ".".join(names), names, name
            yield from _texts(one, (*names, name))
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one, names)
    elif isinstance(value, str):
        yield ".".join(names), names, value


def _names_a_secret(name: str) -> bool:
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)]
    before = words[-2] if len(words) > 1 else ""
    return bool(words) and words[-1] in _SECRET_WORDS and before not in _OTHERWISE
