import os
from threading import Event, Thread
from typing import Any

import pytest

from app.runner import writer
from app.runner.line import line
from app.runner.messages import (
    MESSAGE,
    MESSAGE_LIMIT,
    Done,
    Failure,
    Message,
    Progress,
    Reported,
    SampleEnded,
    SampleRef,
    SampleResult,
    ScoreValue,
    WriterFailed,
)
from app.runner.writer import Writer


def _ended(id: int) -> SampleEnded:
    return SampleEnded(result=SampleResult(sample=SampleRef(id=id, epoch=1), log="x" * 1_000))


def _read_all(descriptor: int) -> list[Message]:
    with open(descriptor, "rb") as file:
        return [MESSAGE.validate_json(line) for line in file]


def test_a_slow_reader_neither_blocks_the_sender_nor_loses_a_message() -> None:
    receive, send = os.pipe()
    out = Writer(send)
    messages: list[Message] = [*(_ended(id) for id in range(1_000)), Done()]
    for message in messages:
        out.send(message)  # 1 MB, where a pipe holds 64 KiB: this would hang for ever if it waited for the reader
    closing = Thread(target=out.close)
    closing.start()
    assert _read_all(receive) == messages
    closing.join()


def test_progress_is_thinned_but_the_last_is_always_told() -> None:
    receive, send = os.pipe()
    out = Writer(send)
    for calls in range(1, 1_001):
        out.send(Progress(model_calls=calls))
    out.close()
    told = [message.model_calls for message in _read_all(receive) if isinstance(message, Progress)]
    assert told[-1] == 1_000
    assert len(told) < 10


def test_progress_is_not_told_later_than_what_came_after_it() -> None:
    receive, send = os.pipe()
    out = Writer(send)
    for id in range(20):
        out.send(Progress(samples_done=id))
        out.send(_ended(id))
    out.close()
    seen = [message.type for message in _read_all(receive)]
    assert seen[-2:] == ["progress", "sample_ended"]


def _told(*messages: Message) -> list[Message]:
    receive, send = os.pipe()
    out = Writer(send)
    told: list[Message] = []
    reading = Thread(target=lambda: told.extend(_read_all(receive)))
    reading.start()
    for message in messages:
        out.send(message)
    out.close()
    reading.join()
    return told


def _scored(value: Any = None, **fields: Any) -> SampleEnded:
    result = SampleResult(sample=SampleRef(id=1, epoch=1), scores={"s": ScoreValue(value=value, **fields)}, log="l")
    return SampleEnded(result=result)


HALF, NUL = "\ud800", "\0"


@pytest.mark.parametrize("odd", [HALF, NUL])
def test_text_that_nothing_can_keep_does_not_keep_a_message_from_being_told(odd: str) -> None:
    failure = Failure(error_class="model", message=odd, traceback=odd)
    results = {odd: [odd, {odd: {1, 2}, "o": object(), "b": b"\xff"}]}
    told = _told(
        Progress(step=f"tool {odd}"),
        _scored({odd: [odd]}, answer=odd, explanation=odd),
        SampleEnded(result=SampleResult(sample=SampleRef(id=2, epoch=1), error=failure, log=odd)),
        Reported(results=results, usage={odd: {"n": 1}}, log="l"),
        Done(),
    )
    assert [message.type for message in told] == ["progress", "sample_ended", "sample_ended", "reported", "done"]
    for message in told:
        text = message.model_dump_json()
        assert r"\u0000" not in text


def test_a_message_over_the_limit_is_cut_at_its_largest_texts() -> None:
    answer = "a" * (MESSAGE_LIMIT + 1)
    (told,) = _told(_scored({"short": "kept", "long": "é" * MESSAGE_LIMIT}, answer=answer, explanation="kept too"))
    assert isinstance(told, SampleEnded)
    score = told.result.scores["s"]
    assert isinstance(score.value, dict)
    assert (score.value["short"], score.explanation) == ("kept", "kept too")
    assert str(score.value["long"]).endswith(f"… [cut: {MESSAGE_LIMIT} characters in all]")
    assert str(score.answer).startswith("a" * 1_000)
    assert str(score.answer).endswith(f"… [cut: {len(answer)} characters in all]")


def test_a_result_too_large_without_long_texts_is_left_out_and_says_so() -> None:
    told = MESSAGE.validate_json(line(_scored([1.5] * 2**19), limit=2**20))
    assert isinstance(told, SampleEnded)
    assert told.result.error is not None
    assert "1 MiB" in told.result.error.message
    assert told.result.error.final


def test_a_writer_that_fails_ends_the_child_with_its_reason_and_loses_nothing_told_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    receive, send = os.pipe()
    ended = Event()
    out = Writer(send, end=ended.set)

    def fail(message: Message) -> bytes:
        if isinstance(message, Done):
            raise KeyError("nobody foresaw this")
        return line(message)

    monkeypatch.setattr(writer, "line", fail)
    for message in (_ended(1), Done()):
        out.send(message)
    assert ended.wait(60)
    out.close()
    assert _read_all(receive) == [_ended(1), WriterFailed(reason="KeyError: 'nobody foresaw this'")]
