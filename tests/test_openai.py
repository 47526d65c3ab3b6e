"""OpenAI's real client against web.py, and through RunPod's proxy against the real worker; what calls mean; errors."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import requests
from PIL import Image

from handler import answer, get_engine, get_settings, handler, respond
from src.catalog import MODELS, SPEEDS, get_model
from src.errors import OutOfMemory, WorkerError
from src.job import Job
from src.plan.plan import make_plan
from src.request.openai import asked_quality, is_name_of, own_call
from src.request.reading import read_request
from src.response.openai import http_status, in_openai_form
from src.web.local import LocalEndpoint
from src.web.openai import read_text
from tests.conftest import base64_of
from tests.runpod_stand_in import ENDPOINT, StandIn, worker
from tests.served import served

PROMPT = "a red circle on a blue background"
WEB, PROXY = "web.py", "RunPod's proxy"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(LocalEndpoint(answer)) as address:
        yield address


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address for OpenAI's clients of an endpoint whose worker is handler.py under the real SDK."""
    held = StandIn()
    with worker(held, tmp_path_factory.mktemp("worker") / "log"):
        yield f"http://127.0.0.1:{held.port}/v2/{ENDPOINT}/openai"
    held.close()


@pytest.fixture(params=[WEB, PROXY])
def client(request: pytest.FixtureRequest) -> openai.OpenAI:
    address = request.getfixturevalue("url" if request.param == WEB else "proxy")
    return openai.OpenAI(base_url=f"{address}/v1", api_key="a key of nobody", max_retries=0)


@pytest.fixture
def web(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="a key of nobody", max_retries=0)


def picture(text: str | None) -> Image.Image:
    assert text is not None
    return Image.open(io.BytesIO(base64.b64decode(text)))


def file_of(image: Image.Image, name: str = "picture.png") -> tuple[str, bytes]:
    return name, base64.b64decode(base64_of(image))


def drawn(**fields: Any) -> str:
    """What the handler draws of this request, in base64."""
    return str(handler({"input": {"prompt": PROMPT, **fields}})["images"][0])


def call(fields: Any, route: str = "/v1/images/generations") -> Any:
    return handler({"id": "call", "input": {"openai_route": route, "openai_input": fields}})


def error_of(answered: Any) -> dict[str, Any]:
    assert set(answered) == {"error"}
    error: dict[str, Any] = json.loads(answered["error"])
    return error


# The real client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["flux-shapes"]
    assert client.models.retrieve("flux").id == "flux-shapes"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-image-2")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_pictures_are_those_of_the_handler(client: openai.OpenAI) -> None:
    found = client.images.generate(
        model="flux-shapes", prompt=PROMPT, n=2, size="64x128", quality="medium", extra_body={"seed": 7}
    )
    assert found.data is not None
    assert [one.b64_json for one in found.data] == [
        drawn(seed=seed, width=64, height=128, speed="balanced") for seed in (7, 8)
    ]
    assert [one.model_extra for one in found.data] == [{"seed": 7}, {"seed": 8}]
    assert (found.size, found.quality, found.output_format, found.background) == ("64x128", "medium", "png", "opaque")
    assert found.usage is not None
    assert (found.usage.input_tokens, found.usage.output_tokens, found.usage.total_tokens) == (64, 64, 128)
    assert found.model_extra == {"model": "flux-shapes", "warnings": []}


@pytest.mark.parametrize(
    ("asked", "own"),
    [
        ({}, {}),
        ({"size": "auto", "quality": "auto", "background": "opaque", "response_format": "b64_json"}, {}),
        ({"quality": "hd"}, {}),
        ({"quality": "low"}, {"speed": "fast"}),
        ({"quality": "low", "extra_body": {"speed": "exact", "num_inference_steps": 4}}, {"num_inference_steps": 4}),
        ({"output_format": "webp", "output_compression": 60}, {"output_format": "WEBP", "output_quality": 60}),
        ({"output_format": "jpeg"}, {"output_format": "JPEG"}),
    ],
)
def test_what_is_asked_of_openai_is_asked_of_us(web: openai.OpenAI, asked: dict[str, Any], own: dict[str, Any]) -> None:
    extra = {"seed": 3, **asked.get("extra_body", {})}
    found = web.images.generate(prompt=PROMPT, **{**asked, "extra_body": extra})
    assert found.data is not None
    assert found.data[0].b64_json == drawn(seed=3, **own)


