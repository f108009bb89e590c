"""The report in headless Chromium, driven over the DevTools protocol: light, dark, wide and as narrow as a phone."""

import base64
import io
import json
import os
import select
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from test_report import make_run, with_everything

from hypercontrast import report

pytest.importorskip("safetensors")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
PAPER = {"light": (253, 252, 250), "dark": (20, 23, 26)}
# Chromium expects its pipes as 3 and 4; above 9 first, for one of them may be the other's place.
WITH_PIPES = """
import fcntl, os, sys
to_browser, from_browser = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(to_browser, 3)
os.dup2(from_browser, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
SECONDS = 60  # that the browser may take for one answer


class Browser:
    """Chromium behind a pair of pipes: commands and answers are JSON that ends with a NUL."""

    def __init__(self, profile):
        to_browser, self.commands = os.pipe()
        self.answers, from_browser = os.pipe()
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--hide-scrollbars", f"--user-data-dir={profile}",
            "--remote-debugging-pipe"]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-c", WITH_PIPES, str(to_browser), str(from_browser), CHROMIUM, *flags],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self.buffer, self.events, self.last, self.session = b"", [], 0, {}

    def close(self):
        os.close(self.commands)  # which ends it
        try:
            self.process.wait(SECONDS)
        finally:
            self.process.kill()
            os.close(self.answers)

    def send(self, method, **params):
        self.last += 1
        message = {"id": self.last, "method": method, "params": params, **self.session}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        answer = self.receive(lambda message: message.get("id") == self.last)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self, wanted):
        """The next message that is wanted; events that come before it are kept."""
        deadline = time.monotonic() + SECONDS
        while True:
            while b"\0" not in self.buffer:
                ready, _, _ = select.select([self.answers], [], [], deadline - time.monotonic())
                assert ready, "the browser did not answer"
                self.buffer += os.read(self.answers, 1 << 20)
            text, _, self.buffer = self.buffer.partition(b"\0")
            message = json.loads(text)
            if "method" in message:
                self.events.append(message)
            if wanted(message):
                return message

    def open(self, path, *, width, scheme):
        """A new tab with the page, in a window of this width."""
        self.session = {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events = []
        self.send("Page.navigate", url=path.as_uri())
        if not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.receive(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, script):
        return self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)["result"].get(
            "value"
        )

    def press(self, key, code, text=""):
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, text=text)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    one = with_everything(root / "nonl", epochs=30, recipe="mnist5k-nonl")
    other = with_everything(root / "a-run-with-a-name-so-long-that-it-must-be-cut", cosine=0.5, loss="ce")
    unfinished = make_run(root / "ntce", loss="ntce", epochs=1)
    (unfinished / "embeddings.safetensors").unlink()
    many = with_everything(
        root / "many", classes=100, dim=128, class_names=[f"ratherlongnameofaclass{c}" for c in range(100)]
    )
    return {
        "one": report.write_report([one]),
        "several": report.write_report([one, other, unfinished], root / "several.html"),
        "many classes": report.write_report([many]),
        "unfinished": report.write_report([unfinished]),
    }


KINDS = ("one", "several", "many classes", "unfinished")
DRAWINGS = """[...document.querySelectorAll("svg, img, image")].map(drawing => {
    const box = drawing.getBoundingClientRect();
    return [drawing.tagName, box.width, box.height, drawing.tagName != "IMG" || drawing.naturalWidth > 0];
})"""
# Words that stick out of their drawing by more than a pixel.
OUTSIDE = """[...document.querySelectorAll("svg[role=img] text")].filter(text => {
    const a = text.getBoundingClientRect(), b = text.closest("svg").getBoundingClientRect();
    return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
}).map(text => text.textContent)"""
# Elements wider than the page, but for those inside a box that scrolls by itself.
OVERFLOWING = """[...document.querySelectorAll("body *")].filter(element =>
    !element.closest(".scroll, .quiet, .skip") && element.getBoundingClientRect().right > innerWidth + 1
).map(element => element.outerHTML.slice(0, 80))"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark"), (360, "light"), (320, "dark")])
def test_every_page_stands_in_every_window(browser, pages, kind, width, scheme):
    browser.open(pages[kind], width=width, scheme=scheme)
    browser.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(OVERFLOWING) == []
    assert browser.evaluate(OUTSIDE) == []
    drawings = browser.evaluate(DRAWINGS)
    assert len(drawings) >= {"one": 50, "several": 22, "many classes": 60, "unfinished": 7}[kind]
    assert [drawing for drawing in drawings if not (drawing[1] > 8 and drawing[2] > 8 and drawing[3])] == []
    requested = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert {url for url in requested if not url.startswith("data:")} == {pages[kind].as_uri()}
    said = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
    assert [event for event in browser.events if event["method"] in said] == []


@pytest.mark.parametrize("scheme", PAPER)
def test_both_schemes_are_drawn(browser, pages, scheme):
    """On the scheme's own paper, with the matrices in their colour: 1 is full teal in both."""
    Image = pytest.importorskip("PIL.Image")
    browser.open(pages["one"], width=1200, scheme=scheme)
    browser.evaluate("document.getElementById('cosines').scrollIntoView({behavior: 'instant'})")
    shot = browser.send("Page.captureScreenshot", captureBeyondViewport=False)["data"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB")).astype(int)
    assert tuple(pixels[2, 2]) == PAPER[scheme]
    teal = np.abs(pixels - report.figures.COSINE_COLOURS[1]).sum(axis=-1) <= 3
    assert teal.mean() > 0.001


def test_the_keyboard_reaches_the_parts_in_order(browser, pages):
    """The skip link comes first and into view; headings go down one level at a time; what folds opens by a key."""
    browser.open(pages["one"], width=390, scheme="light")
    browser.press("Tab", 9)
    assert browser.evaluate("document.activeElement.getAttribute('href')") == "#main"
    assert browser.evaluate("document.activeElement.getBoundingClientRect().width") > 50
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    levels = browser.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(heading => +heading.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(np.diff(levels)) == 1
    browser.evaluate("document.querySelector('summary').focus()")
    browser.press("Enter", 13, "\r")
    assert browser.evaluate("document.querySelector('details').open")


def test_a_printed_page_shows_what_is_folded(browser, pages):
    browser.open(pages["one"], width=800, scheme="light")
    assert not browser.evaluate("document.querySelector('details svg').checkVisibility()")
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("document.querySelector('details svg').checkVisibility()")
    assert browser.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
