"""What a failure to reach the database means: try again, or tell a person what is wrong.

SQLSTATEs are those of the Postgres manual, appendix A. The driver's errors come as they are while a connection is opened,
and inside SQLAlchemy's afterwards; its time-outs and the network's errors are never translated.
"""

import asyncpg
from google.api_core.exceptions import GoogleAPICallError, RetryError
from google.auth.exceptions import GoogleAuthError, TransportError
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout

_GONE_CLASS = "08"
_GONE = frozenset(
    {
        "25006",  # read-only: a failover made this server the standby, and pings do not show it
        "57P01",  # it shuts down, or an administrator ended the session
        "57P02",  # it crashed
        "57P03",  # it starts or stops, and takes nobody
        "57P05",  # it ended the session for being idle
        "25P03",  # it ended the session for being idle in a transaction
        "25P04",  # it ended the session for a transaction that lasted
    }
)
_FOR_NOW_CLASS = "53"  # out of connections, memory, disk
_FOR_NOW = frozenset(
    {
        "40001",  # serialization
        "40P01",  # deadlock
        "55P03",  # lock not available in time
        "57014",  # statement stopped, for its time was over
    }
)
POOLER = (
    "There is a pooler in transaction mode before the database: set PROCTOR_DATABASE_POOLER=transaction, or go past it"
)
_REFUSED = {
    "28P01": "The password is wrong",
    "28000": "The user may not log in",
    "3D000": "The database does not exist: CREATE DATABASE makes it",
    "42501": "The user lacks a privilege: GRANT gives it",
    "42P01": "A table is missing: run `proctor migrate`",
    "42704": "The server does not know a parameter of PROCTOR_DATABASE_URL: take it out, or spell it as the server does",
    "42703": "A column is missing: run `proctor migrate`",
    "26000": POOLER,  # no such prepared statement: another session has it
    "42P05": POOLER,  # there is one already: another client's
}
_GOOGLE_REFUSED = {
    400: "The instance's name is not one",
    401: "Google does not accept the service's credentials",
    403: "The service account needs the roles alloydb.client and serviceusage.serviceUsageConsumer",
    404: "There is no such AlloyDB instance: see PROCTOR_ALLOYDB_INSTANCE",
}

_BY_CONTENT = ("22", "54")  # data exceptions; more than a program's limit, as a key too long for its index
_BY_RULE = ("21", "23", "44", "P0")  # cardinality, integrity, a view's check, what a trigger raises
_REASON_LENGTH = 300


def is_transient(error: BaseException) -> bool:
    """Whether the connection or the moment is to blame, so that the same statement may well succeed on another."""
    if _is_pooler(error):
        return False
    if isinstance(error, PoolTimeout | OSError):  # OSError includes TimeoutError and TLS errors
        return True
    if isinstance(error, DBAPIError) and (error.connection_invalidated or _lost_track(error) or _is_outdated(error)):
        return True
    state = state_of(error)
    if state is not None:
        return this_server_is_gone(state) or state in _FOR_NOW or state.startswith(_FOR_NOW_CLASS)
    if isinstance(error, GoogleAPICallError):
        return error.code not in _GOOGLE_REFUSED
    if isinstance(error, GoogleAuthError):
        return _is_no_answer(error)
    if isinstance(error, asyncpg.ClientConfigurationError):  # an InterfaceError by its class
        return False
    return isinstance(error, asyncpg.InterfaceError | asyncpg.InternalClientError | RetryError)


def refusal(error: BaseException) -> str | None:
    """Why the database will not serve these settings, however often it is asked, and what to do; None: something else."""
    reason: str | None = None
    state = state_of(error)
    if _is_pooler(error):
        reason = POOLER
    elif state is not None:
        reason = _REFUSED.get(state)
    elif isinstance(error, GoogleAPICallError):
        reason = _GOOGLE_REFUSED.get(error.code or 0)
    elif isinstance(error, GoogleAuthError) and not _is_no_answer(error):
        reason = "Google does not accept the service's credentials"
    elif isinstance(error, asyncpg.ClientConfigurationError):
        reason = "The driver does not take the options in PROCTOR_DATABASE_URL"
    elif type(error).__name__ == "IPTypeNotFoundError":  # the connector's, which need not be installed or loaded
        reason = "The instance has no address of that kind: see PROCTOR_ALLOYDB_IP_TYPE"
    return f"{reason} ({describe(error)})." if reason else None


def data_refusal(error: BaseException) -> tuple[str, bool] | None:
    """Why these values will never be taken, and whether what they hold is to blame (or else a rule of the tables); None:
    something else."""
    kind = (state_of(error) or "")[:2]
    unsent = isinstance(error, StatementError) and isinstance(error.orig, ValueError | TypeError | ArithmeticError)
    by_content = kind in _BY_CONTENT or unsent
    if not (by_content or kind in _BY_RULE):
        return None
    return describe(error)[:_REASON_LENGTH], by_content


def _is_pooler(error: BaseException) -> bool:
    """PgBouncer refuses the settings that a connection begins with; a server of Postgres knows them all."""
    return state_of(error) == "08P01" and "startup parameter" in str(error)


def _lost_track(error: DBAPIError) -> bool:
    """The driver met a state that it does not know, as when a server stops in the midst of a login."""
    return error.orig is not None and isinstance(error.orig.__cause__, asyncpg.InternalClientError)


def _is_outdated(error: DBAPIError) -> bool:
    """The connection had prepared the statement before a migration changed a table of it. Told once, the driver forgets all
    that it has prepared."""
    return error.orig is not None and isinstance(error.orig.__cause__, asyncpg.InvalidCachedStatementError)


def _is_no_answer(error: GoogleAuthError) -> bool:
    """No token for now. `retryable` does not say so where the token's (or the metadata) server was not reached at all."""
    return bool(error.retryable) or isinstance(error, TransportError) or isinstance(error.__cause__, TransportError)


def this_server_is_gone(state: str | None) -> bool:
    """Whether no connection to the server that said so is of any use."""
    return state is not None and (state in _GONE or state.startswith(_GONE_CLASS))


def state_of(error: BaseException) -> str | None:
    """The SQLSTATE in an error of the driver, or of SQLAlchemy around one."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    state = getattr(cause, "sqlstate", None)
    return state if isinstance(state, str) else None


def describe(error: BaseException) -> str:
    """One line."""
    cause = error.orig if isinstance(error, StatementError) and error.orig is not None else error
    return f"{type(cause).__name__}: {cause}".splitlines()[0].removesuffix(": ")
