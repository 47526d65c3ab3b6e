"""What torch and diffusers raise while a plan is drawn, as what a client can act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from src.engine.memory import free_memory, is_out_of_memory
from src.errors import DeviceFailed, GenerationFailed, OutOfMemory, WorkerError, first_line, of_the_machine
from src.plan.plan import Plan


@contextmanager
def as_worker_errors(plan: Plan) -> Iterator[None]:
    """Within it errors of torch, diffusers and the system become OutOfMemory, DeviceFailed, WorkerUnavailable or
    GenerationFailed, worded for who sent `plan`; what is an answer already goes on as it is.
    """
    try:
        yield
    except (WorkerError, MemoryError, OSError, RuntimeError, ValueError, TypeError) as error:
        meant = _meaning(error, plan)
        if meant is error:
            raise
        raise meant from error


def _meaning(error: Exception, plan: Plan) -> WorkerError:
    """`error` itself where it is an answer already, unless there is a trouble of the machine's behind it."""
    if is_out_of_memory(error) or isinstance(error, OutOfMemory):
        try:
            free_memory(error)
        except RuntimeError as failed:  # the device does not even do that
            return DeviceFailed(f"the device failed and this worker must be replaced: {first_line(failed)}")
        if isinstance(error, OutOfMemory):
            return error
        return OutOfMemory(
            f"{plan.sampling.width}x{plan.sampling.height} with {len(plan.seeds)} image(s) needs more memory than "
            "there is; ask for a smaller width, height or num_images, or choose a larger card"
        )
    for each in filter(None, (error, error.__cause__)):
        if isinstance(each, torch.AcceleratorError):
            return DeviceFailed(f"the device failed and this worker must be replaced: {first_line(each)}")
        found = of_the_machine(each)
        is_answer = isinstance(error, WorkerError) and not isinstance(error, GenerationFailed)
        if found and (isinstance(found, DeviceFailed) or not is_answer):
            return found
    if isinstance(error, WorkerError):
        return error
    return GenerationFailed(f"the model refused these tensors: {first_line(error)}")
