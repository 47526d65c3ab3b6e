"""What the worker writes to its log: one line a job, in words on a laptop, in JSON on RunPod.

Never a prompt, a picture or a token.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

from src.errors import redact
from src.job import Job
from src.plan.plan import Plan
from src.settings import Settings

log = logging.getLogger("worker")

# The SDK writes results and prompts into its log at DEBUG.
SDK_LEVELS = {"DEBUG": "INFO", "INFO": "INFO", "WARNING": "WARN", "ERROR": "ERROR"}


class _Json(logging.Formatter):
    """The SDK's own keys, which RunPod's console reads, and the job's facts."""

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = getattr(record, "facts", {})
        line = {
            "requestId": facts.get("job"),
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": record.getMessage(),
            **facts,
        }
        return json.dumps(line, ensure_ascii=False)


def configure(settings: Settings) -> None:
    """Send this worker's log to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        _Json() if settings.runpod_endpoint_id else logging.Formatter("%(levelname)s %(name)s: %(message)s")
    )
    log.addHandler(handler)
    log.setLevel(settings.log_level)
    log.propagate = False
    for library in ("torchao", "torch.utils._pytree"):  # they warn of what this card does not need
        logging.getLogger(library).setLevel(logging.ERROR)


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


def cancelled_unbegun(id: str) -> None:
    """The one line of a job that was cancelled before anything of it was done."""
    facts = {"job": redact(id), "outcome": "cancelled", "seconds": {}}
    log.info("job %s: cancelled before it began", facts["job"], extra={"facts": facts})


def refused_unread(id: str, reason: str) -> None:
    """The one line of a job that cannot be read at all."""
    facts = {
        "job": redact(id),
        "outcome": "invalid_request",
        "error": f"invalid_request: input {reason}",
        "seconds": {},
    }
    log.info("job %s: %s", facts["job"], facts["error"], extra={"facts": facts})
