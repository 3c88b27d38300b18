"""A message as the line that goes through the pipe. No message's content may keep it from being told."""

from pydantic_core import PydanticSerializationError, to_json

from app.runner.messages import MESSAGE, MESSAGE_LIMIT, Failure, Message, Reported, SampleEnded, SampleResult
from app.runner.storable import storable

_NUL = rb"\u0000"
_SHORTEST_CUT = 256


def line(message: Message, limit: int = MESSAGE_LIMIT) -> bytes:
    """With its newline. What cannot be stored is replaced; of what is longer than `limit` bytes the largest texts are cut,
    and if that does not do, the result is left out: the log has it whole."""
    try:
        data = MESSAGE.dump_json(message)
    except (PydanticSerializationError, ValueError, RecursionError):  # ValueError: UnicodeEncodeError among them
        data = b""
    if not data or _NUL in data or len(data) >= limit:
        data = _made_to_fit(message, limit)
    return data + b"\n"


def _made_to_fit(message: Message, limit: int) -> bytes:
    values = message.model_dump()
    data = _encoded(values)
    if len(data) >= limit:
        shortest = _encoded(values, _SHORTEST_CUT)
        if len(shortest) >= limit:
            return MESSAGE.dump_json(_without_result(message, limit))
        longest = limit
        while len(data) >= limit and longest > _SHORTEST_CUT:
            longest //= 2
            data = _encoded(values, longest)
    return data


def _encoded(values: dict[str, object], longest: int | None = None) -> bytes:
    return to_json(storable(values, longest=longest), inf_nan_mode="constants")


def _without_result(message: Message, limit: int) -> Message:
    failure = Failure(
        error_class="evaluation",
        message=f"Its result takes more than {limit >> 20} MiB, and not because of long texts: the log has it whole.",
        final=True,
    )
    match message:
        case SampleEnded(result=result):
            known = result.model_dump(include={"cost", "limit", "duration", "log"})
            return SampleEnded(result=SampleResult(sample=result.sample, error=failure, **known))
        case Reported():
            return message.model_copy(update={"results": {}, "failure": failure})
        case _:
            raise ValueError(f"A message {message.type!r} of more than {limit} bytes")
