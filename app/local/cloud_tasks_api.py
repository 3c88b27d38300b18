"""The gRPC service `google.cloud.tasks.v2.CloudTasks`: what each call does to the emulator's queues.

google-cloud-tasks ships no servicer, so the handlers are built from its message types. What is not here (IAM, batches,
CMEK, locations) gRPC itself answers with UNIMPLEMENTED.
"""

from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import grpc.aio
from google.cloud import tasks_v2
from google.protobuf.empty_pb2 import Empty
from google.protobuf.field_mask_pb2 import FieldMask

from app.local.dispatcher import QueuedTask, TaskQueue
from app.local.queue_names import (
    Refusal,
    Tombstones,
    check_location,
    check_queue_name,
    check_task_name,
    invalid,
    page,
    queue_of,
)
from app.local.queue_rules import Message, complete_queue, complete_task

LARGEST_PAGE_OF_QUEUES = 9800
LARGEST_PAGE_OF_TASKS = 1000

_ListQueuesResponse = tasks_v2.ListQueuesResponse.pb()
_ListTasksResponse = tasks_v2.ListTasksResponse.pb()

_OUTPUT_ONLY = {"name", "state", "purge_time", "rate_limits.max_burst_size"}
_SETTABLE = ("app_engine_routing_override", "http_target", "rate_limits", "retry_config", "stackdriver_logging_config")


class CloudTasksApi:
    """Messages marked [recorded] are the real service's own words, as others recorded them."""

    def __init__(
        self,
        open_queue: Callable[[Message], TaskQueue],
        *,
        used_queue_names: Tombstones,
        used_task_names: Tombstones,
        default_dispatch_deadline: timedelta,
    ) -> None:
        self.queues: dict[str, TaskQueue] = {}
        self._open_queue = open_queue
        self._used_queue_names = used_queue_names
        self._used_task_names = used_task_names
        self._default_dispatch_deadline = default_dispatch_deadline

    def list_queues(self, request: Message) -> Message:
        check_location(request.parent)
        if request.filter:
            raise Refusal(grpc.StatusCode.UNIMPLEMENTED, "The emulator has no ListQueuesRequest.filter.")
        names = (name for name in self.queues if name.startswith(f"{request.parent}/queues/"))
        found, token = page(names, request.page_size, request.page_token, LARGEST_PAGE_OF_QUEUES)
        return _ListQueuesResponse(queues=[self.queues[name].message for name in found], next_page_token=token)

    def get_queue(self, request: Message) -> Message:
        return self._queue(request.name).message

    def create_queue(self, request: Message) -> Message:
        check_location(request.parent)
        check_queue_name(request.queue.name)
        if not request.queue.name.startswith(f"{request.parent}/queues/"):
            raise invalid(f"{request.queue.name} must begin with {request.parent}.")  # [recorded]
        if request.queue.name in self.queues:
            raise Refusal(grpc.StatusCode.ALREADY_EXISTS, "Queue already exists")  # [recorded]
        return self._create(request.queue)

    def update_queue(self, request: Message) -> Message:
        """Creates the queue if there is none, as the real service does."""
        check_queue_name(request.queue.name)
        if request.queue.name not in self.queues:
            return self._create(request.queue)
        queue = self.queues[request.queue.name]
        updated = deepcopy(queue.message)
        _merge(request.queue, updated, request.update_mask)
        complete_queue(updated)
        queue.reconfigure(updated)
        return updated

    def delete_queue(self, request: Message) -> Message:
        check_queue_name(request.name)
        if request.name not in self.queues:
            raise _not_found()
        self.queues.pop(request.name).delete()
        self._used_queue_names.bury(request.name)
        return Empty()

    def purge_queue(self, request: Message) -> Message:
        queue = self._queue(request.name)
        queue.purge()
        return queue.message

    def pause_queue(self, request: Message) -> Message:
        queue = self._queue(request.name)
        queue.set_state(tasks_v2.Queue.State.PAUSED)
        return queue.message

    def resume_queue(self, request: Message) -> Message:
        queue = self._queue(request.name)
        queue.set_state(tasks_v2.Queue.State.RUNNING)
        return queue.message

    def list_tasks(self, request: Message) -> Message:
        tasks = self._queue(request.parent).tasks
        found, token = page(tasks, request.page_size, request.page_token, LARGEST_PAGE_OF_TASKS)
        return _ListTasksResponse(
            tasks=[_view(tasks[name], request.response_view) for name in found], next_page_token=token
        )

    def get_task(self, request: Message) -> Message:
        _, task = self._task(request.name)
        return _view(task, request.response_view)

    def create_task(self, request: Message) -> Message:
        queue = self._queue(request.parent)
        complete_task(request.task, request.parent, self._default_dispatch_deadline, datetime.now(UTC))
        if request.task.name in queue.tasks:
            raise Refusal(grpc.StatusCode.ALREADY_EXISTS, "Requested entity already exists")  # [recorded]
        if request.task.name in self._used_task_names:
            raise Refusal(
                grpc.StatusCode.ALREADY_EXISTS,
                "The task cannot be created because a task with this name existed too recently.",
            )  # [recorded]
        return _view(queue.add(request.task), request.response_view)

    def delete_task(self, request: Message) -> Message:
        queue, task = self._task(request.name)
        queue.remove(task)
        return Empty()

    def run_task(self, request: Message) -> Message:
        queue, task = self._task(request.name)
        queue.force(task)
        return _view(task, request.response_view)

    def _queue(self, name: str) -> TaskQueue:
        check_queue_name(name)
        if name not in self.queues:
            raise Refusal(
                grpc.StatusCode.NOT_FOUND,
                "Queue does not exist. If you just created the queue,"
                " wait at least a minute for the queue to initialize.",
            )  # [recorded]
        return self.queues[name]

    def _task(self, name: str) -> tuple[TaskQueue, QueuedTask]:
        check_task_name(name)
        queue = self._queue(queue_of(name))
        if name in queue.tasks:
            return queue, queue.tasks[name]
        if name not in self._used_task_names:
            raise _not_found()
        raise Refusal(
            grpc.StatusCode.NOT_FOUND,
            "The task no longer exists, though a task with this name existed recently."
            " The task either successfully completed or was deleted.",
        )  # [recorded]

    def _create(self, message: Message) -> Message:
        if message.name in self._used_queue_names:
            raise Refusal(
                grpc.StatusCode.FAILED_PRECONDITION,
                "The queue cannot be created because a queue with this name existed too recently.",
            )  # [recorded]
        complete_queue(message)
        message.state = tasks_v2.Queue.State.RUNNING
        message.ClearField("purge_time")
        self.queues[message.name] = self._open_queue(message)
        return message