def test_what_has_no_effect_is_warned_of(client: openai.OpenAI) -> None:
    found = client.images.generate(prompt=PROMPT, user="me", style="vivid", moderation="low", size="64x64")
    assert found.model_extra is not None
    assert [warning.split()[0] for warning in found.model_extra["warnings"]] == ["moderation", "style", "user"]


def test_an_edit_with_a_mask_leaves_what_is_opaque_as_it_was(web: openai.OpenAI) -> None:
    image = picture(drawn(seed=1)).convert("RGB")
    mask = Image.new("RGBA", image.size, "black")
    mask.paste((0, 0, 0, 0), (32, 32, 96, 96))
    found = web.images.edit(
        image=file_of(image), mask=file_of(mask), prompt="a green square on a blue background", extra_body={"seed": 2}
    )
    assert found.data is not None
    before, after = np.asarray(image), np.asarray(picture(found.data[0].b64_json))
    inside = np.zeros(before.shape[:2], bool)
    inside[32:96, 32:96] = True
    assert (before[~inside] == after[~inside]).all()
    assert (before[inside] != after[inside]).any()
    assert found.usage is not None
    assert found.usage.input_tokens_details.image_tokens == 64


def test_an_edit_through_the_queue_is_json(proxy: str) -> None:
    image, mask = drawn(seed=1), Image.new("RGBA", (128, 128), "black")
    mask.paste((0, 0, 0, 0), (32, 32, 96, 96))
    for start in ({"image": image}, {"images": [{"image_url": f"data:image/png;base64,{image}"}]}):
        fields: dict[str, Any] = {**start, "mask": base64_of(mask), "prompt": "a green square", "seed": 2}
        (found,) = requests.post(f"{proxy}/v1/images/edits", json=fields, timeout=60).json()["data"]
        assert picture(found["b64_json"]).crop((0, 0, 128, 32)).tobytes() == (
            picture(image).crop((0, 0, 128, 32)).tobytes()
        )


def test_an_edit_without_a_mask_starts_from_the_picture(web: openai.OpenAI) -> None:
    image = picture(drawn(seed=1)).convert("RGB")
    found = web.images.edit(image=file_of(image), prompt=PROMPT, n=2, extra_body={"seed": 2, "strength": 0.5})
    assert found.data is not None
    assert found.data[0].b64_json == drawn(seed=2, init_image=base64_of(image), strength=0.5)


def test_a_stream_shows_pictures_on_their_way(web: openai.OpenAI) -> None:
    for events in (
        web.images.generate(
            prompt=PROMPT, stream=True, partial_images=2, extra_body={"num_inference_steps": 100, "seed": 1}
        ),
        web.images.edit(
            image=file_of(picture(drawn(seed=1))), prompt=PROMPT, stream=True, partial_images=1,
            extra_body={"num_inference_steps": 100, "seed": 1},
        ),
    ):  # fmt: skip
        *partial, done = list(events)
        kind = done.type.partition(".")[0]
        assert [event.type for event in partial] == [f"{kind}.partial_image"] * len(partial)
        assert done.type == f"{kind}.completed"
        assert len(partial) >= 1
        for i, event in enumerate(partial):
            assert event.model_dump()["partial_image_index"] == i
            shown = picture(event.b64_json)
            assert (f"{shown.width}x{shown.height}", shown.format) == (event.size, "JPEG")
        assert done.type != "image_generation.completed" or done.b64_json == drawn(seed=1, num_inference_steps=100)
        assert done.model_dump()["usage"]["output_tokens"] == 64


