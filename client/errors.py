"""Every way in which a batch or a job can fail, as whoever calls the client sees it.

    ClientError             what happened
    ├── EndpointUnusable    the key, the endpoint or the address is wrong: no job will come through
    ├── Unreachable         RunPod gave no usable answer, for as long as it was asked
    ├── EndpointFailing     job after job fails for reasons of the worker
    ├── Forgotten           RunPod does not know the job (any more)
    └── JobFailed           one job failed; `code` and str() say why

No message holds the API key.
"""

from __future__ import annotations

from src.errors import WorkerError

# Codes of the worker's own troubles: the same request may fare better on another try, or on another worker.
RETRYABLE = frozenset(error.code for error in WorkerError.__subclasses__() if error.retryable)
CODES = frozenset(error.code for error in WorkerError.__subclasses__())


class ClientError(Exception):
    """What ended a call; `str()` of it is the sentence."""


class EndpointUnusable(ClientError):
    """No job will come through: a wrong key, endpoint or address."""


class Unreachable(ClientError):
    """RunPod gave no usable answer, for as long as it was asked."""


class EndpointFailing(ClientError):
    """So many jobs failed one after another, for reasons of the worker, that no more are sent."""


class Forgotten(ClientError):
    """RunPod does not know the job: it keeps results for 30 minutes."""


class JobFailed(ClientError):
    """One job failed.

    `code` is the worker's error_code (docs/troubleshooting.md), or else what RunPod says (failed, timed_out, cancelled,
    rejected, forgotten, no_output), or what is wrong with the answer (no_pictures, gone); `retryable` says whether the
    same request may fare better on another try.
    """

    def __init__(self, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.code, self.retryable = code, retryable

    def __str__(self) -> str:
        return f"{self.code}: {self.args[0]}"
