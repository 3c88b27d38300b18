"""Who calls: three ways to know, of which the settings choose one.

Whatever a header of the queue's says (`X-CloudTasks-…`), it is never an identity, and neither is anything in an address.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Protocol

import structlog
from google.auth import jwt
from google.auth.exceptions import GoogleAuthError, InvalidValue

from app.errors import SettingsError, Unauthenticated
from app.settings import Settings
from app.web.certificates import Certificates

ANONYMOUS = "anonymous"
REMOVED = "SIGNATURE_REMOVED_BY_GOOGLE"
"""In place of the signature of a token that Cloud Run has checked. Source: Cloud Run's documentation."""

ISSUERS = ("https://accounts.google.com", "accounts.google.com")
"""Both forms are in use. Source: Google's documentation of ID tokens."""

SKEW = 10
"""Seconds that the clocks may differ by. Ours: google-auth's own refresh margin is longer, and clocks on Google Cloud are
within milliseconds."""

MAX_TOKEN = 8192
"""Characters. Ours: Google's have about 1,000."""

MAX_EMAIL = 320
"""Characters. Source: RFC 3696."""

HOW = "Send `Authorization: Bearer TOKEN` with an ID token, as of `gcloud auth print-identity-token`."

Headers = Sequence[tuple[bytes, bytes]]
Claims = Mapping[str, Any]
log = structlog.get_logger(__name__)

_MALFORMED = (GoogleAuthError, ValueError, TypeError, AttributeError, RecursionError)
"""What google-auth raises for something that is no token; its messages repeat parts of it."""


class Identity(Protocol):
    async def caller(self, headers: Headers) -> str:
        """An e-mail in small letters. Raises `Unauthenticated`."""


class Anonymous:
    async def caller(self, headers: Headers) -> str:
        return ANONYMOUS


class CheckedByPlatform:
    """Cloud Run's IAM lets nobody through without a valid token, and takes its signature away."""

    async def caller(self, headers: Headers) -> str:
        sent = {name for name, _ in headers}
        own = b"x-serverless-authorization"  # if it is there, the platform has looked at nothing else
        if not sent & {own, b"authorization"}:
            log.error("a request arrived without a token: is IAM off for this service?")
        token = _bearer(headers, own if own in sent else b"authorization")
        if token.rpartition(".")[2] != REMOVED:
            log.error("a token arrived that Cloud Run has not checked: is IAM off for this service?")
            raise Unauthenticated(
                "The token was not checked by Cloud Run: IAM seems to be off for this service. Its operator must require"
                " authentication (--no-allow-unauthenticated), or set PROCTOR_AUTH=oidc."
            )
        try:
            claims = jwt.decode(token, verify=False)  # type: ignore[no-untyped-call]
            expired = time.time() > float(claims["exp"]) + SKEW
        except (*_MALFORMED, KeyError) as error:
            raise Unauthenticated(f"The token is not an ID token. {HOW}") from error
        if expired:
            raise Unauthenticated(f"The token has expired. {HOW}")
        return _email({"email_verified": True, **claims})  # the platform has decided where the token does not say


@dataclass(frozen=True)
class Verified:
    """The token's signature, issuer, audience and times are checked here."""

    certificates: Certificates
    audiences: tuple[str, ...]

    async def caller(self, headers: Headers) -> str:
        token = _bearer(headers, b"authorization")
        key_id = _key_id(token)
        certificate = await self.certificates.of(key_id)
        if certificate is None:
            raise Unauthenticated(f"The token is signed with a key that is not one of Google's. {HOW}")
        return _email(self._claims(token, {key_id: certificate}))

    def _claims(self, token: str, certificates: Mapping[str, str]) -> Claims:
        try:
            claims: Claims = jwt.decode(  # type: ignore[no-untyped-call]
                token, certs=certificates, audience=list(self.audiences), clock_skew_in_seconds=SKEW
            )
            early = time.time() < float(claims.get("nbf", 0)) - SKEW
        except InvalidValue as error:  # of a token that is Google's: its time, its audience
            raise Unauthenticated(f"{error}. {HOW}") from error
        except _MALFORMED as error:
            raise Unauthenticated(f"The token's signature does not hold, or it is not whole. {HOW}") from error
        if early:
            raise Unauthenticated("The token is not valid yet.")
        if claims.get("iss") not in ISSUERS:
            raise Unauthenticated(f"The token was not issued by Google. {HOW}")
        return claims


def identity(settings: Settings) -> Identity:
    """As `settings.auth` says. Raises `SettingsError` where that would let strangers in, or nobody."""
    on_cloud_run = bool(settings.cloud_run_service)
    if settings.auth == "oidc":
        return Verified(Certificates(settings.oidc_certs_url), settings.accepted_audiences)
    if settings.auth == "iam":
        if not on_cloud_run:
            raise SettingsError(
                "PROCTOR_AUTH=iam trusts tokens that Cloud Run has checked, and this is not Cloud Run (K_SERVICE is not"
                " set): set PROCTOR_AUTH=oidc."
            )
        return CheckedByPlatform()
    if on_cloud_run:
        raise SettingsError(
            "PROCTOR_AUTH=none would let everybody in on Cloud Run: set PROCTOR_AUTH=iam (or oidc), and PROCTOR_CALLERS"
            " to those who may use the API."
        )
    if not is_loopback(settings.host):
        raise SettingsError(
            f"PROCTOR_AUTH=none would let everybody in who reaches PROCTOR_HOST {settings.host}: set PROCTOR_AUTH=oidc"
            " (iam on Cloud Run) and PROCTOR_CALLERS, or PROCTOR_HOST=127.0.0.1."
        )
    return Anonymous()


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _bearer(headers: Headers, name: bytes) -> str:
    values = [value for key, value in headers if key == name]
    if not values:
        raise Unauthenticated(f"There is no token. {HOW}")
    kind, _, token = values[0].decode("latin-1").partition(" ")
    token = token.strip()
    if len(values) > 1 or kind.lower() != "bearer" or not token or not token.isascii() or len(token) > MAX_TOKEN:
        raise Unauthenticated(f"What {name.decode()} says is not one bearer token. {HOW}")
    return token


def _key_id(token: str) -> str:
    """Of the key that the token says it is signed with."""
    if token.rpartition(".")[2] == REMOVED:
        raise Unauthenticated(
            "Cloud Run has taken the token's signature away, so PROCTOR_AUTH=oidc cannot verify it: its operator must"
            " set PROCTOR_AUTH=iam, or callers send the platform's token as X-Serverless-Authorization."
        )
    try:
        header = jwt.decode_header(token)  # type: ignore[no-untyped-call]
        algorithm, key_id = header.get("alg"), header.get("kid")
    except _MALFORMED as error:
        raise Unauthenticated(f"The token is not an ID token. {HOW}") from error
    if algorithm != "RS256" or not isinstance(key_id, str):
        raise Unauthenticated(f"The token is not signed as Google's ID tokens are (RS256, with a key's id). {HOW}")
    return key_id


def _email(claims: Claims) -> str:
    email = claims.get("email")
    if not isinstance(email, str) or not _is_email(email):
        raise Unauthenticated(
            "The token has no e-mail. For a service account ask for one: `gcloud auth print-identity-token"
            " --include-email`, or `format=full` of the metadata server."
        )
    if claims.get("email_verified") is not True:
        raise Unauthenticated(f"The token's e-mail {email} is not verified.")
    return email.lower()


def _is_email(email: str) -> bool:
    """ASCII only: some other letters are small letters of these."""
    return email.isascii() and email.isprintable() and email.count("@") == 1 and len(email) <= MAX_EMAIL
