"""What the worker writes to its log: one line a job, in words on a laptop, in JSON on RunPod.

Never a prompt, a picture or a token, whoever writes: other libraries and the SDK too.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

from src.job import Job
from src.plan.plan import Plan
from src.redaction import redact
from src.settings import Settings

log = logging.getLogger("worker")

# The SDK writes results and prompts into its log at DEBUG.
SDK_LEVELS = {"DEBUG": "INFO", "INFO": "INFO", "WARNING": "WARN", "ERROR": "ERROR"}
# Libraries that write each request, a hub's and a store's signed addresses among them, and those that warn of what this
# card does not need.
_LIBRARIES = {
    **dict.fromkeys(
        ("httpx", "httpx2", "httpcore", "httpcore2", "huggingface_hub", "urllib3", "filelock", "botocore"),
        logging.WARNING,
    ),
    **dict.fromkeys(("torchao", "diffusers.quantizers.torchao"), logging.ERROR),
    "torch.utils._pytree": logging.ERROR,
}


class _Json(logging.Formatter):
    """The SDK's own keys, which RunPod's console reads, and the job's facts."""

    def format(self, record: logging.LogRecord) -> str:
        facts = {
            name: redact(value) if isinstance(value, str) else value
            for name, value in getattr(record, "facts", {}).items()
        }
        line = {
            "requestId": facts.get("job"),
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": "\n".join(filter(None, (record.getMessage(), record.exc_text))),
            **facts,
        }
        return json.dumps(line, ensure_ascii=False)


_plain_record = logging.getLogRecordFactory()


def _record(*arguments: Any, **options: Any) -> logging.LogRecord:
    """A record without secrets, for whatever handler of whatever logger."""
    record = _plain_record(*arguments, **options)
    try:
        message = record.getMessage()
    except Exception:  # noqa: BLE001 - arguments that do not fit, which whoever formats it would be told of
        message, record.args = str(record.msg), None
    if (clean := redact(message)) != message and isinstance(record.args, tuple):
        record.args = tuple(redact(value) if isinstance(value, str) else value for value in record.args)
    if record.getMessage() != clean:
        record.msg, record.args = clean, None
    if record.exc_info and record.exc_info[1]:
        record.exc_text = redact("".join(traceback.format_exception(record.exc_info[1]))).rstrip()
        record.exc_info = None  # the text alone is printed
    return record


def keep_secrets_out() -> None:
    """From now on no logger of this process writes a secret."""
    logging.setLogRecordFactory(_record)
    logging.raiseExceptions = False  # what cannot be written would be printed as it is


def quiet_libraries() -> None:
    """From now on other libraries write what an operator can do something about."""
    import huggingface_hub.utils  # noqa: F401 - it sets its own level when it is imported, so before ours

    for library, level in _LIBRARIES.items():
        logging.getLogger(library).setLevel(level)


def configure_sdk() -> None:
    """The same for the SDK's logger, which prints by itself; it is imported for that, which takes a second."""
    from runpod.serverless.modules.rp_logger import RunPodLogger

    sdk = RunPodLogger()  # one for all of its modules

    def write(message: object, message_level: str = "INFO", job_id: object = None) -> None:
        RunPodLogger.log(sdk, redact(str(message)), message_level, job_id and redact(str(job_id)))

    sdk.log = write
    quiet_libraries()


def _keep_secrets_out_of_python() -> None:
    """It prints by itself where nobody catches an exception."""

    def uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        log.critical("nobody caught a %s", kind.__name__, exc_info=(kind, error, trace))

    def uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not None:
            uncaught(arguments.exc_type, arguments.exc_value, arguments.exc_traceback)

    sys.excepthook, threading.excepthook = uncaught, uncaught_in_thread


def configure(settings: Settings, *, sdk: bool = True) -> None:
    """Send this worker's log to stderr; `sdk` says whether RunPod's loop writes too."""
    keep_secrets_out()
    handler = logging.StreamHandler()
    handler.setFormatter(
        _Json() if settings.runpod_endpoint_id else logging.Formatter("%(levelname)s %(name)s: %(message)s")
    )
    log.addHandler(handler)
    log.setLevel(settings.log_level)
    log.propagate = False
    _keep_secrets_out_of_python()
    quiet_libraries()
    if sdk:
        configure_sdk()


def job_ended(job: Job, outcome: str, plan: Plan | None, *, error: str = "", level: int = logging.INFO) -> None:
    """The one line of a job: how it ended, what was asked for, and where its seconds went."""
    job.end_phase()
    facts: dict[str, Any] = {"job": redact(job.id), "outcome": outcome}
    if error:
        facts["error"] = redact(error)
    if plan is not None:
        facts |= {
            "mode": plan.mode,
            "size": f"{plan.sampling.width}x{plan.sampling.height}",
            "steps": plan.sampling.num_inference_steps,
            "images": len(plan.seeds),
        }
    facts["seconds"] = {phase: round(seconds, 3) for phase, seconds in job.seconds.items()}
    words = " ".join(f"{name} {value}" for name, value in facts.items() if name in ("mode", "size", "steps", "images"))
    seconds = " ".join(f"{phase} {value:.3f}" for phase, value in facts["seconds"].items())
    message = " | ".join(filter(None, (facts.get("error", outcome), words, seconds)))
    log.log(level, "job %s: %s", facts["job"], message, extra={"facts": facts})


def ended_unbegun(id: str, outcome: str, words: str, **more: str) -> None:
    """The one line of a job of which nothing was done; `more` are facts."""
    facts = {"job": redact(id), "outcome": outcome, **more, "seconds": {}}
    log.info("job %s: %s", facts["job"], words, extra={"facts": facts})
