"""The board of a pool that makes pictures and videos: a form for each model, blocks told apart, and a player in the
end.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from tests.browser.test_board import CONTRASTS, load
from tests.waiting import HANG_S

NOTE_LABELS = """() => {
  const before = CanvasRenderingContext2D.prototype.fillText;
  window.labels = new Set();
  CanvasRenderingContext2D.prototype.fillText = function (text, ...where) {
    window.labels.add(text);
    return before.call(this, text, ...where);
  };
}"""


@pytest.fixture(scope="module")
def url(served):
    with served("--videos") as url:
        yield url


@pytest.fixture
def page(open_page, url):
    page = open_page(url)
    page.wait_for_selector("#connection[data-state=live]")
    return page


def ask(page, *, prompt="a harbour", size="96x96", frames=17, steps=200, deadline=""):
    """Of the model of videos. As many steps as the page allows, unless told otherwise."""
    page.get_by_label("Model").select_option("videos")
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Size", exact=True).select_option(size)
    page.get_by_label("or frames").fill(str(frames))
    page.get_by_label("Deadline").fill(str(deadline))
    page.locator(".more").evaluate("details => details.open = true")
    page.get_by_label("Steps", exact=True).fill(str(steps))
    page.get_by_role("button", name="Make it").click()
    return page.locator(".picture").first


def test_the_form_is_that_of_the_chosen_model(page):
    expect(page.locator("#model")).to_have_text("tiny/flux, tiny/wan")
    expect(page.locator("#of-model option")).to_have_text(["images", "videos"])
    expect(page.get_by_role("heading", name="Ask for a picture")).to_be_visible()
    expect(page.get_by_label("Seconds", exact=True)).to_be_hidden()
    expect(page.locator("#size option").first).to_have_text("128 × 128")
    page.get_by_label("Model").select_option("videos")
    expect(page.get_by_role("heading", name="Ask for a video")).to_be_visible()
    expect(page.locator("#size option")).to_have_text(["96 × 64", "64 × 64", "96 × 96"])
    expect(page.get_by_label("Steps", exact=True)).to_have_attribute("placeholder", "4")
    seconds, frames = page.get_by_label("Seconds", exact=True), page.get_by_label("or frames")
    expect(seconds).to_have_attribute("placeholder", "1.13")
    expect(frames).to_have_attribute("placeholder", "9")
    seconds.fill("1.6")
    expect(frames).to_have_attribute("placeholder", "13")
    frames.fill("6")
    expect(seconds).to_have_value("")
    expect(seconds).to_have_attribute("placeholder", "0.63")


def test_a_video_is_quoted_before_it_is_asked_for(page):
    page.get_by_label("Model").select_option("videos")
    page.locator(".more").evaluate("details => details.open = true")
    page.get_by_label("Steps", exact=True).fill("200")
    page.get_by_label("Deadline").fill("100")
    expect(page.locator("#quote")).to_have_attribute("data-state", "feasible")
    expect(page.locator("#quote")).to_contain_text("In time: done in")
    page.get_by_label("Deadline").fill("600")
    expect(page.locator("#quote")).to_contain_text(re.compile(r"9 min 5\d s before its deadline"))
    page.get_by_label("Deadline").fill("0.1")
    expect(page.locator("#quote")).to_contain_text("after its deadline")
    page.get_by_label("Seconds", exact=True).fill("100")
    expect(page.locator("#quote")).to_contain_text("seconds is 100; allowed:")


def test_a_video_beside_pictures_becomes_a_player_with_its_verdict(open_page, served, keep):
    with served("--videos") as url, ThreadPoolExecutor(1) as threads:
        page = open_page(url)
        expect(page.locator("#connection")).to_have_text("live")
        expect(page.locator("#legend-video")).to_be_visible()
        page.evaluate(NOTE_LABELS)
        page.get_by_text("Requests as a table").click()
        card = ask(page, deadline=60)
        expect(card.locator(".state")).to_contain_text(re.compile(r"step \d+ of 200, on \d ranks?, done in"))
        expect(card.locator("progress")).to_be_visible()
        row = page.locator("#rows tr", has_text="videos")
        expect(row).to_contain_text(re.compile(r"96x96, 17 frames, 2\.13 s.*\d+/200"))
        loading = threads.submit(load, url, 6, model="tiny/flux", num_inference_steps=10)
        expect(page.locator("#rows tr", has_text="images").first).to_be_visible()
        keep(page, "video-running-light")
        assert loading.result() == [200] * 6
        expect(card.locator(".verdict")).to_contain_text("In time by")
        expect(card).to_contain_text(re.compile(r"96x96, 17 frames, 2\.13 s, seed \d+"))
        player = card.locator("video")
        assert player.evaluate("v => [v.controls, v.loop, v.muted, v.playsInline, v.autoplay]") == [True] * 4 + [False]
        expect(player).to_have_attribute("aria-label", "Video of: a harbour")
        page.wait_for_timeout(500)
        keep(page, "video-done-light")
        with page.expect_download() as download:
            card.get_by_role("link", name="Download MP4").click()
        path = Path(download.value.path())
        assert (download.value.suggested_filename[:6], path.read_bytes()[4:8]) == ("video_", b"ftyp")
        rows = page.locator("#sizes tr")
        expect(rows).to_have_text([
            re.compile(r"^images\s*6\s*\d+ %"), re.compile(r"^256x256\s*6"),
            re.compile(r"^videos\s*1\s*100 %"), re.compile(r"^96x96x17\s*1\s*100 %"),
        ])  # fmt: skip
        assert {"17 frames", "96x96, 17 frames", "96x96, 17 frames, 2.13 s"} & set(page.evaluate("[...window.labels]"))


def test_the_player_plays(page):
    card = ask(page, steps=2)
    expect(card.locator(".verdict")).to_be_visible()
    player = card.locator("video")
    if not player.evaluate("v => v.canPlayType('video/mp4; codecs=\"avc1.640028\"')"):
        pytest.skip("this Chromium cannot play H.264")
    seen = player.evaluate("""async (v) => {
      await v.play();
      while (v.currentTime === 0) await new Promise((resolve) => setTimeout(resolve, 20));
      return [v.videoWidth, v.videoHeight, v.duration];
    }""")
    assert seen[:2] == [96, 96]
    assert seen[2] == pytest.approx(17 / 8, abs=0.01)
    loaded = "async (v) => { const i = new Image(); i.src = v.poster; await i.decode(); return [i.width, i.height]; }"
    assert player.evaluate(loaded) == [96, 96]


def test_a_video_that_cannot_be_played_leaves_its_first_frame_and_the_download(page):
    page.route("**/content?variant=video", lambda route: route.fulfill(body=b"no video", content_type="video/mp4"))
    card = ask(page, steps=2)
    expect(card).to_contain_text("This browser cannot play H.264. The file can be downloaded.")
    expect(card.locator("video")).to_have_count(0)
    poster = card.get_by_role("img", name="First frame of the video of: a harbour")
    assert poster.evaluate("image => [image.naturalWidth, image.naturalHeight]") == [96, 96]
    expect(card.get_by_role("link", name="Download MP4")).to_be_visible()


def test_frames_that_the_model_does_not_make_are_said_to_be_rounded(page):
    card = ask(page, frames=10, steps=2)
    expect(card).to_contain_text("num_frames: 10 was rounded to 9")
    expect(card).to_contain_text("96x96, 9 frames")


def test_a_video_that_is_cancelled_leaves_the_pool(page, url):
    card = ask(page)
    expect(card.locator(".state")).to_contain_text("step")
    expect(page.locator("#running")).to_contain_text("1 running")
    card.get_by_role("button", name="Cancel").focus()
    page.keyboard.press("Enter")
    expect(card.locator(".verdict")).to_have_text("Cancelled")
    expect(card.locator(".verdict")).to_be_focused()
    expect(card.get_by_role("button", name="Cancel")).to_be_hidden()
    expect(page.locator("#running")).to_contain_text("0 running")
    listed = httpx.get(f"{url}/v1/videos", timeout=HANG_S).json()["data"]
    assert [video for video in listed if video["status"] != "completed"] == []


def test_a_failure_is_told_in_the_servers_words(page):
    card = ask(page, prompt="make it fail", steps=2)
    expect(card.locator(".verdict")).to_have_text(re.compile("^No video: .*latents are not finite"))
    expect(card.get_by_role("button", name="Cancel")).to_be_hidden()


def test_a_page_that_is_loaded_again_still_follows_its_video(page):
    card = ask(page, prompt="a ferry", deadline=60)
    expect(card.locator(".state")).to_contain_text("step")
    page.reload()
    expect(card.locator(".prompt")).to_have_text("a ferry")
    expect(card.locator(".state")).to_contain_text(re.compile(r"step \d+ of 200"))
    expect(card.locator(".verdict")).to_contain_text("In time by")
    expect(card.get_by_role("link", name="Download MP4")).to_be_visible()


def test_a_connection_that_is_lost_for_a_while_does_not_lose_the_video(page):
    num_lost = 0

    def lose_two(route):
        nonlocal num_lost
        num_lost += 1
        if num_lost <= 2:
            route.abort()
        else:
            route.continue_()

    page.route(re.compile(r"/v1/videos/video_\w+$"), lose_two)
    expect(ask(page, steps=20, deadline=60).locator(".verdict")).to_contain_text("In time by")
    assert num_lost > 2


def test_keys_alone_are_enough(page):
    expect(page.get_by_label("Prompt")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    page.keyboard.type("videos")
    expect(page.get_by_label("Model")).to_have_value("videos")
    page.keyboard.press("Tab")
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("a pier at night")
    for text in ("64", "60", "1.1"):  # size, deadline, seconds
        page.keyboard.press("Tab")
        page.keyboard.type(text)
    page.keyboard.press("ControlOrMeta+Enter")
    card = page.locator(".picture").first
    expect(card.locator(".prompt")).to_have_text("a pier at night")
    expect(card.locator(".verdict")).to_contain_text("In time by")
    page.locator("#canvas").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#said")).to_contain_text("64x64, 9 frames, 1.13 s, 4 of 4 steps")


def test_a_picture_of_one_of_several_models_is_as_before(page):
    page.get_by_label("Deadline").fill("60")
    page.get_by_role("button", name="Draw it").click()
    card = page.locator(".picture").first
    expect(card.locator(".verdict")).to_contain_text("In time by")
    assert card.locator("img").evaluate("image => image.naturalWidth") == 128


def test_content_is_fetched_with_the_key(open_page, served):
    with served("--videos", "--api-key", "sk-right") as url:
        page = open_page(url)
        page.get_by_role("dialog").get_by_label("API key").fill("sk-right")
        page.keyboard.press("Enter")
        expect(page.locator("#connection")).to_have_text("live")
        card = ask(page, steps=2, deadline=60)
        expect(card.locator(".verdict")).to_contain_text("In time by")
        assert card.locator("video").evaluate("v => [v.src, v.poster].every((at) => at.startsWith('blob:'))")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(open_page, url, scheme, keep):
    page = open_page(url, color_scheme=scheme)
    card = ask(page, frames=10, steps=2)
    expect(card.locator(".verdict")).to_be_visible()
    pale = [(text, ratio) for text, ratio in page.evaluate(CONTRASTS) if ratio < 4.5]  # WCAG 2, level AA
    assert pale == []
    page.wait_for_timeout(500)
    keep(page, f"video-{scheme}")


def test_a_narrow_window_needs_no_sideways_scrolling(open_page, url, keep):
    page = open_page(url, viewport={"width": 390, "height": 844})
    card = ask(page, steps=20)
    expect(card.locator("video")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    card.scroll_into_view_if_needed()
    keep(page, "video-narrow-light")
