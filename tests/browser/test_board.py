"""The board as people meet it: with mouse, keyboard, small windows, dark rooms, keys and servers that go away."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from playwright.sync_api import expect

from tests.waiting import HANG_S

SKY = [86, 180, 233]
COUNT_PIXELS = """(colour) => {
  const canvas = document.getElementById("canvas");
  const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  let count = 0;
  for (let at = 0; at < data.length; at += 4) count += colour.every((value, index) => data[at + index] === value);
  return count;
}"""
CONTRASTS = """() => {
  const luminance = (colour) => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map((value) => value / 255);
    const [r, g, b] = parts.map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const backgroundOf = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return colour === "rgba(0, 0, 0, 0)" && node.parentElement ? backgroundOf(node.parentElement) : colour;
  };
  const texts = [...document.querySelectorAll("body *")].filter((node) =>
    node.offsetParent && [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim()));
  return texts.map((node) => {
    const [a, b] = [getComputedStyle(node).color, backgroundOf(node)].map(luminance);
    return [node.textContent.trim().slice(0, 40), (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05)];
  });
}"""


def ask(page, *, prompt="a lighthouse", size="256x256", steps=200, deadline=""):
    """As many steps as the page allows, unless told otherwise: a busy machine must not miss how it runs."""
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Size", exact=True).select_option(size)
    page.get_by_label("Deadline").fill(str(deadline))
    page.locator(".more").evaluate("details => details.open = true")
    page.get_by_label("Steps", exact=True).fill(str(steps))
    page.get_by_role("button", name="Draw it").click()
    return page.locator(".picture").first


def wait_for_blocks(page):
    """They grow as time passes. Not by `wait_for_function`: from the second look on it needs an eval that our policy
    of contents forbids."""
    until = time.monotonic() + HANG_S
    while page.evaluate(COUNT_PIXELS, SKY) <= 200:
        assert time.monotonic() < until, "no blocks"
        page.wait_for_timeout(50)


def load(url, num_requests, **fields):
    """Requests of others, all at once."""
    body = {"prompt": "theirs", "size": "256x256", "num_inference_steps": 40, "slo_ms": 60_000, **fields}
    with ThreadPoolExecutor(num_requests) as threads:
        send = lambda _: httpx.post(f"{url}/v1/images/generations", json=body, timeout=HANG_S)  # noqa: E731
        return [answer.status_code for answer in threads.map(send, range(num_requests))]


def test_an_idle_board_invites_to_ask(open_page, served, keep):
    with served() as url:
        page = open_page(url)
        expect(page.locator("#empty")).to_be_visible()
        expect(page.get_by_label("Prompt")).to_be_focused()
        expect(page.locator("#num-ranks")).to_have_text("2")
        expect(page.locator("#size option")).to_have_count(3)
        expect(page.locator("#sar")).to_have_text("–")
        keep(page, "idle-light")


def test_a_request_becomes_blocks_a_picture_and_a_verdict(open_page, served, keep):
    with served() as url:
        page = open_page(url)
        expect(page.locator("#connection")).to_have_text("live")
        picture = ask(page, deadline=30)
        expect(page.locator("#empty")).to_be_hidden()
        expect(page.locator("#summary")).to_contain_text("1 running")
        expect(picture.locator(".state")).to_contain_text(re.compile(r"step \d+ of 200, on \d ranks?"))
        wait_for_blocks(page)
        keep(page, "running-light")
        expect(picture.locator(".verdict")).to_contain_text("In time by")
        expect(picture).to_have_attribute("data-state", "attained")
        assert picture.locator("img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [256, 256]
        wait_for_blocks(page)
        expect(page.locator("#sar")).to_have_text("100 %")
        expect(page.locator("#sizes tr")).to_have_text(re.compile(r"^256x256\s*1\s*100 %"))
        keep(page, "attained-light")


def test_a_request_that_cannot_be_in_time_is_told_so_before_and_after(page, keep):
    picture = ask(page, deadline=0.1)
    expect(page.locator("#quote")).to_contain_text("Late: done in")
    expect(picture.locator(".verdict")).to_contain_text("Late by")
    expect(picture).to_have_attribute("data-state", "late")
    expect(page.locator("#course .missed")).to_have_count(1)
    keep(page, "late-light")


def test_a_refusal_is_told_in_the_servers_words(page):
    picture = ask(page, prompt="make it fail", steps=2)
    expect(picture.locator(".verdict")).to_have_text(re.compile("^No picture: .*latents are not finite"))


def test_keys_alone_are_enough(page, keep):
    expect(page.get_by_label("Prompt")).to_be_focused()
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type("a lighthouse at night")
    page.keyboard.press("Tab")
    page.keyboard.type("256")
    page.keyboard.press("Tab")
    page.keyboard.type("20")
    page.keyboard.press("ControlOrMeta+Enter")
    expect(page.locator(".picture .prompt")).to_have_text("a lighthouse at night")
    expect(page.locator(".picture .verdict")).to_contain_text("In time by")
    page.locator("#canvas").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#tip")).to_contain_text("done, in time")
    expect(page.locator("#said")).to_contain_text("256x256, 4 of 4 steps")
    keep(page, "selected-light")
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()
    page.locator("body").press("Home")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "theme":
            break
    page.keyboard.press("Enter")
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")


def test_what_is_told_of_a_request_stays_true_while_it_runs(page):
    picture = ask(page, deadline=60)
    expect(picture.locator(".state")).to_contain_text("step")
    expect(page.locator("#running")).to_contain_text("1 running")  # the board hears of it on another way
    page.locator("#canvas").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#tip")).to_contain_text("deadline in")
    expect(picture.locator(".verdict")).to_contain_text("In time by")
    expect(page.locator("#tip")).to_contain_text("200 of 200 steps")
    expect(page.locator("#tip")).to_contain_text("done, in time")


def test_a_busy_pool_in_light_and_dark(open_page, url, keep):
    page = open_page(url)
    page.get_by_text("Requests as a table").click()
    with ThreadPoolExecutor(1) as threads:
        loading = threads.submit(load, url, 12)
        expect(page.locator("#rows tr").nth(3)).to_be_visible()
        expect(page.locator("#rows tr").first).to_contain_text(re.compile(r"\d+/40.*in \d"))
        expect(page.locator("#waiting")).not_to_have_text("0")
        keep(page, "busy-light")
        page.get_by_role("button", name="Dark").click()
        expect(page.locator("html")).to_have_attribute("data-theme", "dark")
        keep(page, "busy-dark")
        assert loading.result() == [200] * 12
    expect(page.locator("#rows-more")).to_have_text("No request is open.")
    page.reload()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    expect(page.locator("#sizes tr").first).to_be_visible()


def test_a_dark_room_gets_a_dark_page(open_page, url, keep):
    page = open_page(url, color_scheme="dark")
    expect(page.get_by_role("button", name="Dark")).to_have_attribute("aria-pressed", "true")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    keep(page, "idle-dark")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(open_page, url, scheme):
    page = open_page(url, color_scheme=scheme)
    ask(page, steps=2)
    expect(page.locator(".picture .verdict")).to_be_visible()
    pale = [(text, ratio) for text, ratio in page.evaluate(CONTRASTS) if ratio < 4.5]  # WCAG 2, level AA
    assert pale == []


def test_everything_has_a_name(page):
    unnamed = page.evaluate("""() =>
      [...document.querySelectorAll("button, input, select, textarea, img, canvas, svg[role], table, dialog, section")]
        .filter((node) => !(node.labels?.length || node.ariaLabel || node.getAttribute("aria-labelledby")
          || node.textContent.trim() || node.hasAttribute("alt")))
        .map((node) => node.outerHTML.slice(0, 80))""")
    assert unnamed == []
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h1").count() == 1
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((node) => Number(node.tagName[1]))")
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))
    assert page.locator("#said").get_attribute("aria-live") == "polite"


def test_a_narrow_window_needs_no_sideways_scrolling(open_page, url, keep):
    page = open_page(url, viewport={"width": 390, "height": 844})
    ask(page, steps=20)
    expect(page.locator(".picture .verdict")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.evaluate("scrollTo(0, 0)")
    keep(page, "narrow-light")


def test_whoever_wants_no_motion_gets_none(open_page, url):
    page = open_page(url, reduced_motion="reduce")
    page.evaluate("""() => {
      window.frames_asked = 0;
      const before = requestAnimationFrame;
      window.requestAnimationFrame = (step) => { window.frames_asked += 1; return before(step); };
    }""")
    ask(page, steps=50)
    expect(page.locator(".picture .verdict")).to_be_visible()
    assert page.evaluate("window.frames_asked") == 0


def test_a_key_is_asked_for_and_kept(open_page, served, keep):
    with served("--api-key", "sk-right") as url:
        page = open_page(url)
        dialog = page.get_by_role("dialog")
        expect(dialog).to_be_visible()
        keep(page, "key-light")
        dialog.get_by_label("API key").fill("sk-wrong")
        dialog.get_by_role("button").click()
        expect(dialog.get_by_role("alert")).to_have_text("this API key is not known here")
        dialog.get_by_label("API key").fill("sk-right")
        page.keyboard.press("Enter")
        expect(page.locator("#connection")).to_have_text("live")
        expect(ask(page, steps=2, deadline=60).locator(".verdict")).to_contain_text("In time")
        page.reload()
        expect(page.locator("#connection")).to_have_text("live")
        expect(dialog).to_be_hidden()


def test_a_server_that_goes_away_at_once_is_told(open_page, served):
    with served() as url:
        page = open_page(url)
        expect(page.locator("#connection")).to_have_text("live")
    expect(page.locator("#connection")).to_contain_text("trying again")