def handlers(api: CloudTasksApi) -> "grpc.GenericRpcHandler[Message, Message]":
    """The service, to be added to a `grpc.aio` server."""
    methods = {
        "ListQueues": _method(api.list_queues, tasks_v2.ListQueuesRequest),
        "GetQueue": _method(api.get_queue, tasks_v2.GetQueueRequest),
        "CreateQueue": _method(api.create_queue, tasks_v2.CreateQueueRequest),
        "UpdateQueue": _method(api.update_queue, tasks_v2.UpdateQueueRequest),
        "DeleteQueue": _method(api.delete_queue, tasks_v2.DeleteQueueRequest),
        "PurgeQueue": _method(api.purge_queue, tasks_v2.PurgeQueueRequest),
        "PauseQueue": _method(api.pause_queue, tasks_v2.PauseQueueRequest),
        "ResumeQueue": _method(api.resume_queue, tasks_v2.ResumeQueueRequest),
        "ListTasks": _method(api.list_tasks, tasks_v2.ListTasksRequest),
        "GetTask": _method(api.get_task, tasks_v2.GetTaskRequest),
        "CreateTask": _method(api.create_task, tasks_v2.CreateTaskRequest),
        "DeleteTask": _method(api.delete_task, tasks_v2.DeleteTaskRequest),
        "RunTask": _method(api.run_task, tasks_v2.RunTaskRequest),
    }
    return grpc.method_handlers_generic_handler("google.cloud.tasks.v2.CloudTasks", methods)


def _method(call: Callable[[Message], Message], request: Any) -> "grpc.RpcMethodHandler[Message, Message]":
    async def handle(message: Message, context: "grpc.aio.ServicerContext[Message, Message]") -> Message:
        try:
            return call(message)
        except Refusal as refusal:
            await context.abort(refusal.code, str(refusal))

    return grpc.unary_unary_rpc_method_handler(
        handle, request.pb().FromString, lambda answer: answer.SerializeToString()
    )


def _view(task: QueuedTask, view: int) -> Message:
    return task.full() if view == tasks_v2.Task.View.FULL else task.message


def _merge(source: Message, destination: Message, mask: FieldMask) -> None:
    """Take over the masked fields of `source`, or all of them if the mask is empty. Output-only ones are ignored."""
    for path in mask.paths:
        if not FieldMask(paths=[path]).IsValidForDescriptor(source.DESCRIPTOR):
            raise invalid(f"update_mask: a Queue has no field {path!r}.")
    paths = [path for path in mask.paths or _SETTABLE if path not in _OUTPUT_ONLY]
    FieldMask(paths=paths).MergeMessage(source, destination, replace_message_field=True)


def _not_found() -> Refusal:
    return Refusal(grpc.StatusCode.NOT_FOUND, "Requested entity was not found.")  # [recorded]
