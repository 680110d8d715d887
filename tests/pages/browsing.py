"""A page in a real browser: what every page must stand."""

import shutil
from contextlib import contextmanager

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
WIDE, NARROW = {"width": 1400, "height": 900}, {"width": 380, "height": 800}


@contextmanager
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            yield found
        finally:
            found.close()


@contextmanager
def opened(browser, path, mode="light", size=WIDE, **options):
    """The page, which asks for nothing but itself and has nothing to complain about."""
    page = browser.new_page(color_scheme=mode, viewport=size, **options)
    told, asked = [], []
    page.on("console", lambda message: told.append(message.text))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("dialog", lambda dialog: told.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    try:
        yield page
        assert told == []
        assert asked == [path.as_uri()]
    finally:
        page.close()


LOOKS = (("light", WIDE), ("light", NARROW), ("dark", NARROW))
"""Widths and modes; what is where does not depend on the mode."""


@contextmanager
def standing(browser, path):
    """The page, after it was seen in both modes and both widths: no complaint, and nothing sticks out at the side."""
    papers = set()
    with opened(browser, path) as page:
        for mode, size in LOOKS:
            page.emulate_media(color_scheme=mode)
            page.set_viewport_size(size)
            assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
            papers.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(papers) == 2
        page.set_viewport_size(WIDE)
        yield page


def stands(browser, path):
    with standing(browser, path):
        pass
