"""Whose Google credentials this process has."""

from typing import Any

import google.auth
from google.auth.transport.requests import Request

_SCOPE = "https://www.googleapis.com/auth/cloud-platform"


def account() -> str | None:
    """The service account's e-mail; None: a person's credentials, which do not say whose. Raises `GoogleAuthError`."""
    credentials: Any
    credentials, _ = google.auth.default(scopes=[_SCOPE])
    email: str | None = getattr(credentials, "service_account_email", None)
    if email == "default":  # of the metadata server, which tells the name with the first token
        credentials.refresh(Request())
        email = credentials.service_account_email
    return email