def test_a_stream_of_several_pictures_ends_with_each(web: openai.OpenAI) -> None:
    events = list(web.images.generate(prompt=PROMPT, stream=True, n=2, size="64x64"))
    assert [event.type for event in events] == ["image_generation.completed"] * 2
    assert [event.model_dump()["usage"]["output_tokens"] for event in events] == [16, 16]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"size": "63x64"}, "size"),
        ({"n": 9}, "n"),
        ({"quality": "lowest"}, "quality"),
        ({"background": "transparent"}, "background"),
        ({"response_format": "url"}, "response_format"),
        ({"response_format": "gif"}, "response_format"),
        ({"output_format": "gif"}, "output_format"),
        ({"output_format": "jpeg", "output_compression": 101}, "output_compression"),
        ({"prompt": ""}, "prompt"),
        ({"extra_body": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"extra_body": {"who_knows": 1}}, "who_knows"),
        ({"extra_body": {"loras": [{"path": "../x"}]}}, "loras.0"),
    ],
)
def test_a_bad_request_names_its_field(client: openai.OpenAI, asked: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**{"prompt": PROMPT, **asked})
    error = caught.value
    assert (error.code, error.type) == ("invalid_request", "invalid_request_error")
    assert error.param in (param, param.partition(".")[0])
    assert param.partition(".")[0] in error.message


def test_all_faults_come_at_once(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, size="7x7", n=0, background="transparent")
    assert isinstance(caught.value.body, dict)
    assert {error["field"] for error in caught.value.body["errors"]} == {"size", "n", "background"}


def test_a_model_that_is_not_served_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(model="dall-e-3", prompt=PROMPT)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert "flux-shapes" in caught.value.message


def test_a_route_that_is_not_served_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.embeddings.create(model="flux", input="x")
    assert caught.value.code == "unknown_url"


def test_a_stream_is_refused_before_it_begins(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, stream=True, size="1x1")
    assert caught.value.param in ("size", "stream")


def test_the_queue_gives_no_stream(proxy: str) -> None:
    through = openai.OpenAI(base_url=f"{proxy}/v1", api_key="x", max_retries=0)
    with pytest.raises(openai.BadRequestError, match=r"stream: is not possible through RunPod's queue"):
        through.images.generate(prompt=PROMPT, stream=True)


def test_the_token_is_the_api_key() -> None:
    with served(LocalEndpoint(answer), token="a-token-of-mine") as url:
        assert openai.OpenAI(base_url=f"{url}/v1", api_key="a-token-of-mine").models.list().data[0].id == "flux-shapes"
        with pytest.raises(openai.AuthenticationError) as caught:
            openai.OpenAI(base_url=f"{url}/v1", api_key="another").models.list()
        assert caught.value.code == "invalid_api_key"


def test_variations_say_what_to_use_instead(web: openai.OpenAI) -> None:
    with (
        pytest.warns(DeprecationWarning, match="deprecated"),
        pytest.raises(openai.NotFoundError, match="/v1/images/edits"),
    ):
        web.images.create_variation(image=file_of(Image.new("RGB", (64, 64))))


# Forms


def form(url: str, fields: list[tuple[str, Any]], **files: bytes) -> requests.Response:
    parts = [(name, (None, value) if isinstance(value, str) else ("x.png", value)) for name, value in fields]
    return requests.post(f"{url}/v1/images/edits", files=parts, timeout=60)


