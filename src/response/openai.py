"""A worker's answers in the form of OpenAI's API, errors too.

What stands there beside OpenAI's own: `warnings`, `model` and each picture's `seed`; in an error `errors`, one a field.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from src.catalog import FORMATS, Model
from src.request.openai import EDITS, MODELS, asked_quality, openai_input, openai_name, openai_route

_TOKEN = 16  # pixels on each side that FLUX reads and draws as one token
# The status of HTTP that goes with a code of errors.py; 500 where there is none.
_STATUSES: Mapping[str, HTTPStatus] = {
    "invalid_request": HTTPStatus.BAD_REQUEST,
    "response_too_large": HTTPStatus.BAD_REQUEST,
    "model_not_found": HTTPStatus.NOT_FOUND,
    "unknown_url": HTTPStatus.NOT_FOUND,
    "timed_out": HTTPStatus.GATEWAY_TIMEOUT,
    "out_of_memory": HTTPStatus.SERVICE_UNAVAILABLE,
    "worker_unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "adapter_unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "model_unavailable": HTTPStatus.SERVICE_UNAVAILABLE,
    "cancelled": HTTPStatus.SERVICE_UNAVAILABLE,
}
# A fault of these fields has a code of OpenAI's.
_CODES: Mapping[str, str] = {"model": "model_not_found", "openai_route": "unknown_url"}


def http_status(error: Mapping[str, Any]) -> int:
    """The status of HTTP that goes with an error in OpenAI's form."""
    return int(_STATUSES.get(str(error.get("code")), HTTPStatus.INTERNAL_SERVER_ERROR))


def in_openai_form(event: object, answered: dict[str, Any], model: Callable[[], Model]) -> Any:
    """`answered` as OpenAI answers the call in `event`; as it is where that is none.

    RunPod takes a POST's answer out of a list of one, and a GET's as it is. An error is OpenAI's object as JSON: RunPod
    has room for text alone, and the job has failed. `model` is asked for after a success alone.
    """
    route = openai_route(event)
    if route is None:
        return answered
    if answered["status"] == "error":
        failed = {"error": json.dumps(openai_error(event, answered))}
        return failed | {name: answered[name] for name in ("refresh_worker",) if name in answered}
    if not route.startswith(MODELS):
        return [_images(event, route, answered, model())]
    row = {"id": model().name, "object": "model", "created": int(time.time()), "owned_by": "flux-worker"}
    return {"object": "list", "data": [row]} if route == MODELS else row


def openai_error(event: Any, answered: Mapping[str, Any]) -> dict[str, Any]:
    """The object of an error; `param` is the first field that is wrong, under the name that it came by."""
    code, message = answered["error_code"], answered["error"].partition(": ")[2]
    errors = [{**error, "field": openai_name(event, error["field"])} for error in answered.get("errors", ())]
    if errors:
        code = _CODES.get(errors[0]["field"], code)
        message = "; ".join(f"{error['field']}: {error['message']}".removeprefix(": ") for error in errors)
    error: dict[str, Any] = {"message": message, "type": "server_error", "param": None, "code": code}
    if http_status(error) < HTTPStatus.INTERNAL_SERVER_ERROR:
        error["type"] = "invalid_request_error"
    if errors:
        error |= {"param": errors[0]["field"] or None, "errors": errors}
    return error


def _images(event: Any, route: str, answered: Mapping[str, Any], model: Model) -> dict[str, Any]:
    created = int(time.time())
    if "metadata" not in answered:  # a dry run
        return {"created": created, "data": [], **{name: answered[name] for name in answered if name != "status"}}
    metadata = answered["metadata"]
    none = [None] * len(metadata["seeds"])
    images, urls = answered.get("images", none), answered.get("image_urls", none)
    return {
        "created": created,
        "background": "opaque",
        "data": [
            {**({"b64_json": image} if image is not None else {"url": url}), **revised, "seed": seed}
            for image, url, revised, seed in zip(images, urls, _revised(metadata), metadata["seeds"], strict=True)
        ],
        "output_format": FORMATS[metadata["output_format"]].suffix,
        "quality": asked_quality(event, model),
        "size": f"{metadata['width']}x{metadata['height']}",
        "usage": _usage(metadata, _started_from(event) if route == EDITS else 0),
        "model": metadata["model"],
        "warnings": metadata["warnings"],
    }


def _revised(metadata: Mapping[str, Any]) -> list[dict[str, str]]:
    """What OpenAI says of each picture whose prompt was written anew."""
    count, upsampled = len(metadata["seeds"]), metadata["upsampled_prompt"]
    if upsampled is None:
        return [{}] * count
    return [{"revised_prompt": text} for text in ([upsampled] * count if isinstance(upsampled, str) else upsampled)]


def _started_from(event: Any) -> int:
    """How many pictures a call sends to start from."""
    given = openai_input(event)
    found = [given[name] for name in ("image", "images", "init_image", "init_images") if given.get(name) is not None]
    return sum(len(value) if isinstance(value, (list, tuple)) else 1 for value in found)


def _usage(metadata: Mapping[str, Any], started_from: int) -> dict[str, Any]:
    """What the model reads and draws, in its own tokens: text as it is padded, pictures as they are drawn."""
    pictures, text = len(metadata["seeds"]), metadata["prompt_tokens"]
    image = -(-metadata["width"] // _TOKEN) * -(-metadata["height"] // _TOKEN)
    read, drawn = image * started_from * pictures, image * pictures
    return {
        "input_tokens": text + read,
        "input_tokens_details": {"text_tokens": text, "image_tokens": read},
        "output_tokens": drawn,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
        "total_tokens": text + read + drawn,
    }
