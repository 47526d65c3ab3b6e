from __future__ import annotations

import pytest

from src import errors
from src.errors import DeviceFailed, Fault, InvalidRequest, OutOfMemory, WorkerError, redact


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
