"""The built book as a reader's browser sees it."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CONTENTS = yaml.safe_load((Path(__file__).parents[2] / "_toc.yml").read_text())
PAGES = [CONTENTS["root"]] + [chapter["file"] for part in CONTENTS["parts"] for chapter in part["chapters"]]
AXE = files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
# What a reader would look for in each chapter.
TERMS = {
    "01_associative_recall": "recall",
    "02_linear_attention": "capacity",
    "03_state_space_models": "eigenvalues",
    "04_delta_rule": "Householder",
    "05_online_learners": "gain",
    "06_exact_least_squares": "conjugate",
    "07_neural_memories": "Huber",
    "08_softmax_attention": "bandwidth",
    "09_higher_order_attention": "boundary",
    "10_keys_and_values": "convolution",
    "11_training_on_tasks": "parity",
    "12_language_modelling": "bits",
    "13_kernels": "roofline",
    "14_make_your_own": "template",
}
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


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_page_can_be_used_by_everybody(browser, site, page, theme):
    """No violation of the WCAG's levels A and AA that a program can find."""
    browser.get(f"{site}/{page}.html")
    browser.execute_script(
        "localStorage.setItem('mode', arguments[0]); localStorage.setItem('theme', arguments[0])", theme
    )
    open_page(browser, f"{site}/{page}.html")
    browser.execute_script(AXE)
    found = browser.execute_async_script(
        "const done = arguments[0];"
        "axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa']})"
        ".then(result => done(result.violations))"
    )
    faults = {fault["id"]: [node["html"][:120] for node in fault["nodes"]][:3] for fault in found}
    browser.execute_script("localStorage.clear()")
    assert faults == {}


@pytest.mark.parametrize("page", PAGES)
def test_page_fits_a_phone(browser, site, page):
    """What is too wide scrolls by itself; the page does not."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    try:
        open_page(browser, f"{site}/{page}.html")
        width = browser.execute_script("return document.documentElement.scrollWidth")
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    assert width <= 390


def test_every_chapter_has_a_term_to_search_for():
    assert [page.partition("/")[2] for page in PAGES if page.partition("/")[2][:2].isdigit()] == list(TERMS)


@pytest.mark.parametrize(("chapter", "term"), TERMS.items())
def test_search_finds_what_a_chapter_is_about(browser, site, chapter, term):
    open_page(browser, f"{site}/search.html?q={term}")
    found = WebDriverWait(browser, 20).until(
        lambda browser: browser.find_elements(By.CSS_SELECTOR, f"#search-results a[href*='{chapter}']")
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
