"""Everything that can go wrong for a caller, and its status.

    ProctorError
    ├── InvalidRequest        422   the request cannot be carried out as it is
    │   ├── MalformedBody     400   not JSON
    │   └── BodyTooLarge      413
    ├── Unauthenticated       401   nobody we know: no token, or none that is valid
    ├── Forbidden             403   somebody we know, who may not do this; or a browser on another site's behalf
    ├── NotFound              404   no such evaluation, execution or sample
    ├── Conflict              409   the state forbids it, or the idempotency key means another spec
    │   └── Again             409   to the queue: deliver it again
    ├── DatabaseUnavailable   503   no answer for as long as the caller's patience
    │   └── DatabaseRefused   503   an answer, but no: the login, a privilege, the schema; the service does not start
    ├── DataRefused           422   the database refuses what it was given, however often it is asked
    ├── IdentityUnavailable   503   tokens cannot be verified now: Google's certificates are out of reach
    ├── SessionHeld           500   a mistake of ours: something slow was to begin while a database session was open
    └── SettingsError               the service does not start

One handler (`app.main`) renders them as ``application/problem+json`` (RFC 9457). A message says what happened, to what,
and what to do.
"""


class ProctorError(Exception):
    """`title` names the kind, `str(error)` this case of it."""

    status = 500
    title = "Internal error"


class InvalidRequest(ProctorError):
    status = 422
    title = "Invalid request"

    def __init__(self, message: str, errors: list[dict[str, str]] | None = None) -> None:
        super().__init__(message)
        self.errors = errors or []


class MalformedBody(InvalidRequest):
    status = 400
    title = "Malformed body"


class BodyTooLarge(InvalidRequest):
    status = 413
    title = "Body too large"


class Unauthenticated(ProctorError):
    """Never repeats the token."""

    status = 401
    title = "Not authenticated"


class Forbidden(ProctorError):
    status = 403
    title = "Forbidden"


class NotFound(ProctorError):
    status = 404
    title = "Not found"


class Conflict(ProctorError):
    status = 409
    title = "Conflict"


class Again(Conflict):
    title = "Not terminal yet"


class DatabaseUnavailable(ProctorError):
    status = 503
    title = "Database unavailable"


class DatabaseRefused(DatabaseUnavailable):
    """No retry helps; a person must. The message says what to do."""

    title = "Database refused"


class DataRefused(ProctorError):
    """`by_content`: for what a value holds (text that cannot be stored, a number out of range), and not by a rule of the
    tables."""

    status = 422
    title = "Data refused"

    def __init__(self, message: str, *, by_content: bool) -> None:
        super().__init__(message)
        self.by_content = by_content


class IdentityUnavailable(ProctorError):
    status = 503
    title = "Identity unavailable"


class SessionHeld(ProctorError):
    """The message names who holds the session, and what was to begin."""

    title = "Session held"


class SettingsError(ProctorError):
    """The environment is not one the service can start in; the message names each variable."""

    title = "Wrong settings"
