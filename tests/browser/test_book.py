"""The built book as a reader's browser sees it."""

import json
from pathlib import Path

import pytest
import yaml
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CONTENTS = yaml.safe_load((Path(__file__).parents[2] / "_toc.yml").read_text())
PAGES = [CONTENTS["root"]] + [chapter["file"] for part in CONTENTS["parts"] for chapter in part["chapters"]]
FIRST_CHAPTER = next(page for page in PAGES if page.startswith("notebooks/"))


def open_page(browser, address):
    """Opens a page, waits for its formulas, and returns what was requested: {address: status}."""
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(address)
    browser.execute_async_script(
        "const done = arguments[0]; (window.MathJax ? MathJax.startup.promise : Promise.resolve()).then(done)"
    )
    requests = {}
    for entry in browser.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            requests[message["params"]["request"]["url"]] = None
        elif message["method"] == "Network.responseReceived":
            response = message["params"]["response"]
            requests[response["url"]] = response["status"]
    return requests


@pytest.mark.parametrize("page", PAGES)
def test_page_is_typeset_and_asks_for_nothing_from_elsewhere(browser, site, page):
    requests = open_page(browser, f"{site}/{page}.html")
    assert f"{site}/{page}.html" in requests
    assert [url for url in requests if not url.startswith((site, "data:", "blob:", "chrome:"))] == []
    assert {url: status for url, status in requests.items() if status and status >= 400} == {}
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []

    formulas = browser.find_elements(By.CSS_SELECTOR, ".math")
    typeset = browser.find_elements(By.CSS_SELECTOR, "mjx-container")
    assert len(typeset) >= len(formulas)
    assert browser.find_elements(By.CSS_SELECTOR, "mjx-merror, [data-mjx-error]") == []


def test_search_finds_a_word_of_the_first_chapter(browser, site):
    open_page(browser, f"{site}/search.html?q=recall")
    found = WebDriverWait(browser, 20).until(
        lambda browser: browser.find_elements(By.CSS_SELECTOR, f"#search-results a[href*='{FIRST_CHAPTER}']")
    )
    assert found


def test_the_theme_button_reaches_dark_and_turns_figures_round(browser, site):
    open_page(browser, f"{site}/{FIRST_CHAPTER}.html")
    page = browser.find_element(By.TAG_NAME, "html")
    button = browser.find_element(By.CSS_SELECTOR, ".theme-switch-button")
    appearance = {}
    for _ in range(3):  # light, dark, and what the system prefers
        browser.execute_script("arguments[0].click()", button)
        figure = browser.find_element(By.CSS_SELECTOR, ".bd-article .cell_output img, .bd-article figure img")
        appearance[page.get_attribute("data-theme")] = (
            browser.find_element(By.TAG_NAME, "body").value_of_css_property("background-color"),
            figure.value_of_css_property("filter"),
        )
    (light, light_filter), (dark, dark_filter) = appearance["light"], appearance["dark"]
    assert light != dark
    assert light_filter == "none"
    assert "invert" in dark_filter