PNG = base64.b64decode(base64_of(Image.new("RGB", (64, 64), "red")))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ([("prompt", "x")], "image"),
        ([("prompt", "x"), ("image", b"")], "image"),
        ([("prompt", "x"), ("image", b"GIF89a, of which more follows")], "image"),
        ([("prompt", "x"), ("image", PNG), ("mask", PNG[:40])], "mask"),
        ([("prompt", "x"), ("prompt", "y"), ("image", PNG)], "prompt"),
        ([("prompt", "x"), ("image", PNG), ("image", "https://x.example")], "image"),
        ([("prompt", "x"), ("image", PNG), ("mask", PNG), ("mask", PNG)], "mask"),
        ([("prompt", "x"), ("image", PNG), ("n", "two")], "n"),
        ([("prompt", "x"), ("image", PNG), ("n", "9" * 6_000)], "n"),
        ([("prompt", "x"), ("image", PNG), ("seed", "NaN")], "seed"),
        ([("prompt", "x"), ("image", PNG), ("stream", "maybe")], "stream"),
        ([("prompt", "x"), ("image[]", PNG), ("image[]", PNG)], "image"),
        ([("prompt", "x"), ("image", PNG), ("svg[model]", "x")], "'svg[model]'"),
    ],
)
def test_a_form_that_is_wrong_names_its_field(url: str, fields: list[tuple[str, Any]], param: str) -> None:
    answered = form(url, fields)
    assert answered.status_code == 400
    assert answered.headers["x-should-retry"] == "false"
    error = answered.json()["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
    assert param in (error["param"], error["errors"][0]["field"] if "errors" in error else ""), error


def test_masks_of_other_shapes_and_animations_are_refused(url: str) -> None:
    wide = base64.b64decode(base64_of(Image.new("RGBA", (128, 64))))
    assert form(url, [("prompt", "x"), ("image", PNG), ("mask", wide)]).json()["error"]["param"] == "mask"
    frames, animated = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")], io.BytesIO()
    frames[0].save(animated, "WEBP", save_all=True, append_images=frames[1:])
    error = form(url, [("prompt", "x"), ("image", animated.getvalue())]).json()["error"]
    assert "is animated" in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"--x", b"--x\r\nContent-Disposition: form-data; name=\"a\"\r\n\r\n", b"\0" * 1_000,
     b"".join(b"--x\r\nContent-Disposition: form-data; name=\"%d\"\r\n\r\n1\r\n" % i for i in range(300)) + b"--x--"],
)  # fmt: skip
def test_a_form_that_cannot_be_read_is_refused(url: str, body: bytes) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answered = requests.post(f"{url}/v1/images/edits", data=body, headers=headers, timeout=60)
    assert answered.status_code == 400
    assert answered.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data", "application/x-www-form-urlencoded"])
def test_a_form_must_say_what_it_is(url: str, kind: str) -> None:
    answered = requests.post(f"{url}/v1/images/edits", data=b"x", headers={"Content-Type": kind}, timeout=60)
    assert answered.status_code in (400, 415)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("n", "2", 2), ("stream", "true", True), ("seed", "-1", -1), ("prompt", "2", "2"), ("prompt", "[", "["),
        ("strength", "0.5", 0.5), ("preserve_unmasked", "false", False), ("output_compression", "80", 80),
        ("loras", '[{"path": "a/b"}]', [{"path": "a/b"}]), ("who_knows", "1", "1"), ("size", "64x64", "64x64"),
    ],
)  # fmt: skip
def test_texts_of_a_form_are_what_their_fields_take(name: str, text: str, value: object) -> None:
    assert read_text(name, text) == value


# What calls mean


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_every_quality_of_every_model_can_be_drawn(model: Any) -> None:
    assert {"low", "medium", "high"} == set(model.qualities)
    work = []
    for quality, row in model.qualities.items():
        fields = {"prompt": "x", "quality": quality}
        event = {"input": {"openai_route": "/v1/images/generations", "openai_input": fields}}
        needs = {name: base64_of(Image.new("RGB", (64, 64))) for name in model.base.needs}
        own = own_call({"input": {**event["input"], "openai_input": {**fields, **needs}}}, lambda: model)
        assert (own.faults, asked_quality(event, model)) == ((), quality)
        request, faults, _ = read_request(own.event)
        assert faults == ()
        assert request.speed in SPEEDS
        steps = request.num_inference_steps or model.num_inference_steps
        assert steps <= model.num_inference_steps
        work.append((steps, row.speed is None))
    assert work == sorted(work)
    assert work[-1] == (model.num_inference_steps, True)


