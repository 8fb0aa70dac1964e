"""The regression explorer in a browser: its numbers against their definitions, its controls, its links."""

import math
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import Select, WebDriverWait

pytestmark = pytest.mark.browser

USES = {
    "linear-attention": {"features", "beta", "decay"},
    "delta": {"features", "beta", "decay"},
    "least-squares": {"features", "ridge", "decay"},
    "softmax": {"bandwidth", "decay"},
    "local-linear": {"bandwidth", "ridge", "decay"},
}
VIEWS = [
    "",
    "seen=1&decay=0.9",
    "seen=25&target=switch&decay=0.8&beta=1.3&ridge=0.05&bandwidth=0.4&seed=7",
    "features=line&target=line&decay=0.95&beta=0.4&ridge=2&bandwidth=0.1",
    "target=step&written=3_0.5_-1.5*40_-0.25_2&seen=41",
]
SLIDERS = ["beta", "decay", "bandwidth", "ridge"]


def open_explorer(browser: WebDriver, site: str, view: str = "") -> None:
    browser.get("about:blank")  # from the explorer itself, another fragment would not load the page again
    browser.get_log("browser")  # what earlier pages logged
    browser.get(f"{site.rstrip('/')}/book/explorer.html#{view}")
    WebDriverWait(browser, 20).until(lambda page: page.execute_script("return !!window.ttrExplorer"))
    WebDriverWait(browser, 20).until(curve)


def element(browser: WebDriver, name: str):
    return browser.find_element(By.ID, f"ttr-{name}")


def curve(browser: WebDriver) -> str | None:
    return element(browser, "curve").get_attribute("d")


def choices(browser: WebDriver) -> dict[str, Any]:
    return browser.execute_script("return ttrExplorer.choices")


def errors(browser: WebDriver) -> list[str]:
    logged = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    return [message for message in logged if "favicon.ico" not in message]


def feature(name: str, key: float) -> np.ndarray:
    if name == "line":
        return np.array([1.0, key])
    bumps = np.exp(-((key - np.linspace(-1, 1, 9)) ** 2) / (2 * 0.25**2))
    return bumps / np.linalg.norm(bumps)


def expected_prediction(view: dict[str, Any], keys: list[float], values: list[float], query: float) -> float:
    """m_t(q) from the definition of each memory: sums and steps pair by pair, `lstsq` on stacked rows."""
    decay = [view["decay"] ** (len(keys) - 1 - i) for i in range(len(keys))]
    features = [feature(view["features"], key) for key in keys]
    asked = feature(view["features"], query)
    kernel = [math.exp(-((query - key) ** 2) / (2 * view["bandwidth"] ** 2)) for key in keys]
    weights = np.array(decay) * kernel
    written = list(zip(features, values, strict=True))
    if view["memory"] == "linear-attention":
        return view["beta"] * sum(g * (f @ asked) * v for g, (f, v) in zip(decay, written, strict=True))
    if view["memory"] == "delta":
        state = np.zeros_like(asked)
        for f, v in written:
            state = view["decay"] * state
            state = state - view["beta"] * f * (state @ f - v)
        return state @ asked
    if view["memory"] == "least-squares":
        root = np.sqrt(decay)
        rows = np.vstack([root[:, None] * features, math.sqrt(view["ridge"]) * np.eye(len(asked))])
        aims = np.concatenate([root * values, np.zeros(len(asked))])
        return np.linalg.lstsq(rows, aims)[0] @ asked
    if view["memory"] == "softmax":
        return float(np.average(values, weights=weights))
    root = np.sqrt(weights / weights.sum())
    rows = np.vstack([root[:, None] * [[1, key - query] for key in keys], [0, math.sqrt(view["ridge"])]])
    return np.linalg.lstsq(rows, np.append(root * values, 0))[0][0]


@pytest.mark.parametrize("memory", USES)
def test_fit_equals_the_definition(browser: WebDriver, site: str, memory: str) -> None:
    open_explorer(browser, site)
    queries = np.linspace(-1, 1, 17).tolist()
    for settings in VIEWS:
        view, pairs, fitted = browser.execute_script(
            "const view = ttrExplorer.choicesOf(arguments[0]);"
            "return [view, ttrExplorer.stream(view), ttrExplorer.fit(view, arguments[1])]",
            f"memory={memory}&{settings}",
            queries,
        )
        keys, values = [pair["key"] for pair in pairs], [pair["value"] for pair in pairs]
        expected = [expected_prediction(view, keys, values, query) for query in queries]
        assert len(pairs) == view["seen"]
        np.testing.assert_allclose(fitted, expected, rtol=1e-9, atol=1e-9, err_msg=settings)


