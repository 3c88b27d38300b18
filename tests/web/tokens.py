"""Tokens as the emulator signs them, and as attackers would; and the service that is to tell them apart."""

import base64
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from fastapi import FastAPI

from app.local.oidc import CERTS_PATH, Issuer
from app.main import create_app
from app.settings import load

SERVICE = "https://proctor.example"
QUEUE = "queue@proctor.iam.gserviceaccount.com"
ALICE = "alice@example.com"
REMOVED = "SIGNATURE_REMOVED_BY_GOOGLE"

API, PUSH = "/openapi.json", "/tasks/nothing"
"""Answers 200, and 404, to whoever is admitted; neither needs more of the service than itself."""


def app_with(**given: Any) -> FastAPI:
    """The application as it is composed; it is not started, for whoever is refused gets no further than its door."""
    known: dict[str, Any] = {
        "callers": (ALICE, "@staff.example"),
        "queue_service_account": QUEUE,
        "service_url": SERVICE,
        "database_url": "postgresql://nobody@127.0.0.1:9/none",
    }
    return create_app(load(**{**known, **given}))


@asynccontextmanager
async def calling(app: FastAPI, url: str = SERVICE) -> AsyncIterator[httpx.AsyncClient]:
    """A client of it. There is nothing behind its handlers: one that is reached answers 500."""

    async def door(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "state": {"services": None}}, receive, send)

    transport = httpx.ASGITransport(app=door, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url=url) as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def claims(**others: Any) -> dict[str, Any]:
    """A good token's, but for `others`; what is None there is left out."""
    now = int(time.time())
    good = {
        "iss": "https://accounts.google.com",
        "aud": SERVICE,
        "sub": "1",
        "email": ALICE,
        "email_verified": True,
        "iat": now,
        "exp": now + 3600,
    }
    return {name: value for name, value in {**good, **others}.items() if value is not None}


def put_together(header: Mapping[str, Any], payload: Mapping[str, Any], signature: str) -> str:
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in (header, payload)]
    return ".".join([*parts, signature])


def checked(**others: Any) -> str:
    """As it arrives behind Cloud Run's IAM."""
    return put_together({"alg": "RS256", "kid": "1"}, claims(**others), REMOVED)


def signed_by_another(issuer: Issuer) -> str:
    """With another RSA key that claims to be the issuer's."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return jwt.encode(claims(), key, algorithm="RS256", headers={"kid": issuer.key_id})


def signed_with_the_certificate(issuer: Issuer) -> str:
    """HS256, its secret what everybody can read: works where the algorithm is the token's to choose."""
    import hashlib
    import hmac

    pem = json.loads(issuer.documents()[CERTS_PATH])[issuer.key_id]
    unsigned = put_together({"alg": "HS256", "kid": issuer.key_id}, claims(), "").rstrip(".")
    mac = hmac.new(pem.encode(), unsigned.encode(), hashlib.sha256).digest()
    return f"{unsigned}.{base64.urlsafe_b64encode(mac).decode().rstrip('=')}"
