"""Every way in which a request can fail, as a client sees it.

    WorkerError                 code                  the worker afterwards
    ├── InvalidRequest          invalid_request       goes on
    ├── InvalidSettings         invalid_settings      does not start
    ├── ModelUnavailable        model_unavailable     does not start, or goes on where one request wanted more
    ├── AdapterUnavailable      adapter_unavailable   goes on
    ├── OutOfMemory             out_of_memory         goes on
    ├── WorkerUnavailable       worker_unavailable    goes on
    ├── GenerationFailed        generation_failed     goes on
    ├── Cancelled               cancelled             goes on
    ├── TimedOut                timed_out             goes on
    ├── ResponseTooLarge        response_too_large    goes on
    ├── DeviceFailed            device_failed         is replaced
    └── InternalError           internal_error        goes on

Nothing here knows of torch or of a model.
"""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from src.redaction import cut, redact, without_middle

_MOST_OF_FIELD, _MOST_OF_FAULT = 200, 1_000  # characters that are told of one fault
_MOST_FAULTS, _MOST_OF_FAULTS = 100, 50_000  # of a request, and the characters of all of them together
_MOST_OF_MESSAGE, _MOST_OF_TRACEBACK = 19_000, 40_000  # characters

# How libraries say in words that memory was short, and what they say of a machine that has no class for it.
_NO_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED")
_DEVICE_FAILED = "CUDA error"
_NO_THREAD = "can't start new thread"


@dataclass(frozen=True)
class Fault:
    """One wrong field of a request; `message` says what is wrong, what was received and what is allowed."""

    field: str
    message: str

    def __post_init__(self) -> None:
        """What was sent stands in both, and may be as long as a request."""
        object.__setattr__(self, "field", cut(self.field, _MOST_OF_FIELD))
        object.__setattr__(self, "message", cut(self.message, _MOST_OF_FAULT))

    @property
    def log_name(self) -> str:
        """The field, as the log names it."""
        return self.field or "event"

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


@dataclass(frozen=True)
class UnknownField(Fault):
    """A field whose name the client made up: a prompt, perhaps, and so none for the log."""

    @property
    def log_name(self) -> str:
        """No word of the client's."""
        return "an unknown field"


@dataclass(frozen=True)
class WorkerFault(Fault):
    """What hinders a field of a request, and the client cannot help; `code` is that of the error that it makes."""

    code: str = "adapter_unavailable"


class Refused(Exception):
    """Why something that was sent or set cannot be used: whoever catches it knows the field that it belongs to."""

    def __init__(self, message: str) -> None:
        super().__init__(cut(message, _MOST_OF_FAULT))


class WorkerError(Exception):
    """A failure that a client is told of; `str()` of it is the sentence."""

    code: ClassVar[str]
    refresh_worker: ClassVar[bool] = False
    retryable: ClassVar[bool] = False  # whether the same request may fare better when it is sent again

    def __init__(self, message: str) -> None:
        super().__init__(cut(message, _MOST_OF_MESSAGE))

    @property
    def summary(self) -> str:
        """The failure for the log, without tokens and pictures."""
        return redact(f"{self.code}: {self}")

    def to_response(self, *, include_traceback: bool) -> dict[str, Any]:
        """The contract's error; RunPod takes `error` out of it, so the code stands in its text too."""
        response: dict[str, Any] = {
            "status": "error",
            "error": redact(f"{self.code}: {self}"),
            "error_code": self.code,
        }
        if include_traceback:
            text = redact("".join(traceback.format_exception(self)))
            response["traceback"] = without_middle(text, _MOST_OF_TRACEBACK)
        if self.refresh_worker:
            response["refresh_worker"] = True
        return response


class InvalidRequest(WorkerError):
    """All faults of one request."""

    code = "invalid_request"

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = _at_most(faults)
        super().__init__("; ".join(map(str, self.faults)))

    @property
    def summary(self) -> str:
        """Which fields were wrong."""
        return redact(f"{self.code}: {', '.join(dict.fromkeys(fault.log_name for fault in self.faults))}")

    def to_response(self, *, include_traceback: bool) -> dict[str, Any]:
        """With `errors`, one a field."""
        response = super().to_response(include_traceback=include_traceback)
        errors = [{name: redact(text) for name, text in asdict(fault).items()} for fault in self.faults]
        return {**response, "errors": errors}


