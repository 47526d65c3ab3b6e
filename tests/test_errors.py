from __future__ import annotations

import errno
import json
import os

import pytest

from src import errors
from src.errors import (
    DeviceFailed,
    Fault,
    GenerationFailed,
    InternalError,
    InvalidRequest,
    OutOfMemory,
    UnknownField,
    WorkerError,
    WorkerFault,
    let_go,
    of_the_machine,
    refusal,
)
from src.redaction import redact


def test_the_drawn_tree_is_the_tree() -> None:
    drawn = errors.__doc__ or ""
    for error in WorkerError.__subclasses__():
        line = next(line for line in drawn.splitlines() if f" {error.__name__} " in line)
        assert error.code in line
        assert ("is replaced" in line) == error.refresh_worker


def test_all_faults_are_named_at_once() -> None:
    response = InvalidRequest([Fault("width", "is odd"), Fault("", "no event")]).to_response(include_traceback=False)
    assert response == {
        "status": "error",
        "error": "invalid_request: width: is odd; no event",
        "error_code": "invalid_request",
        "errors": [{"field": "width", "message": "is odd"}, {"field": "", "message": "no event"}],
    }


def test_only_a_broken_device_asks_for_another_worker() -> None:
    assert DeviceFailed("x").to_response(include_traceback=False)["refresh_worker"] is True
    assert "refresh_worker" not in OutOfMemory("x").to_response(include_traceback=False)


def test_the_traceback_leads_to_the_cause() -> None:
    try:
        try:
            raise RuntimeError("the cause")
        except RuntimeError as cause:
            raise OutOfMemory("the effect") from cause
    except OutOfMemory as error:
        text = error.to_response(include_traceback=True)["traceback"]
    assert "the cause" in text
    assert "the effect" in text
    assert "test_errors.py" in text


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("token hf_abcdefghij0123456789 refused", "hf_abcdefghij0123456789"),
        ("{'Authorization': 'Bearer abc.def'}", "abc.def"),
        ("http://user:geheim@host/x", "geheim"),
        ("https://civitai.com/api/download/models/4?type=Model&token=geheim", "geheim"),
        ("https://storage.test/x?X-Goog-Signature=geheim&x=1", "geheim"),
        ("data:image/png;base64," + "iVBORw0KGgo" * 40, "iVBORw0KGgo"),
    ],
)
def test_secrets_and_pictures_never_leave(text: str, secret: str) -> None:
    assert secret not in redact(text)
    assert secret not in OutOfMemory(text).to_response(include_traceback=True)["error"]
    assert secret not in OutOfMemory(text).to_response(include_traceback=True)["traceback"]


def test_what_an_answer_says_is_bounded_and_can_be_sent() -> None:
    long = "\ud800" + "x y" * 2_000_000 + "hf_abcdefghij0123456789 the end"
    for error in (GenerationFailed(long), InternalError(long), InvalidRequest([Fault("width", long)] * 60)):
        try:
            raise error
        except WorkerError:
            answer = error.to_response(include_traceback=True)
        text = json.dumps(answer, ensure_ascii=False)
        text.encode()
        assert len(text) < 200_000
        assert len(answer["error"]) < 20_000
        assert len(answer["traceback"]) < 42_000
        assert answer["error"].startswith(f"{error.code}: ")
        assert "characters)" in answer["error"]
        assert "hf_abc" not in text


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), "out_of_memory"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "out_of_memory"),
        (RuntimeError("Failed to encode image: Out of memory".lower()), "out_of_memory"),
        (OSError("out of memory error when reading image file"), "out_of_memory"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "worker_unavailable"),
        (FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "out of memory.safetensors"), "worker_unavailable"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "worker_unavailable"),
        (OSError("encoder error -2 when writing image file"), "worker_unavailable"),
        (TimeoutError(), "worker_unavailable"),
        (RuntimeError("can't start new thread"), "worker_unavailable"),
        (RuntimeError("CUDA error: unspecified launch failure"), "device_failed"),
        (RuntimeError("something else"), None),
        (LookupError("can't start new thread"), None),
    ],
)
def test_what_an_error_says_of_the_machine(error: Exception, code: str | None) -> None:
    found = of_the_machine(error)
    assert (found and found.code) == code
    if code in ("out_of_memory", "worker_unavailable"):
        assert "send the request again" in str(found)


def test_faults_that_no_client_can_help_make_the_error_that_they_name() -> None:
    theirs, ours = Fault("width", "is odd"), WorkerFault("init_image", "had no room", "out_of_memory")
    assert refusal([theirs, ours]).code == "invalid_request"
    assert refusal([ours]).code == "out_of_memory"
    assert refusal([WorkerFault("lora_path", "is on a full disk")]).code == "adapter_unavailable"


def test_an_errors_frames_let_go_of_what_they_hold() -> None:
    def fail() -> None:
        held = [bytearray(8)]
        try:
            raise MemoryError
        except MemoryError as error:
            raise OutOfMemory(str(len(held))) from error

    with pytest.raises(OutOfMemory) as caught:
        fail()
    let_go(caught.value)
    trace = caught.value.__traceback__
    assert trace is not None
    assert trace.tb_next is not None
    assert trace.tb_next.tb_frame.f_locals == {}
    assert "in fail" in caught.value.to_response(include_traceback=True)["traceback"]


def test_the_log_names_no_field_that_a_client_made_up() -> None:
    refused = InvalidRequest(
        [UnknownField("a prompt", "is odd"), UnknownField("b", "is odd"), Fault("width", "is odd")]
    )
    assert refused.summary == "invalid_request: an unknown field, width"
    assert refused.to_response(include_traceback=False)["errors"][0]["field"] == "a prompt"
