"""The page in a browser, in front of web.py with the shipped model."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from src.catalog import EVERY_MODE_TAKES, MODELS
from src.outputs import Loaded
from src.request.schema import MAX_PROMPT_CHARACTERS, Request
from src.response.describe import describe
from src.settings import ROOT, Settings
from tests.browser import PATIENCE, READY, Server, Tab, find_axe, launched, opened_tab, serving, wait_until

pytestmark = pytest.mark.slow

expect.set_options(timeout=PATIENCE * 1000)
SLOW = {"num_inference_steps": 100, "width": 640, "height": 640}  # half a minute on two cores
DESK, PHONE = {"width": 1280, "height": 860}, {"width": 360, "height": 740}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(browser: Browser) -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture
def tab(browser: Browser, server: Server) -> Iterator[Tab]:
    with opened_tab(browser, server.url, viewport=DESK, permissions=["clipboard-read", "clipboard-write"]) as tab:
        tab.open()
        yield tab
        stop_all(tab.page)


def stop_all(page: Page) -> None:
    """No test waits for what another one left."""
    for stop in page.locator(".job button:text-is('Stop')").all():
        stop.click()
    expect(page.locator(".job:not(.stopped, .failed)")).to_have_count(0)


def sent(tab: Tab, action: Any) -> dict[str, Any]:
    """The request that `action` sends."""
    with tab.page.expect_request(lambda request: request.url.endswith("/run")) as request:
        action()
    fields: dict[str, Any] = json.loads(request.value.post_data or "")["input"]
    return fields


def start_from_the_picture(tab: Tab) -> None:
    """The latest one."""
    tab.page.locator(".tile").first.get_by_role("button", name="As start").click()
    expect(tab.page.locator("[data-field=init_image] .chosen img")).to_be_visible()


def pixels(file: bytes | str) -> NDArray[np.uint8]:
    content = base64.b64decode(file) if isinstance(file, str) else file
    with Image.open(io.BytesIO(content)) as picture:
        return np.asarray(picture.convert("RGB"))


def file_of(picture: Image.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, format)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    return Image.frombytes("RGB", (width, height), random.Random(0).randbytes(width * height * 3))


def test_a_prompt_becomes_a_picture_with_progress_and_previews(tab: Tab) -> None:
    expect(tab.page.locator("#empty")).to_be_visible()
    request = sent(tab, lambda: tab.draw("a red star on a blue background", **SLOW))
    assert request == {"prompt": "a red star on a blue background", **SLOW, "preview": True}
    job = tab.page.locator(".job")
    expect(job.locator(".line")).to_have_text(re.compile(r"Drawing · step \d+ of 100 · [\d.]+ s left"))
    expect(job.locator("img")).to_be_visible()
    early = float(job.locator("progress").get_attribute("value") or 0)
    wait_until(lambda: float(job.locator("progress").get_attribute("value") or 0) > early, "no progress")
    stop_all(tab.page)
    tab.draw("a red star on a blue background", seed=3, num_inference_steps="", width="", height="")
    tab.wait_for_pictures(1)
    expect(tab.page.locator("#empty")).to_be_hidden()
    assert pixels(tab.download()).shape == (128, 128, 3)


def test_a_job_stops_at_once(tab: Tab) -> None:
    tab.draw("a red star", **SLOW)
    job = tab.page.locator(".job")
    expect(job.locator(".line")).to_have_text(re.compile("step [1-9]"))
    left = float(re.findall(r"([\d.]+) s left", job.locator(".line").inner_text())[0])
    begun = time.monotonic()
    job.get_by_role("button", name="Stop").click()
    expect(job.locator(".line")).to_have_text("Stopped.")
    took = time.monotonic() - begun
    assert took < max(1.0, left / 4), f"stopped after {took:.1f} s, of {left:.1f} s"
    job.get_by_role("button", name="Edit").click()
    assert (tab.value("prompt"), tab.value("width")) == ("a red star", "640")
    job.get_by_role("button", name="Close").click()
    expect(job).to_have_count(0)


def test_several_wait_in_a_queue_and_each_says_where_it_is(tab: Tab) -> None:
    tab.draw("a red star", **SLOW)
    expect(tab.page.locator(".job .line").first).to_have_text(re.compile("Drawing"))
    tab.draw("a blue circle", num_inference_steps=8, width=128, height=128)
    tab.draw("a green square")
    lines = tab.page.locator(".job .line")
    expect(lines).to_have_text([re.compile("Drawing"), re.compile("queue|Waiting"), re.compile("queue|Waiting")])
    assert tab.page.title() == "(3) FLUX"
    tab.page.locator(".job").first.get_by_role("button", name="Stop").click()
    tab.wait_for_pictures(2)
    expect(tab.page.locator(".tile .prompt").first).to_have_text("a green square")


def test_four_pictures_are_a_grid_and_one_of_them_is_repeated_alone(tab: Tab) -> None:
    tab.draw("a green triangle on an orange background", num_images=4, seed=7)
    tab.wait_for_pictures(4)
    boxes = [each.bounding_box() for each in tab.page.locator(".tile .open").all()]
    assert len({round(box["x"]) for box in boxes if box}) == 2
    assert len({round(box["y"]) for box in boxes if box}) == 2
    third = tab.download(2)
    tab.page.locator(".tile .open").nth(2).click()
    tab.page.click("#viewer >> text=Again")
    assert (tab.value("seed"), tab.value("num_images")) == ("9", "")
    tab.page.click("#draw")
    tab.wait_for_pictures(5)
    assert tab.download(0) == third


def test_a_dropped_picture_is_repeated_byte_for_byte(tab: Tab) -> None:
    tab.draw("a large purple diamond", seed=11, width=192, scheduler="euler")
    tab.wait_for_pictures(1)
    first = tab.download()
    tab.clear()
    tab.drop(first, "11.png")
    expect(tab.page.locator("#question q")).to_have_text("a large purple diamond")
    tab.page.click("text=Draw it again")
    tab.wait_for_pictures(1)
    assert tab.download() == first
    tab.drop(first, "11.png")
    tab.page.click("text=Fill the form with its request")
    assert (tab.value("prompt"), tab.value("seed"), tab.value("width")) == ("a large purple diamond", "11", "192")


def test_a_dropped_picture_of_anyone_is_used_as_any_of_the_request(tab: Tab) -> None:
    tab.expects.append("422")  # it carries no request
    for text, name in (("Start from it", "init_image"), ("Use it as control", "control_image"),
                       ("Use it as image prompt", "image_prompt"), ("Use it as mask", "mask_image")):  # fmt: skip
        tab.drop(file_of(Image.new("RGB", (64, 96), "red")), "photo.png")
        expect(tab.page.locator("#question >> text=Draw it again")).to_have_count(0)
        tab.page.click(f"#question >> text={text}")
        expect(tab.page.locator(f"[data-field={name}] .about").first).to_contain_text("64x96")
    tab.fill(prompt="a star")
    request = sent(tab, lambda: tab.page.click("#draw"))
    assert {"init_image", "control_image", "image_prompt", "mask_image"} < request.keys()
    expect(tab.page.locator(".fault:visible, .failed").first).to_be_visible()  # no Redux here


def test_a_picture_from_a_picture_asks_for_that_again(tab: Tab) -> None:
    tab.draw("a red star", seed=1)
    tab.wait_for_pictures(1)
    start_from_the_picture(tab)
    tab.draw("a blue star", strength=0.8)
    tab.wait_for_pictures(2)
    tab.drop(tab.download(), "from.png")
    expect(tab.page.locator("#question")).to_contain_text("choose init_image again")
    expect(tab.page.locator("#question >> text=Draw it again")).to_have_count(0)
    tab.page.click("#question >> text=Fill the form")
    fault = tab.page.locator("[data-field=init_image] .fault")
    expect(fault).to_have_text("must be chosen again: files do not carry it")
    assert tab.value("strength") == "0.8"


@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_outside_of_a_painted_mask_nothing_changes(tab: Tab, by: str) -> None:
    tab.draw("a yellow circle on a green background", seed=5, width=192)
    tab.wait_for_pictures(1)
    start_from_the_picture(tab)
    tab.button("Paint a mask").click()
    if by == "mouse":
        box = tab.page.locator("#mask canvas").last.bounding_box()
        assert box
        tab.page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + box["height"] * 0.5)
        tab.page.mouse.down()
        tab.page.mouse.move(box["x"] + box["width"] * 0.6, box["y"] + box["height"] * 0.5, steps=5)
        tab.page.mouse.up()
    else:
        tab.page.keyboard.press("Space")
        tab.page.keyboard.press("ArrowRight")
        tab.page.keyboard.press("Space")
    tab.button("Use the mask").click()
    expect(tab.page.locator("[data-field=mask_image] .about")).to_contain_text("192x128")
    request = sent(tab, lambda: tab.draw("a red star on a green background", strength=1, seed=6))
    tab.wait_for_pictures(2)
    before, mask, after = pixels(request["init_image"]), pixels(request["mask_image"]), pixels(tab.download())
    assert mask.shape == before.shape == after.shape == (128, 192, 3)
    assert set(np.unique(mask)) == {0, 255}
    white = mask[..., 0] == 255
    assert 0.02 < white.mean() < 0.6
    assert (after[~white] == before[~white]).all()
    assert (after[white] != before[white]).any()


def test_what_a_brush_did_is_undone_erased_and_inverted(tab: Tab) -> None:
    def painted() -> float:
        share: float = tab.page.locator("#mask canvas").last.evaluate(
            """(canvas) => {
                const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
                let count = 0;
                for (let i = 3; i < data.length; i += 4) if (data[i] >= 128) count++;
                return count / (canvas.width * canvas.height);
            }"""
        )
        return share

    tab.draw("a red star", seed=1)
    tab.wait_for_pictures(1)
    start_from_the_picture(tab)
    tab.button("Paint a mask").click()
    tab.button("Use the mask").click()
    expect(tab.page.locator("#mask .fault")).to_have_text("Nothing is painted yet.")
    tab.page.locator("#mask canvas").last.focus()
    tab.page.keyboard.press("Space")
    dab = painted()
    assert dab > 0
    tab.button("Invert").click()
    assert painted() == pytest.approx(1 - dab, abs=0.03)  # the edge is soft
    tab.page.keyboard.press("Control+z")
    assert painted() == dab
    tab.page.get_by_label("Erase").check()
    tab.page.locator("#mask canvas").last.focus()
    tab.page.keyboard.press("Space")
    assert painted() < 0.1 * dab
    tab.button("Undo").click()
    assert painted() == dab
    tab.button("Clear").click()
    assert painted() == 0
    tab.page.keyboard.press("Escape")
    expect(tab.page.locator("#mask")).to_be_hidden()
    expect(tab.page.locator("[data-field=mask_image] .chosen")).to_be_hidden()


def test_borders_are_dragged_and_drawn(tab: Tab) -> None:
    tab.draw("a red star on a blue background", seed=2)
    tab.wait_for_pictures(1)
    start_from_the_picture(tab)
    handle = tab.page.locator(".handle.right")
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    assert box
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    tab.page.mouse.move(x, y)
    tab.page.mouse.down()
    tab.page.mouse.move(x + 30, y, steps=4)
    tab.page.mouse.up()
    right = int(tab.value("right"))
    assert right % 8 == 0
    assert right > 0
    tab.fill(top=16)
    expect(tab.page.locator("[data-field=outpaint]")).to_contain_text(f"128x128 becomes {128 + right}x144.")
    request = sent(tab, lambda: tab.draw("a red star on a blue background"))
    assert request["outpaint"] == {"right": right, "top": 16}
    tab.wait_for_pictures(2)
    after = pixels(tab.download())
    assert after.shape == (144, 128 + right, 3)
    assert (after[16:, :128] == pixels(request["init_image"])).all()


def test_faults_stand_at_their_fields(tab: Tab) -> None:
    tab.page.click("#draw")
    expect(tab.page.locator("[data-field=prompt] .fault")).to_have_text("must say what the picture shows")
    tab.draw("a red star", width=191)
    expect(tab.page.locator("[data-field=width] .fault")).to_contain_text("a multiple of 8 from 64 to 2048")
    tab.fill(width=192, aspect_ratio="16:9", sigmas="0.5, 0.9")
    tab.unfold("LoRA")
    tab.button("Add a LoRA").click()
    tab.page.locator("[data-field=path] input").fill("no/such/../file")
    tab.unfold("LoRA")
    for summary in tab.page.locator("details[open] > summary").element_handles():
        summary.click()
    tab.page.click("#draw")
    expect(tab.page.locator("[data-field=width] .fault")).to_contain_text("cannot be combined with aspect_ratio")
    expect(tab.page.locator("[data-field=sigmas] .fault")).to_contain_text("must fall from each to the next")
    expect(tab.page.locator("[data-field=loras] .fault:visible")).to_have_count(1)
    expect(tab.page.locator("[name=width]")).to_be_focused()
    expect(tab.page.locator("[name=width]")).to_have_attribute("aria-invalid", "true")
    expect(tab.page.locator("#faults")).to_contain_text("fields cannot be used as they are")
    tab.page.keyboard.press("Backspace")
    expect(tab.page.locator("[data-field=width] .fault")).to_be_hidden()
    expect(tab.page.locator(".job")).to_have_count(0)


def test_faults_are_found_in_the_one_sentence_that_runpod_passes_on(tab: Tab) -> None:
    error = "invalid_request: width: must be even; allowed: 8; loras.0.scale: is 9; nonsense: is no field"
    body = json.dumps({"id": "x", "status": "FAILED", "error": error})
    tab.unfold("LoRA")
    tab.button("Add a LoRA").click()
    tab.page.locator("[data-field=path] input").fill("a")
    tab.page.route("**/status/*", lambda route: route.fulfill(body=body, content_type="application/json"))
    tab.draw("a red star")
    expect(tab.page.locator("[data-field=width] .fault")).to_have_text("must be even; allowed: 8")
    expect(tab.page.locator("[data-field=scale] .fault")).to_have_text("is 9; nonsense: is no field")


def test_warnings_come_with_the_picture(tab: Tab) -> None:
    tab.draw("a red star and a blue circle " * 20)
    tab.page.locator(".warned").click()
    expect(tab.page.locator("#viewer .warning").first).to_contain_text("prompt has")


def test_an_adapter_of_the_folder_is_offered_and_used(tab: Tab) -> None:
    outline = "flux-shapes-outline/pytorch_lora_weights.safetensors"
    tab.unfold("LoRA")
    tab.button("Add a LoRA").click()
    offered = tab.page.locator("[data-field=loras] datalist option").evaluate_all(
        "(all) => all.map((one) => one.value)"
    )
    assert outline in offered
    tab.page.locator("[data-field=path] input").fill(outline)
    tab.fill(scale=1)
    request = sent(tab, lambda: tab.draw("a large red star on a blue background", seed=1))
    assert request["loras"] == [{"path": outline, "scale": 1}]
    tab.wait_for_pictures(1)
    assert tuple(pixels(tab.download())[64, 64])[2] > 150  # hollow: the background is in the middle
    tab.button("Again").click()
    assert tab.page.locator("[data-field=path] input").input_value() == outline


def test_the_keyboard_alone(tab: Tab) -> None:
    def tab_to(selector: str) -> None:
        for _ in range(60):
            tab.page.keyboard.press("Tab")
            if tab.page.locator(selector).first.evaluate("(node) => node === document.activeElement"):
                return
        raise AssertionError(f"no way to {selector}")

    tab_to("[name=prompt]")
    tab.page.keyboard.type("a red star")
    tab_to("summary >> text=Pictures and seed >> xpath=..")
    tab.page.keyboard.press("Enter")
    tab_to("[name=seed]")
    tab.page.keyboard.type("4")
    tab.page.keyboard.press("Control+Enter")
    tab.wait_for_pictures(1)
    tab_to(".tile .open")
    tab.page.keyboard.press("Enter")
    expect(tab.page.locator("#viewer")).to_be_visible()
    expect(tab.page.locator("#viewer dd").first).to_have_text("4")
    tab.page.keyboard.press("Escape")
    expect(tab.page.locator("#viewer")).to_be_hidden()
    expect(tab.page.locator(".tile .open")).to_be_focused()


def test_again_and_vary(tab: Tab) -> None:
    tab.draw("a red star", seed=41, guidance_scale=2)
    tab.wait_for_pictures(1)
    tab.page.click("#reset")
    assert (tab.value("prompt"), tab.value("seed")) == ("", "")
    varied = sent(tab, lambda: tab.button("Vary").click())
    assert varied == {"prompt": "a red star", "guidance_scale": 2, "seed": 42, "preview": True}
    tab.wait_for_pictures(2)
    assert tab.value("prompt") == ""
    tab.button("Again").nth(1).click()
    assert (tab.value("prompt"), tab.value("seed"), tab.value("guidance_scale")) == ("a red star", "41", "2")


def test_a_link_fills_the_form_and_leaves_pictures_out(tab: Tab) -> None:
    tab.draw("a red star & <b>100 %</b> #1", seed=8)
    tab.wait_for_pictures(1)
    start_from_the_picture(tab)
    tab.draw("a blue star", strength=0.7)
    tab.wait_for_pictures(2)
    for i, said in ((0, "It leaves out init_image"), (1, "Link copied.")):
        tab.page.locator(".tile .open").nth(i).click()
        tab.button("Copy as link").click()
        expect(tab.page.locator(".notice").last).to_contain_text(said)
        tab.page.keyboard.press("Escape")
    link = tab.page.evaluate("() => navigator.clipboard.readText()")
    tab.page.goto("about:blank")
    tab.page.goto(link)
    tab.page.wait_for_selector(READY)
    assert (tab.value("prompt"), tab.value("seed")) == ("a red star & <b>100 %</b> #1", "8")
    assert tab.page.url == tab.url
    tab.page.goto(f"{tab.url}#request=%7Bnonsense")
    expect(tab.page.locator(".notice.error")).to_have_text(re.compile("The link is damaged"))


def test_copied_commands_and_programs_make_the_same_file(tab: Tab, tmp_path: Path) -> None:
    tab.draw('it\'s "a" red star for $5 `x` \\n', seed=3)
    tab.wait_for_pictures(1)
    start_from_the_picture(tab)
    request = sent(tab, lambda: tab.draw("a blue star", strength=0.7, seed=4))
    tab.wait_for_pictures(2)
    (tmp_path / "init_image.png").write_bytes(base64.b64decode(request["init_image"]))
    for i, seed in ((0, 4), (1, 3)):
        wanted = tab.download(i)
        tab.page.locator(".tile .open").nth(i).click()
        tab.button("Copy as curl").click()
        expect(tab.page.locator(".notice").last).to_contain_text("Command copied.")
        command = tab.page.evaluate("() => navigator.clipboard.readText()")
        tab.button("Copy as Python").click()
        expect(tab.page.locator(".notice").last).to_contain_text("Program copied.")
        program = tab.page.evaluate("() => navigator.clipboard.readText()")
        tab.page.keyboard.press("Escape")
        if shutil.which("curl"):
            ran = subprocess.run(["/bin/sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
            assert base64.b64decode(json.loads(ran.stdout)["output"]["images"][0]) == wanted
        subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
        assert (tmp_path / f"{seed}.png").read_bytes() == wanted


def test_a_reload_keeps_pictures_and_open_jobs(tab: Tab) -> None:
    tab.draw("a red star", seed=1)
    tab.wait_for_pictures(1)
    first = tab.download()
    tab.draw("a blue circle", **SLOW)
    expect(tab.page.locator(".job .line")).to_have_text(re.compile("step [1-9]"))
    tab.page.reload()
    tab.page.wait_for_selector(READY)
    tab.wait_for_pictures(1)
    assert tab.download() == first
    expect(tab.page.locator(".job .prompt")).to_have_text("a blue circle")
    expect(tab.page.locator(".job .line")).to_have_text(re.compile("step [1-9]"))
    stop_all(tab.page)
    tab.page.reload()
    tab.page.wait_for_selector(READY)
    expect(tab.page.locator(".job")).to_have_count(0)


def test_pictures_are_deleted_one_by_one_and_all(tab: Tab) -> None:
    tab.draw("a red star", num_images=2, seed=1)
    tab.wait_for_pictures(2)
    tab.page.locator(".tile .open").first.click()
    tab.page.click("#viewer >> text=Delete")
    tab.wait_for_pictures(1)
    tab.page.locator(".tile .open").first.click()
    expect(tab.page.locator("#viewer dd").first).to_have_text("2")
    tab.page.keyboard.press("Escape")
    tab.button("Clear all").click()
    tab.page.keyboard.press("Escape")
    tab.wait_for_pictures(1)
    tab.clear()
    tab.page.reload()
    tab.page.wait_for_selector(READY)
    expect(tab.page.locator("#empty")).to_be_visible()


def test_the_oldest_pictures_go_when_there_are_too_many(tab: Tab) -> None:
    kept = tab.page.evaluate(
        """async () => {
            const { Store, MOST_PICTURES } = await import("/page/store.js");
            const store = await Store.open();
            const entry = (i, bytes = 10) => ({
                id: `entry-${i}`, created: i, request: { prompt: `${i}` }, bytes,
                metadata: { width: 8, height: 8, inference_time: 1, output_format: "PNG", seeds: [i], warnings: [] },
                pictures: [{ seed: i, blob: new Blob(["x"]), url: null }],
            });
            for (let i = 0; i < MOST_PICTURES + 5; i++) await store.put(entry(i));
            const many = (await store.all()).map(({ created }) => created);
            await store.put(entry(1000, 299999000));
            return [many, (await store.all()).map(({ created }) => created)];
        }"""
    )
    assert kept[0] == list(range(204, 4, -1))
    assert kept[1][0] == 1000
    assert len(kept[1]) < 110


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_fault(browser: Browser, server: Server, scheme: str) -> None:
    axe = find_axe()

    def check(what: str) -> None:
        found = page.evaluate("() => axe.run(document, { resultTypes: ['violations'] })")["violations"]
        bad = [
            f"{what}: {fault['id']}: {node['target']} {node['failureSummary']}"
            for fault in found
            if fault["impact"] in ("serious", "critical")
            for node in fault["nodes"]
        ]
        assert bad == []

    # The page's own policy lets no script in that is not the page's.
    with opened_tab(browser, server.url, viewport=DESK, color_scheme=scheme, bypass_csp=True) as tab:
        page = tab.page
        tab.open()
        page.add_script_tag(content=axe)
        check("empty")
        tab.draw("a red star", num_images=4, seed=1)
        tab.wait_for_pictures(4)
        start_from_the_picture(tab)
        tab.unfold_all()
        tab.button("Add a LoRA").click()
        tab.fill(width=192, aspect_ratio="1:1")
        tab.page.click("#draw")
        expect(tab.page.locator("[data-field=width] .fault")).to_be_visible()
        check("full, with a fault")
        tab.page.locator(".tile .open").first.click()
        check("one picture")
        tab.page.keyboard.press("Escape")
        tab.button("Paint a mask").click()
        check("mask")
        tab.page.keyboard.press("Escape")
        tab.button("Clear all").click()
        check("question")
        tab.page.keyboard.press("Escape")
        tab.page.click("#reset")
        tab.draw("a slow star", **SLOW)
        tab.page.click("#draw")
        expect(tab.page.locator(".job img:visible")).to_have_count(1)
        check("busy")
        stop_all(tab.page)
        check("stopped")


def test_a_phone(browser: Browser, server: Server) -> None:
    def check(what: str) -> None:
        wide = page.evaluate("() => document.documentElement.scrollWidth")
        assert wide <= PHONE["width"], what
        small = page.evaluate(
            """() => [...document.querySelectorAll("button, a.button, summary, select, input, label.choice, .handle")]
                .filter((node) => node.checkVisibility() && !node.matches("[type=checkbox], [type=radio]"))
                .filter((node) => node.getBoundingClientRect().height < 44)
                .map((node) => node.outerHTML.slice(0, 120))"""
        )
        assert small == [], what

    options = {"viewport": PHONE, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
    with opened_tab(browser, server.url, **options) as tab:
        page = tab.page
        tab.open()
        check("empty")
        tab.draw("a red star on a white background", num_images=4, seed=1)
        tab.wait_for_pictures(4)
        check("full")
        start_from_the_picture(tab)
        tab.unfold_all()
        check("unfolded")
        tab.page.locator(".tile .open").first.tap()
        check("one picture")
        assert tab.page.locator("#viewer").evaluate("(node) => node.scrollWidth <= node.clientWidth")
        tab.page.keyboard.press("Escape")
        tab.button("Paint a mask").tap()
        check("mask")
        canvas = tab.page.locator("#mask canvas").last
        canvas.tap()
        tab.button("Use the mask").tap()
        expect(tab.page.locator("[data-field=mask_image] .about")).to_contain_text("128x128")
        tab.draw("a slow star", **SLOW)
        expect(tab.page.locator(".job img")).to_be_visible()
        expect(tab.page.locator(".job")).to_be_in_viewport()
        check("busy")
        stop_all(tab.page)


def test_light_and_dark(tab: Tab) -> None:
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light = tab.page.evaluate(ground)
    tab.page.emulate_media(color_scheme="dark")
    dark = tab.page.evaluate(ground)
    assert light != dark
    tab.page.select_option("#theme", "light")
    assert tab.page.evaluate(ground) == light
    tab.page.reload()
    tab.page.wait_for_selector(READY)
    assert tab.page.evaluate(ground) == light
    tab.page.select_option("#theme", "")
    assert tab.page.evaluate(ground) == dark


def test_the_token(browser: Browser) -> None:
    with serving(WEB_TOKEN="correct-horse-battery") as server:
        with opened_tab(browser, server.url) as tab:
            tab.expects.append("401")
            tab.page.goto(tab.url)
            for token, said in (
                ("wrong-horse", "was started with a token"),
                ("correct-horse-battery", "does not take"),
            ):
                expect(tab.page.locator("#question")).to_contain_text(said)
                tab.page.keyboard.press("Escape")
                tab.page.fill("#token", token)
                tab.page.keyboard.press("Enter")
            tab.page.wait_for_selector(READY)
            tab.page.reload()
            tab.page.wait_for_selector(READY)
        with opened_tab(browser, server.url) as tab:
            tab.open("#token=correct-horse-battery")
            assert tab.page.url == tab.url


def test_a_server_that_dies_is_waited_for(browser: Browser) -> None:
    with serving() as server, opened_tab(browser, server.url) as tab:
        tab.expects += ["ERR_CONNECTION", "404", "ERR_EMPTY_RESPONSE", "ERR_SOCKET"]
        tab.open()
        tab.draw("a red star", **SLOW)
        expect(tab.page.locator(".job .line")).to_have_text(re.compile("step [1-9]"))
        server.kill()
        expect(tab.page.locator("#connection")).to_contain_text("The server does not answer. Trying again in")
        tab.page.click("#draw")
        expect(tab.page.locator(".failed .line")).to_have_text("The server does not answer.")
        with serving(server.port):
            expect(tab.page.locator(".failed .line").first).to_contain_text("does not know this job any more")
            expect(tab.page.locator("#connection")).to_be_empty()
            tab.fill(num_inference_steps=8, width=128, height=128)
            tab.page.click("#draw")
            tab.wait_for_pictures(1)


def test_hostile_words_are_words(tab: Tab) -> None:
    prompt = '<img src=x onerror="document.title=1"><script>document.title=2</script> \u202e ' + "&amp;"
    tab.draw(prompt, seed=1)
    tab.wait_for_pictures(1)
    expect(tab.page.locator(".tile .prompt")).to_have_text(prompt.strip())
    tab.page.locator(".tile .open").click()
    expect(tab.page.locator("#viewer h2")).to_have_text(prompt.strip())
    assert tab.page.locator("#viewer h2 *").count() == 0
    tab.drop(b"no picture", "<b>x</b>.png", target="#viewer")
    tab.page.keyboard.press("Escape")
    tab.drop(b"no picture", "<b>x</b>.png")
    expect(tab.page.locator(".notice.error p")).to_have_text("<b>x</b>.png is broken: its pixels cannot be read.")
    assert tab.page.title() == "FLUX"


def test_the_longest_prompt(tab: Tab) -> None:
    tab.draw("w" * MAX_PROMPT_CHARACTERS, seed=1)
    tab.wait_for_pictures(1)
    assert tab.page.evaluate("() => document.documentElement.scrollWidth") <= DESK["width"]
    tab.page.locator(".tile .open").click()
    expect(tab.button("Copy as link")).to_be_in_viewport()
    tab.button("Copy as link").click()
    link = tab.page.evaluate("() => navigator.clipboard.readText()")
    tab.page.goto("about:blank")
    tab.page.goto(link)
    tab.page.wait_for_selector(READY)
    assert len(tab.value("prompt")) == MAX_PROMPT_CHARACTERS
    tab.draw("w" * (MAX_PROMPT_CHARACTERS + 1))
    expect(tab.page.locator("[data-field=prompt] .fault")).to_contain_text(f"{MAX_PROMPT_CHARACTERS:,}")


def test_what_is_no_picture_is_refused_and_what_is_large_is_made_smaller(tab: Tab) -> None:
    tab.expects.append("422")
    tab.drop(b"words", "notes.txt", "text/plain")
    expect(tab.page.locator(".notice.error").last).to_contain_text("notes.txt is not a picture.")
    tab.drop(file_of(noise(64, 64))[:3000], "half.png")
    tab.drop(file_of(noise(64, 64))[:60], "broken.png")
    expect(tab.page.locator(".notice.error").last).to_contain_text("broken.png is broken")
    if tab.page.locator("#question").is_visible():  # what browsers show of half a file
        tab.page.keyboard.press("Escape")
    tab.drop(file_of(noise(2600, 2600), "BMP"), "large.bmp", "image/bmp")
    expect(tab.page.locator("#question")).to_contain_text("Made smaller for the way to the worker: it was 2600x2600")
    tab.page.click("#question >> text=Start from it")
    about = tab.page.locator("[data-field=init_image] .about")
    expect(about).to_contain_text("2048x2048")
    request = sent(tab, lambda: tab.draw("a star", num_inference_steps=1, strength=1, width=128, height=128))
    assert len(request["init_image"]) < 8e6
    tab.wait_for_pictures(1)


def test_a_double_click_draws_once(tab: Tab) -> None:
    tab.fill(prompt="a red star")
    tab.page.dblclick("#draw")
    tab.wait_for_pictures(1)
    expect(tab.page.locator(".job")).to_have_count(0)
    tab.wait_for_pictures(1)


def test_two_tabs_show_the_same_pictures(tab: Tab) -> None:
    with opened_tab(tab.page.context, tab.url) as other:
        other.open()
        tab.draw("a red star", num_images=2, seed=1)
        tab.wait_for_pictures(2)
        other.wait_for_pictures(2)
        other.draw("a blue star", **SLOW)
        expect(other.page.locator(".job .line")).to_have_text(re.compile("step [1-9]"))
        tab.page.reload()  # both follow the job
        tab.page.wait_for_selector(READY)
        expect(tab.page.locator(".job .prompt")).to_have_text("a blue star")
        stop_all(other.page)
        expect(tab.page.locator(".job .line")).to_have_text("Stopped.")
        tab.clear()
        other.wait_for_pictures(0)


def test_a_browser_that_keeps_nothing(browser: Browser, server: Server) -> None:
    with opened_tab(browser, server.url) as tab:
        tab.page.add_init_script(
            """for (const name of ["localStorage", "sessionStorage", "indexedDB"]) {
                Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });
            }"""
        )
        tab.open()
        tab.page.select_option("#theme", "dark")
        tab.draw("a red star", seed=1)
        tab.wait_for_pictures(1)
        expect(tab.page.locator("#kept")).to_contain_text("This browser keeps nothing")
        tab.draw("a blue star")
        tab.wait_for_pictures(2)
        assert pixels(tab.download(1)).shape == (128, 128, 3)


@pytest.mark.parametrize(
    "name", ["FLUX.1-dev", "FLUX.1-Kontext-dev", "FLUX.1-Fill-dev", "FLUX.1-Canny-dev", "FLUX.2-dev"]
)
def test_the_form_is_the_models(tab: Tab, name: str) -> None:
    model = next(row for row in MODELS if row.name == name)
    about = describe(model, None, Settings(model_name=name), Loaded((), (), {}))
    tab.page.route("**/status/*", lambda route: route.fulfill(json={"status": "COMPLETED", "output": about}))
    tab.page.reload()
    tab.page.wait_for_selector(READY)
    assert tab.page.locator("#model").inner_text() == name
    shown = set(tab.page.locator("[data-field]").evaluate_all("(all) => all.map((one) => one.dataset.field)"))
    taken = EVERY_MODE_TAKES.union(*(row.takes | row.needs for row in model.modes.values()))
    lists = {"controls"} if "control_image" in taken else {"init_images"} if name == "FLUX.2-dev" else set()
    assert shown & set(Request.model_fields) == (taken | lists) - {
        "describe", "dry_run", "preview", "lora_path", "lora_scale"
    }  # fmt: skip
    tab.unfold_all()
    visible = tab.page.locator(".field.picture:visible").evaluate_all("(all) => all.map((one) => one.dataset.field)")
    needed = {picture for row in model.modes.values() for picture in row.needs} - {"mask_image"}
    assert needed <= set(visible)
    assert "mask_image" not in visible  # until there is what it lies over
    tab.drop(file_of(Image.new("RGB", (64, 64))), "a.png", target="[data-field=init_image]")
    if "mask_image" in taken:
        expect(tab.page.locator("[data-field=mask_image]")).to_be_visible()
    if "image-to-image" in model.modes:
        expect(tab.page.locator("[data-field=strength]")).to_be_visible()


def test_pictures_of_a_bucket_are_links(tab: Tab) -> None:
    metadata = {"seed": 5, "seeds": [5], "width": 64, "height": 64, "output_format": "PNG", "inference_time": 1.0,
                "mode": "text-to-image", "num_inference_steps": 8, "model": "x", "warnings": []}  # fmt: skip
    url = "https://bucket.test/5.png?signature=1"
    output = {"status": "success", "metadata": metadata, "image_urls": [url]}
    tab.page.route("**/status/*", lambda route: route.fulfill(json={"status": "COMPLETED", "output": output}))
    tab.draw("a red star")
    tab.page.locator(".tile .open").click()
    link = tab.page.get_by_role("link", name="Open in the bucket")
    assert (link.get_attribute("href"), link.get_attribute("rel")) == (url, "noopener noreferrer")
    tab.page.reload()
    button = tab.button("Ask again")
    expect(tab.page.locator("#waiting")).to_contain_text("What it answers is no description")
    tab.page.unroute("**/status/*")
    button.click()
    expect(tab.page.locator(".tile")).to_have_count(1)


def test_a_new_field_shows_by_itself(tab: Tab) -> None:
    def with_a_new_field(route: Any) -> None:
        answer = route.fetch()
        body = answer.json()
        described = body.get("output", {}).get("describe")
        if described:
            described["schema"]["properties"]["sparkle"] = {
                "type": "integer", "minimum": 0, "maximum": 9, "default": 3, "description": "an integer from 0 to 9",
            }  # fmt: skip
            described["takes"].append("sparkle")
        route.fulfill(json=body)

    tab.page.route("**/status/*", with_a_new_field)
    tab.page.reload()
    tab.page.wait_for_selector(READY)
    tab.fill(sparkle=5)
    expect(tab.page.locator("details", has=tab.page.locator("[name=sparkle]")).locator("summary")).to_contain_text(
        "More"
    )
    assert sent(tab, lambda: tab.draw("a red star"))["sparkle"] == 5
    expect(tab.page.locator("[data-field=sparkle] .fault, #faults").first).to_be_visible()


def test_the_page_needs_nothing_of_others() -> None:
    """No library, no address but its own, nothing put in as HTML."""
    files = [file for file in (ROOT / "src" / "web" / "page").iterdir() if file.suffix != ".svg"]
    assert len(files) > 10
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert re.findall(r"https?://", text) == [], file.name
        assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text) == [], file.name