def test_names_of_a_model() -> None:
    dev, shapes = get_model("FLUX.1-dev"), get_model("flux-shapes")
    for name in ("FLUX.1-dev", "flux.1-dev", "black-forest-labs/FLUX.1-dev", "flux", "flux-1-dev", "FLUX.1", "flux 1"):
        assert is_name_of(name, dev), name
    for name in ("FLUX.1-schnell", "FLUX.1-Krea-dev", "dev", "flu", "", "/", "gpt-image-2", "FLUX.1-dev-fp8", "-"):
        assert not is_name_of(name, dev), name
    assert is_name_of("flux", shapes)


@pytest.mark.parametrize("fields", [None, [], "x", 5, True])
def test_an_input_that_is_no_object_is_refused(fields: object) -> None:
    error = error_of(call(fields))
    assert (error["param"], error["code"]) == ("openai_input", "invalid_request")


@pytest.mark.parametrize("route", ["/v1/chat/completions", "", "/v1/images", 5, ["/v1/models"], {}, "x" * 10_000])
def test_a_route_that_is_none_of_ours_is_refused(route: Any) -> None:
    error = error_of(call({"prompt": "x"}, route))
    assert (error["param"], error["code"]) == ("openai_route", "unknown_url")
    assert http_status(error) == 404
    assert len(error["message"]) < 500


@pytest.mark.parametrize("partial", [-1, 4, 1.5, "2", True, [1]])
def test_partial_images_are_few(partial: object) -> None:
    assert error_of(call({"prompt": "x", "partial_images": partial}))["param"] == "partial_images"


def test_a_dry_run_and_a_request_of_our_own() -> None:
    (planned,) = call({"prompt": PROMPT, "dry_run": True, "quality": "medium"})
    assert planned["data"] == []
    assert planned["plan"]["speed"] == "balanced"
    assert handler({"input": {"openai_route": None, "prompt": PROMPT, "dry_run": True}})["status"] == "success"


def test_odd_values_never_raise() -> None:
    values: tuple[Any, ...] = (None, 5, "x", [], {}, [[]], {"a": {}}, True, 1e300, "\ud800")
    for value in values:
        for name in (
            "model",
            "quality",
            "size",
            "n",
            "image",
            "images",
            "mask",
            "background",
            "response_format",
            "stream",
        ):
            answered = call({"prompt": "x", "dry_run": True, name: value}, "/v1/images/edits")
            assert isinstance(answered, list) or error_of(answered)["message"]


class FakeBucket:
    """Takes files, and has an address for each."""

    brought = False

    def __init__(self, no_links: str = "") -> None:
        self.no_links = no_links
        self.files: list[bytes] = []

    def upload(self, file: bytes, name: str, mime: str) -> str:
        self.files.append(file)
        return f"https://bucket.example/{name}"


def with_bucket(bucket: Any, **fields: Any) -> Any:
    event = {
        "id": "x",
        "input": {"openai_route": "/v1/images/generations", "openai_input": {"prompt": PROMPT, **fields}},
    }
    answered = respond(event, Job("x"), get_settings, get_engine, lambda: bucket)
    return in_openai_form(event, answered, lambda: get_engine().model)