def _at_most(faults: Sequence[Fault]) -> tuple[Fault, ...]:
    """As many as an answer may hold, and how many more there are."""
    count, room = 0, _MOST_OF_FAULTS
    while count < min(len(faults), _MOST_FAULTS) and room > 0:
        room -= len(str(faults[count]))
        count += 1
    more = len(faults) - count
    return (*faults[:count], *([Fault("input", f"has {more:,} more faults")] if more else []))


def refusal(faults: Sequence[Fault]) -> WorkerError:
    """The error that tells `faults`: all that a client can mend, or else what the operator has to."""
    clients = [fault for fault in faults if not isinstance(fault, WorkerFault)]
    if clients:
        return InvalidRequest(clients)
    codes = {fault.code for fault in faults if isinstance(fault, WorkerFault)}
    found = next(error for error in WorkerError.__subclasses__() if error.code in codes)
    return found("; ".join(map(str, faults)))


class InvalidSettings(WorkerError):
    """Environment variables with no usable value; the message names all of them."""

    code = "invalid_settings"


class ModelUnavailable(WorkerError):
    """The model, or what one request wants beside it, cannot be loaded, and why."""

    code = "model_unavailable"
    retryable = True


class AdapterUnavailable(WorkerError):
    """An adapter cannot be had now, by a trouble of the worker's own: its disk, its way to the hub."""

    code = "adapter_unavailable"
    retryable = True


class OutOfMemory(WorkerError):
    """The device or the host ran out of memory; what was held is free again."""

    code = "out_of_memory"
    retryable = True


class WorkerUnavailable(WorkerError):
    """The worker is short of something now: room on a disk, file handles, threads, its bucket."""

    code = "worker_unavailable"
    retryable = True


class GenerationFailed(WorkerError):
    """The model could not make this picture: tensors that do not fit, or values that are not finite."""

    code = "generation_failed"


class Cancelled(WorkerError):
    """The client does not want the pictures any more."""

    code = "cancelled"


class TimedOut(WorkerError):
    """The job took longer than REQUEST_TIMEOUT."""

    code = "timed_out"


class ResponseTooLarge(WorkerError):
    """The pictures are made, and no way was found to get them to the client."""

    code = "response_too_large"


class DeviceFailed(WorkerError):
    """The device is broken until the process is replaced (a CUDA error sticks to its process)."""

    code = "device_failed"
    retryable = True
    refresh_worker = True


class InternalError(WorkerError):
    """A fault of ours."""

    code = "internal_error"
    retryable = True


def of_the_machine(error: BaseException) -> WorkerError | None:
    """What `error` says of this machine, whose fault it then is; None where it says nothing of it."""
    if is_out_of_memory(error):
        return OutOfMemory("the worker had too little memory; send the request again, or one that asks for less")
    if isinstance(error, RuntimeError) and _DEVICE_FAILED in str(error):
        return DeviceFailed(f"the device failed and this worker must be replaced: {first_line(error)}")
    if isinstance(error, OSError):
        reason = error.strerror or type(error).__name__
    elif isinstance(error, RuntimeError) and _NO_THREAD in str(error):
        reason = _NO_THREAD
    else:
        return None
    return WorkerUnavailable(f"something hinders the worker now ({reason}); send the request again")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory was short."""
    if isinstance(error, OSError):
        said = error.strerror or str(error)  # not the name of a file
    else:
        said = str(error) if isinstance(error, RuntimeError) else ""
    return isinstance(error, MemoryError) or any(words in said for words in _NO_MEMORY)


def first_line(error: BaseException) -> str:
    """What `error` says, or else its class."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def let_go(error: BaseException) -> None:
    """Clear the frames of `error`, and of all that led to it: what they hold is free, and where they were stays."""
    seen: set[int] = set()
    ahead: BaseException | None = error
    while ahead is not None and id(ahead) not in seen:
        seen.add(id(ahead))
        traceback.clear_frames(ahead.__traceback__)
        ahead = ahead.__cause__ or ahead.__context__
