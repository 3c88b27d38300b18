"""Which failures are the moment's, and which are for a person to mend."""

import ssl
from typing import Any

import asyncpg
import google.api_core.exceptions
import google.auth.exceptions
import pytest
from google.cloud.alloydbconnector.exceptions import IPTypeNotFoundError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.database.failures import describe, is_transient, refusal, state_of, this_server_is_gone
from app.errors import DatabaseRefused, DatabaseUnavailable, SessionHeld

api: Any = google.api_core.exceptions  # their constructors have no types
auth: Any = google.auth.exceptions


def of_state(state: str) -> Exception:
    """As the driver raises it; its class follows from the SQLSTATE."""
    error: Exception = asyncpg.PostgresError.new({"C": state, "S": "ERROR", "M": "It failed."})
    return error


def wrapped(cause: BaseException, *, invalidated: bool = False) -> DBAPIError:
    """As SQLAlchemy raises it."""
    return DBAPIError("SELECT 1", {}, cause, connection_invalidated=invalidated)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


SERVER_GONE = ["08000", "08003", "08006", "25006", "25P03", "57P01", "57P02", "57P03", "57P05"]
NOT_NOW = ["40001", "40P01", "55P03", "57014", "53000", "53100", "53200", "53300"]
REFUSED = {
    "28P01": "password is wrong",
    "28000": "may not log in",
    "3D000": "CREATE DATABASE",
    "42501": "GRANT",
    "42P01": "table is missing: run `proctor migrate`",
    "42703": "column is missing: run `proctor migrate`",
}
OURS = ["42601", "23505", "23514", "22P02", "22012", "40002", "57000", "25P02"]
"""Mistakes of ours: neither tried again, nor anything that the settings could mend."""


@pytest.mark.parametrize("wrap", [lambda error: error, wrapped], ids=["the driver's", "SQLAlchemy's"])
@pytest.mark.parametrize(
    ("states", "transient", "refused", "gone"),
    [
        (SERVER_GONE, True, False, True),
        (NOT_NOW, True, False, False),
        (list(REFUSED), False, True, False),
        (OURS, False, False, False),
    ],
    ids=["server gone", "not now", "refused", "ours"],
)
def test_each_sqlstate_is_the_moment_s_or_a_person_s_or_a_mistake_of_ours(
    states: list[str], transient: bool, refused: bool, gone: bool, wrap: Any
) -> None:
    for state in states:
        error = wrap(of_state(state))
        assert state_of(error) == state
        assert (is_transient(error), refusal(error) is not None) == (transient, refused), state
        assert this_server_is_gone(state) == gone, state


def test_a_refusal_says_what_to_do_and_what_was_said() -> None:
    for state, advice in REFUSED.items():
        reason = refusal(of_state(state))
        assert reason
        assert advice in reason
        assert "It failed." in reason


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        OSError(113, "No route to host"),
        ConnectionResetError(),
        ConnectionRefusedError(),
        BrokenPipeError(),
        ssl.SSLError("certificate expired"),
        PoolTimeout("QueuePool limit of size 5 overflow 10 reached"),
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        wrapped(RuntimeError("unheard of"), invalidated=True),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_network_or_the_driver_says_of_a_connection_is_the_moment_s(error: BaseException) -> None:
    assert is_transient(error)
    assert refusal(error) is None


@pytest.mark.parametrize(
    "error",
    [
        ValueError(),
        RuntimeError(),
        AssertionError(),
        SessionHeld(),
        DatabaseUnavailable(),
        DatabaseRefused(),
        wrapped(asyncpg.DataError("invalid input for query argument $1")),
        asyncpg.DataError("invalid input for query argument $1"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_mistake_is_not_tried_again(error: BaseException) -> None:
    assert not is_transient(error)
    assert refusal(error) is None


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (api.ServiceUnavailable("down"), True),
        (api.DeadlineExceeded("slow"), True),
        (api.GatewayTimeout("slow"), True),
        (api.InternalServerError("its fault"), True),
        (api.TooManyRequests("a quota"), True),
        (api.ResourceExhausted("a quota"), True),
        (api.Aborted("again"), True),
        (api.Unknown("who knows"), True),
        (api.RetryError("tried for long", api.ServiceUnavailable("down")), True),
        (api.BadRequest("malformed"), False),
        (api.InvalidArgument("malformed"), False),
        (api.Unauthorized("who?"), False),
        (api.Unauthenticated("who?"), False),
        (api.Forbidden("no role"), False),
        (api.PermissionDenied("no role"), False),
        (api.NotFound("no instance"), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_the_admin_api_s_no_is_final_and_its_trouble_is_not(error: BaseException, transient: bool) -> None:
    assert (is_transient(error), refusal(error) is None) == (transient, transient)


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (auth.RefreshError("a 503", retryable=True), True),
        (auth.TransportError("nobody listens"), True),
        (caused(auth.RefreshError("nobody listens"), auth.TransportError("nobody listens")), True),
        (auth.RefreshError("invalid_grant"), False),
        (auth.DefaultCredentialsError("none"), False),
    ],
    ids=["a token is refused for now", "no way there", "no way to the metadata server", "a token is refused", "none"],
)
def test_a_token_that_could_not_be_fetched_is_not_a_token_that_was_refused(
    error: BaseException, transient: bool
) -> None:
    """google.auth marks few of the network's failures as retryable: a `TransportError` never is."""
    assert (is_transient(error), refusal(error) is None) == (transient, transient)


def test_options_that_the_driver_does_not_take_are_a_setting() -> None:
    """By its class the error is one of a connection's (`InterfaceError`)."""
    error = asyncpg.ClientConfigurationError("`sslmode` parameter must be one of: disable, allow, prefer")
    assert not is_transient(error)
    assert "PROCTOR_DATABASE_URL" in (refusal(error) or "")


def test_a_kind_of_address_that_the_instance_lacks_is_a_setting() -> None:
    error = IPTypeNotFoundError("no PSC")
    assert not is_transient(error)
    assert "PROCTOR_ALLOYDB_IP_TYPE" in (refusal(error) or "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (TimeoutError(), "TimeoutError"),
        (OSError("one\ntwo"), "OSError: one"),
        (wrapped(ConnectionResetError("reset")), "ConnectionResetError: reset"),
    ],
    ids=["nothing to say", "two lines", "SQLAlchemy's"],
)
def test_a_failure_is_described_in_one_line(error: BaseException, line: str) -> None:
    assert describe(error) == line