@pytest.mark.parametrize("memory", USES)
def test_the_curve_moves_with_the_controls_that_the_memory_uses(browser: WebDriver, site: str, memory: str) -> None:
    open_explorer(browser, site, f"memory={memory}")
    for name in [*SLIDERS, "seen"]:
        slider = element(browser, name)
        assert slider.is_enabled() == (name in USES[memory] or name == "seen")
        if slider.is_enabled():
            before = curve(browser)
            slider.send_keys(Keys.HOME)
            assert curve(browser) != before, name
            browser.execute_script("arguments[0].click()", element(browser, "reset"))
            Select(element(browser, "memory")).select_by_value(memory)
    assert element(browser, "features").is_enabled() == ("features" in USES[memory])
    assert not errors(browser)


def test_the_query_moves_the_contributions_and_not_the_curve(browser: WebDriver, site: str) -> None:
    open_explorer(browser, site)
    stems = "return document.getElementById('ttr-stems').innerHTML"
    before, curve_before = browser.execute_script(stems), curve(browser)
    element(browser, "query").send_keys(Keys.HOME)
    assert choices(browser)["query"] == -1
    assert browser.execute_script(stems) != before
    assert curve(browser) == curve_before


def test_each_memory_shows_its_own_typeset_formula(browser: WebDriver, site: str) -> None:
    open_explorer(browser, site)
    browser.set_script_timeout(60)
    browser.execute_async_script("MathJax.startup.promise.then(arguments[0])")
    curves = set()
    for memory in USES:
        Select(element(browser, "memory")).select_by_value(memory)
        shown = [f for f in browser.find_elements(By.CLASS_NAME, "ttr-formula") if f.is_displayed()]
        assert [memory in str(formula.get_attribute("class")).split() for formula in shown] == [True]
        assert shown[0].find_elements(By.TAG_NAME, "mjx-container")
        curves.add(curve(browser))
    assert len(curves) == len(USES)
    assert not errors(browser)


def test_the_address_keeps_the_view(browser: WebDriver, site: str) -> None:
    open_explorer(browser, site)
    start = choices(browser)
    Select(element(browser, "memory")).select_by_value("local-linear")
    Select(element(browser, "target")).select_by_value("step")
    element(browser, "bandwidth").send_keys(Keys.ARROW_RIGHT)
    element(browser, "decay").send_keys(Keys.ARROW_LEFT)
    element(browser, "query").send_keys(Keys.END)
    assert "query=1" in browser.current_url
    element(browser, "write").find_element(By.TAG_NAME, "button").click()
    view, drawn = choices(browser), curve(browser)
    assert {name for name in view if view[name] != start[name]} == {
        *("memory", "target", "bandwidth", "decay", "query", "seen", "written")
    }
    assert view["written"] == {"40": [1, 1]}

    open_explorer(browser, site, urlsplit(browser.current_url).fragment)
    assert (choices(browser), curve(browser)) == (view, drawn)
    assert Select(element(browser, "memory")).first_selected_option.get_attribute("value") == "local-linear"


def test_a_link_with_nonsense_falls_back_to_the_start(browser: WebDriver, site: str) -> None:
    open_explorer(browser, site)
    start = choices(browser)
    nonsense = "memory=toString&beta=much&seen=-3&query=7&written=a_b*900_0_0*2_9_9&other=1"
    open_explorer(browser, site, nonsense)
    assert choices(browser) == start | {"seen": 1, "query": 1}
    assert not errors(browser)


def test_every_view_that_the_text_offers_can_be_set_up(browser: WebDriver, site: str) -> None:
    open_explorer(browser, site)
    links = browser.find_elements(By.CSS_SELECTOR, "a.ttr-view")
    assert len(links) >= 5
    for link in links:
        asked = dict(parse_qsl(urlsplit(link.get_attribute("href")).fragment, strict_parsing=True))
        link.click()
        WebDriverWait(browser, 5).until(
            lambda page, asked=asked: asked.items() <= {n: str(c) for n, c in choices(page).items()}.items()
        )
    assert not errors(browser)


def test_a_written_pair_is_recalled_and_a_dragged_one_moves_the_curve(browser: WebDriver, site: str) -> None:
    open_explorer(browser, site, "memory=delta&beta=1&query=-0.5")
    value = element(browser, "value")
    value.clear()
    value.send_keys("1.5", Keys.ENTER)
    recalled = browser.execute_script("return ttrExplorer.fit(ttrExplorer.choices, [-0.5])")
    assert recalled == pytest.approx([1.5])

    before, query = curve(browser), choices(browser)["query"]
    newest = browser.find_elements(By.CSS_SELECTOR, "#ttr-pairs circle")[-1]
    ActionChains(browser).click_and_hold(newest).move_by_offset(0, 40).release().perform()
    assert choices(browser)["written"]["40"][1] < 1.5
    assert choices(browser)["query"] == query
    assert curve(browser) != before
    assert "written=" in browser.current_url
    assert not errors(browser)


def test_the_stream_can_be_played(browser: WebDriver, site: str) -> None:
    open_explorer(browser, site)
    element(browser, "play").click()
    WebDriverWait(browser, 5).until(lambda page: 2 <= choices(page)["seen"] < 40)
    element(browser, "play").click()
    stopped = choices(browser)["seen"]
    assert f"seen={stopped}" in browser.current_url