def test_pictures_go_where_they_are_asked_for() -> None:
    for asked in ({}, {"response_format": "url"}):
        bucket = FakeBucket()
        (one,) = with_bucket(bucket, seed=3, **asked)[0]["data"]
        assert one == {"url": "https://bucket.example/x/3.png", "seed": 3}
        assert len(bucket.files) == 1
    bucket = FakeBucket()
    (one,) = with_bucket(bucket, seed=3, response_format="b64_json")[0]["data"]
    assert (one["b64_json"], bucket.files) == (drawn(seed=3), [])
    for none in (None, FakeBucket("it is private")):
        assert error_of(with_bucket(none, response_format="url"))["param"] == "response_format"


def test_every_error_has_a_status_and_a_type() -> None:
    event = {"input": {"openai_route": "/v1/images/generations", "openai_input": {}}}
    for kind in WorkerError.__subclasses__():
        failure = kind([]) if kind.code == "invalid_request" else kind("a sentence: of two parts")  # type: ignore[arg-type]
        answered = in_openai_form(event, failure.to_response(include_traceback=True), lambda: get_model("flux-shapes"))
        assert set(answered) <= {"error", "refresh_worker"}
        error = json.loads(answered["error"])
        assert error["code"] == kind.code
        assert (error["type"] == "invalid_request_error") == (http_status(error) < 500)
        assert kind.code == "invalid_request" or error["message"] == "a sentence: of two parts"


def test_a_client_tries_again_where_that_may_help_alone() -> None:
    tries: list[object] = []

    def short(event: object, job: Job) -> Any:
        tries.append(event)
        if len(tries) == 3:
            return answer(event, job)
        failure = OutOfMemory("too little").to_response(include_traceback=False)
        return in_openai_form(event, failure, lambda: get_model("flux-shapes"))

    with served(LocalEndpoint(short)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=2)
        assert client.models.list().data
        assert len(tries) == 3


def test_a_client_that_goes_away_is_not_drawn_for(url: str) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 100, "n": 4}
    mores: tuple[dict[str, Any], ...] = ({}, {"stream": True, "partial_images": 3})
    for more in mores:
        with pytest.raises(requests.exceptions.Timeout):
            requests.post(f"{url}/v1/images/generations", json={**body, **more}, timeout=0.5).content  # noqa: B018
        with requests.post(
            f"{url}/v2/local/runsync", json={"input": {"prompt": "x", "width": 64, "height": 64}}, timeout=60
        ) as after:
            assert after.json()["delayTime"] < 3_000


def test_the_plan_of_a_call_is_the_plan_of_its_request() -> None:
    model = get_model("FLUX.1-dev")
    event = {"input": {"openai_route": "/v1/images/generations", "openai_input": {
        "prompt": "x", "size": "1536x1024", "n": 2, "quality": "low", "seed": 1, "output_format": "webp",
        "output_compression": 50,
    }}}  # fmt: skip
    request, faults, warnings = read_request(own_call(event, lambda: model).event)
    plan = make_plan(request, faults, model, max_pixels=2048 * 2048, warnings=warnings)
    assert (plan.sampling.width, plan.sampling.height, len(plan.seeds)) == (1536, 1024, 2)
    assert (plan.sampling.num_inference_steps, plan.sampling.speed) == (20, "fast")
    assert (plan.sampling.output_format, plan.sampling.output_quality, plan.warnings) == ("WEBP", 50, ())


def test_the_log_of_a_worker_has_a_line_for_each_call(tmp_path: Path) -> None:
    held = StandIn()
    with worker(held, tmp_path / "log") as process:
        (job,) = held.wait(held.submit(openai_route="/v1/images/generations", openai_input={"prompt": "a secret wish"}))
        (failed,) = held.wait(held.submit(openai_route="/v1/images/generations", openai_input={"prompt": "x", "n": 9}))
        assert (job.status, failed.status) == ("COMPLETED", "FAILED")
        assert isinstance(failed.results[0][1]["error"], str)
        lines = {line.get("job"): line for line in process.lines() if "outcome" in line}
        assert (lines[job.id]["outcome"], lines[failed.id]["outcome"]) == ("success", "invalid_request")
        assert "a secret wish" not in process.text()
    held.close()
