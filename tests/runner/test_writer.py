import os
from threading import Thread

from app.runner.messages import MESSAGE, Done, Message, Progress, SampleEnded, SampleRef, SampleResult
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
