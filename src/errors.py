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

import re
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

# What must never leave the process: tokens of Hugging Face and RunPod, bearer tokens, passwords and signatures in URLs,
# and long base64 (a picture).
_SECRETS = (
    re.compile(r"(?:hf|rpa)_[A-Za-z0-9]{8,}"),
    re.compile(
        r"(?<=[?&])(?:X-Amz-[\w-]+|[\w-]*(?:token|key|secret|signature|sig|password)[\w-]*)=[^&\s'\"]+", re.IGNORECASE
    ),
    re.compile(r"(?<=[Bb]earer )[^\s'\"]+"),
    re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"),
    re.compile(r"[A-Za-z0-9+/=_-]{200,}"),
)


_MOST_ERROR, _MOST_TRACEBACK, _MOST_FAULT = 8_000, 16_000, 2_000  # characters that an answer has for each
_MOST_REDACTED = 100_000

# How libraries say in words that memory was short, and what they say of a machine that has no class for it.
_NO_MEMORY = ("allocate memory", "out of memory", "ALLOC_FAILED")
_DEVICE_FAILED = "CUDA error"
_NO_THREAD = "can't start new thread"


def redact(text: str) -> str:
    """`text` without tokens, credentials and pictures."""
    for secret in _SECRETS:
        text = secret.sub("[redacted]", text)
    return text


def _sent(text: str, most: int) -> str:
    """`text` as an answer holds it: without secrets, in UTF-8, and of what is long the beginning and the end."""
    return _cut(redact(_cut(text, _MOST_REDACTED)), most).encode(errors="replace").decode()


def _cut(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n[{len(text) - most:,} characters are left out]\n{text[-most // 2 :]}"


@dataclass(frozen=True)
class Fault:
    """One wrong field of a request; `message` says what is wrong, what was received and what is allowed."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" if self.field else self.message


@dataclass(frozen=True)
class WorkerFault(Fault):
    """What hinders a field of a request, and the client cannot help; `code` is that of the error that it makes."""

    code: str = "adapter_unavailable"


class Refused(Exception):
    """Why something that was sent or set cannot be used: whoever catches it knows the field that it belongs to."""


class WorkerError(Exception):
    """A failure that a client is told of; `str()` of it is the sentence."""

    code: ClassVar[str]
    refresh_worker: ClassVar[bool] = False

    @property
    def summary(self) -> str:
        """The failure for the log, without tokens and pictures."""
        return redact(f"{self.code}: {self}")

    def to_response(self, *, include_traceback: bool) -> dict[str, Any]:
        """The contract's error; RunPod takes `error` out of it, so the code stands in its text too."""
        response: dict[str, Any] = {
            "status": "error",
            "error": _sent(f"{self.code}: {self}", _MOST_ERROR),
            "error_code": self.code,
        }
        if include_traceback:
            response["traceback"] = _sent("".join(traceback.format_exception(self)), _MOST_TRACEBACK)
        if self.refresh_worker:
            response["refresh_worker"] = True
        return response


class InvalidRequest(WorkerError):
    """All faults of one request."""

    code = "invalid_request"

    def __init__(self, faults: Sequence[Fault]) -> None:
        super().__init__("; ".join(map(str, faults)))
        self.faults = tuple(faults)

    @property
    def summary(self) -> str:
        """Which fields were wrong."""
        return redact(f"{self.code}: {', '.join(fault.field or 'event' for fault in self.faults)}")

    def to_response(self, *, include_traceback: bool) -> dict[str, Any]:
        """With `errors`, one a field."""
        response = super().to_response(include_traceback=include_traceback)
        errors = [{name: _sent(text, _MOST_FAULT) for name, text in asdict(fault).items()} for fault in self.faults]
        return {**response, "errors": errors}


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


class AdapterUnavailable(WorkerError):
    """An adapter cannot be had now, by a trouble of the worker's own: its disk, its way to the hub."""

    code = "adapter_unavailable"


class OutOfMemory(WorkerError):
    """The device or the host ran out of memory; what was held is free again."""

    code = "out_of_memory"


class WorkerUnavailable(WorkerError):
    """The worker is short of something now: room on a disk, file handles, threads, its bucket."""

    code = "worker_unavailable"


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
    refresh_worker = True


class InternalError(WorkerError):
    """A fault of ours."""

    code = "internal_error"


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
