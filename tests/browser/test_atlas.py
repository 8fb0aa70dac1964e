"""The design-space page in a browser: its filters, what a row opens to, and the line of code that makes it."""

import re

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import Select, WebDriverWait

import ttr

pytestmark = pytest.mark.browser

NAMED = sum(design.name is not None for design in ttr.atlas.cells())
ALL = sum(1 for _ in ttr.atlas.cells())


def open_atlas(browser: WebDriver, site: str, slug: str = "") -> None:
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(f"{site}/notebooks/design_space.html{'#' * bool(slug)}{slug}")
    WebDriverWait(browser, 20).until(lambda page: page.find_elements(By.CLASS_NAME, "ttr-atlas-name"))
    browser.execute_async_script("MathJax.startup.promise.then(arguments[0])")


def named(browser: WebDriver) -> list[str]:
    return [button.text for button in browser.find_elements(By.CLASS_NAME, "ttr-atlas-name")]


def count(browser: WebDriver) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", browser.find_element(By.CSS_SELECTOR, "[data-count]").text)))


def details(browser: WebDriver) -> list[dict[str, str]]:
    """What each open row says, by its terms."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.ttr-atlas-detail dl')].map(list => Object.fromEntries("
        "[...list.querySelectorAll('dt')].map(term => [term.textContent, term.nextElementSibling.textContent])))"
    )


def button_of(browser: WebDriver, slug: str):
    return browser.find_element(By.CSS_SELECTOR, f"tr#{slug} .ttr-atlas-name")


def errors(browser: WebDriver) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_named_memories_are_shown_and_the_others_a_page_at_a_time(browser: WebDriver, site: str) -> None:
    open_atlas(browser, site)
    assert count(browser)[:2] == (NAMED, ALL)
    assert len(named(browser)) == NAMED
    browser.find_element(By.CSS_SELECTOR, "[data-unnamed]").click()
    assert count(browser)[:2] == (ALL, ALL)
    first = len(named(browser))
    assert NAMED <= first <= 60
    browser.find_element(By.CSS_SELECTOR, "[data-more]").click()
    assert first < len(named(browser)) <= 2 * first
    assert browser.execute_script("return document.activeElement.className") == "ttr-atlas-name"
    assert not errors(browser)


def test_search_and_axes_narrow_the_table(browser: WebDriver, site: str) -> None:
    open_atlas(browser, site)
    search = browser.find_element(By.CSS_SELECTOR, "[data-search]")
    search.send_keys("kimi delta")
    assert named(browser) == ["Kimi Delta Attention (2025)"]
    search.clear()
    search.send_keys(" ", Keys.BACKSPACE)
    Select(browser.find_element(By.CSS_SELECTOR, '[data-axis="retention"]')).select_by_value("KL()")
    assert named(browser) == ["Memora (2025)"]


def test_a_row_opens_to_all_the_atlas_knows(browser: WebDriver, site: str) -> None:
    open_atlas(browser, site)
    button = button_of(browser, "gated_delta_net")
    button.click()
    assert button.get_attribute("aria-expanded") == "true"
    WebDriverWait(browser, 20).until(
        lambda page: page.find_elements(By.CSS_SELECTOR, ".ttr-atlas-detail mjx-container")
    )
    assert not browser.find_elements(By.CSS_SELECTOR, "mjx-merror, [data-mjx-error]")
    (said,) = details(browser)
    design = ttr.atlas["gated_delta_net"]
    assert said["cost of a head"] == ", ".join(f"{name} {text}" for name, text in design.cost().as_text().items())
    assert said["inputs"] == "log_decay, step_size"
    assert 'ttr.atlas["gated_delta_net"]' in said["code"]
    assert design.citation() in said["citation"]
    link = browser.find_element(By.CSS_SELECTOR, ".ttr-atlas-detail dd a")
    assert link.get_attribute("href").endswith("notebooks/04_delta_rule.html")
    browser.find_element(By.CSS_SELECTOR, "tr#gated_delta_net td").click()  # anywhere on the row closes it
    assert details(browser) == []
    assert not errors(browser)


def test_the_keyboard_opens_a_row_and_goes_to_the_next(browser: WebDriver, site: str) -> None:
    open_atlas(browser, site)
    first, second = browser.find_elements(By.CLASS_NAME, "ttr-atlas-name")[:2]
    browser.execute_script("arguments[0].focus()", first)
    first.send_keys(Keys.ENTER)
    assert len(details(browser)) == 1
    first.send_keys(Keys.ARROW_DOWN)
    assert browser.switch_to.active_element == second
    second.send_keys(Keys.SPACE)
    assert len(details(browser)) == 2


def test_a_cell_without_a_name_says_so_and_its_line_makes_it(browser: WebDriver, site: str) -> None:
    open_atlas(browser, site)
    browser.find_element(By.CSS_SELECTOR, "[data-unnamed]").click()
    Select(browser.find_element(By.CSS_SELECTOR, '[data-axis="loss"]')).select_by_value(str(ttr.Huber()))
    assert set(named(browser)) == {"no name"}
    for button in browser.find_elements(By.CLASS_NAME, "ttr-atlas-name")[:10]:
        browser.execute_script("arguments[0].click()", button)
    for said in details(browser):
        assert said["chapter"].startswith("Nobody has published this, as far as the atlas knows.")
        line = said["code"].removesuffix("copy code")
        design = eval(line, {"ttr": ttr})
        assert design.name is None
        assert said["choices"].replace("()", "").startswith(f"weights {design.weights}".replace("()", ""))
        assert design.citation() in said["citation"]
    links = browser.find_elements(By.CSS_SELECTOR, ".ttr-atlas-detail a[href$='14_make_your_own.html']")
    assert len(links) == len(details(browser)) == 10
    assert not errors(browser)


def test_copy_puts_the_line_on_the_clipboard(browser: WebDriver, site: str) -> None:
    browser.execute_cdp_cmd(
        "Browser.grantPermissions", {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": site}
    )
    open_atlas(browser, site, "kda")  # the address opens its row
    browser.find_element(By.CLASS_NAME, "ttr-atlas-copy").click()
    said = browser.find_element(By.CLASS_NAME, "ttr-atlas-said")
    WebDriverWait(browser, 5).until(lambda page: said.text in ("copied", "selected"))
    kept = (
        "navigator.clipboard.readText().then(arguments[0])"
        if said.text == "copied"
        else "arguments[0](String(getSelection()))"
    )
    assert browser.execute_async_script(kept) == 'ttr.atlas["kda"]'
