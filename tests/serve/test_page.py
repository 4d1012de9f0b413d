"""The page in a real Chromium, asking a live server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import draw

pytest.importorskip("litune.serve.app", reason="the server is of the extra serve")

from litune.serve import messages
from litune.serve.app import PAGE

TOKEN = "a-token-of-the-tests"
SCORES = "[...document.querySelectorAll('.descriptions output')].map((one) => parseFloat(one.textContent) / 100)"


def wait(browser: Any, condition: str, seconds: float = 20) -> Any:
    """The value of a JavaScript expression, as soon as it is true."""
    from selenium.webdriver.support.wait import WebDriverWait

    return WebDriverWait(browser, seconds, 0.05).until(lambda b: b.execute_script(f"return {condition}"), condition)


@pytest.fixture
def address(live: Callable[..., Any]) -> str:
    return f"http://127.0.0.1:{live().port}/"


def open_page(browser: Any, address: str) -> None:
    browser.get("about:blank")  # so that another hash is another visit
    browser.get(address)
    wait(browser, "document.getElementById('loading').hidden")


def pictures_drawn(browser: Any) -> None:
    shown = "[...document.images].filter((one) => one.offsetParent)"
    wait(browser, f"{shown}.every((one) => one.complete && one.naturalWidth)")


def test_match(browser: Any, address: str, model: Any, made: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    open_page(browser, address + "#match?img=3&t=a+red+box&t=a+blue+ring")
    wait(browser, f"{SCORES}.length == 2 && {SCORES}.every((one) => one >= 0)")
    pictures_drawn(browser)
    path = tmp_path / "own.png"
    draw("red", "box", 64).save(path)
    browser.find_element(By.CSS_SELECTOR, "#panel-match input[type=file]").send_keys(str(path))
    wait(browser, "document.querySelector('.shown img').src.startsWith('blob:')")
    texts = ["a red box", "a blue ring"]
    exact = (model.scale.detach() * (model.encode_image(path) @ model.encode_text(texts).T)).softmax(1)[0]
    wait(browser, f"Math.abs({SCORES}[0] - {float(exact[0])}) < 0.0006")

    # An answer that comes late is not taken for the answer to what was typed since.
    browser.execute_script(
        "const real = window.fetch; let late = true; window.answered = 0;"
        "window.fetch = async (...asked) => {"
        "  const slow = late && String(asked[0]).endsWith('/match'); if (slow) late = false;"
        "  const found = await real(...asked);"
        "  if (slow) await new Promise((go) => setTimeout(go, 900));"
        "  if (String(asked[0]).endsWith('/match')) window.answered++;"
        "  return found; };"
    )
    box = browser.find_elements(By.CSS_SELECTOR, ".descriptions input")[1]
    box.send_keys("s")
    wait(browser, "location.hash.endsWith('rings')")
    box.send_keys(Keys.BACKSPACE, " and more")
    wait(browser, "window.answered == 2")
    texts = ["a red box", "a blue ring and more"]
    exact = (model.scale.detach() * (model.encode_image(path) @ model.encode_text(texts).T)).softmax(1)[0]
    np.testing.assert_allclose(browser.execute_script(f"return {SCORES}"), exact, atol=6e-4)


def test_classify_and_search(browser: Any, address: str, model: Any, made: Any) -> None:
    from selenium.webdriver.common.by import By

    import litune

    store = litune.FeatureStore(made.store)
    features = model.encode_features(store.features(slice(None)))
    classes = ["red", "blue"]
    open_page(browser, address + "#classes?c=red&c=blue&n=all")
    wait(browser, "document.querySelector('#panel-classes table')")
    counts = [int(one.text) for one in browser.find_elements(By.CSS_SELECTOR, ".column h2 span")]
    found = model.zero_shot(classes).probabilities(features).argmax(1)
    assert counts == torch.bincount(found, minlength=2).tolist()

    browser.find_element(By.CSS_SELECTOR, "nav a[href^='#search']").click()
    browser.find_element(By.CSS_SELECTOR, "#panel-search input[type=search]").send_keys("a green bar")
    wait(browser, "document.querySelector('.tile .score')")
    scores = (features @ model.encode_text(["a green bar"]).T)[:, 0]
    wait(browser, f"document.querySelector('.tile').dataset.row == '{int(scores.argmax())}'")
    pictures_drawn(browser)
    browser.find_elements(By.CSS_SELECTOR, ".tile")[2].click()
    wait(browser, "location.hash.startsWith('#search?like=')")
    browser.back()
    wait(browser, "location.hash == '#search?q=a+green+bar'")
    browser.back()
    wait(browser, "document.title.startsWith('Classify') && document.querySelectorAll('.column').length == 2")


TEXTS = "[...document.querySelectorAll('.descriptions input')].map((one) => one.value)"
TILES = "[...document.querySelectorAll('.tile')].map((one) => Number(one.dataset.row))"


def test_examples_make_way_and_typed_texts_stay(browser: Any, address: str, tmp_path: Path) -> None:
    """Another picture takes along the descriptions that came with the one before, and none that were typed."""
    from selenium.webdriver.common.by import By

    open_page(browser, address + "#match")
    wait(browser, f"{SCORES}.length == 4 && {SCORES}.every((one) => one >= 0)")
    before = browser.execute_script(f"return {TEXTS}")
    box = browser.find_elements(By.CSS_SELECTOR, ".descriptions input")[2]
    box.send_keys(" of mine")
    path = tmp_path / "own.png"
    draw("red", "box", 64).save(path)
    browser.find_element(By.CSS_SELECTOR, "#panel-match input[type=file]").send_keys(str(path))
    wait(browser, "document.querySelector('.shown img').src.startsWith('blob:')")
    texts = wait(browser, f"{SCORES}.every((one) => one >= 0) && {TEXTS}")
    assert texts[0] == f"{before[2]} of mine"
    assert not set(texts) & set(before)
    assert len(texts) == 4
    names = "[...document.querySelectorAll('.descriptions input')].map((one) => one.getAttribute('aria-label'))"
    assert browser.execute_script(f"return {names}") == [f"Description {i}" for i in range(1, 5)]
    browser.find_element(By.CSS_SELECTOR, ".film button").click()
    wait(browser, "location.hash.includes('img=')")
    assert wait(browser, f"{SCORES}.every((one) => one >= 0) && {TEXTS}")[0] == f"{before[2]} of mine"


def test_a_row_that_is_not_there(browser: Any, address: str) -> None:
    open_page(browser, address + "#match?img=99999&t=a")
    line = wait(browser, "document.querySelector('.shown p')?.innerText")
    assert line == "Picture 99999 can't be shown: it is not in this collection, or its file is gone."
    message = wait(browser, "!document.getElementById('error').hidden && document.getElementById('error').innerText")
    assert "There is no row 99999: they go from 0 to 11." in message


def test_filters(browser: Any, address: str, made: Any) -> None:
    """By keyboard: a value to choose, a text; in the address, taken away again, without and with words."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    import litune

    labels = litune.FeatureStore(made.store).metadata["label"].to_pylist()
    red = [row for row, label in enumerate(labels) if label == "red"]
    open_page(browser, address + "#search")
    button = wait(browser, "document.querySelector('[aria-controls=filter-form]:not([hidden])')")
    button.send_keys(Keys.ENTER)
    assert button.get_attribute("aria-expanded") == "true"
    column = browser.switch_to.active_element
    Select(column).select_by_value("label")
    value = browser.find_element(By.CSS_SELECTOR, "#filter-form .value select")
    assert [one.text for one in Select(value).options] == sorted(set(labels))
    Select(value).select_by_value("red")
    browser.find_element(By.CSS_SELECTOR, "#filter-form [type=submit]").send_keys(Keys.ENTER)
    wait(browser, f"location.hash == '#search?where=label%3Dred' && JSON.stringify({TILES}) == '{json.dumps(red)}'"
         .replace(", ", ","))  # fmt: skip
    browser.find_element(By.CSS_SELECTOR, "#panel-search input[type=search]").send_keys("a green bar")
    wait(browser, f"document.querySelector('.tile .score') && {TILES}.length == {len(red)}")
    assert sorted(browser.execute_script(f"return {TILES}")) == red
    wait(browser, "location.hash == '#search?q=a+green+bar&where=label%3Dred'")
    column.send_keys(Keys.ESCAPE)
    assert not column.is_displayed()
    browser.find_element(By.CSS_SELECTOR, ".chips button").send_keys(Keys.ENTER)
    wait(browser, f"{TILES}.length == 12 && location.hash == '#search?q=a+green+bar'")
    open_page(browser, address + "#search?where=width>100000")
    assert "No picture meets the filters." in wait(
        browser, "[...document.querySelectorAll('#panel-search .note')].find((one) => one.offsetParent)?.innerText"
    )
    open_page(browser, address + "#search?where=labl=red")
    wait(browser, "document.getElementById('error').innerText.includes(\"perhaps you meant 'label'\")")


def test_inputs_take_what_the_server_takes(browser: Any, address: str) -> None:
    open_page(browser, address + "#match")
    most = "[...document.querySelectorAll('.descriptions input, [type=search]')].map((one) => one.maxLength)"
    assert set(browser.execute_script(f"return {most}")) == {messages.MAX_TEXT}
    wait(browser, "document.querySelector('#filter-form')")
    assert f"filter: {messages.MAX_CONDITION}" in (PAGE / "dom.js").read_text()


def test_token_and_a_server_that_is_gone(browser: Any, live: Callable[..., Any]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    server = live(token=TOKEN)
    browser.get(f"http://127.0.0.1:{server.port}/#search?q=red")
    for value in ("not-the-token", TOKEN):
        wait(browser, "document.getElementById('token').open")
        browser.find_element(By.ID, "token-value").send_keys(value, Keys.ENTER)
        if value != TOKEN:
            wait(browser, "document.getElementById('token-why').textContent.includes('did not accept')")
    wait(browser, "document.querySelector('.tile .score')")
    pictures_drawn(browser)  # each was asked for with the token
    server.stop()
    browser.find_element(By.CSS_SELECTOR, "#panel-search input[type=search]").send_keys(" box")
    message = wait(browser, "!document.getElementById('error').hidden && document.getElementById('error').innerText")
    assert "The server does not answer" in message


NAMELESS = """
const all = [...document.querySelectorAll('button, input, select, textarea, a')];
return all.filter((one) => one.offsetParent).filter((one) => !(
  one.getAttribute('aria-label') || one.innerText?.trim() || one.labels?.length || one.querySelector?.('img[alt]')
)).map((one) => one.outerHTML)
"""


@pytest.mark.parametrize("panel", ["match", "classes", "search?q=red&like=2"])
def test_small_screens_and_names(browser: Any, address: str, panel: str) -> None:
    """Nothing is wider than a phone, everything has a name, and colours can be chosen."""
    from selenium.webdriver.common.by import By

    size = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        open_page(browser, f"{address}#{panel}")
        wait(browser, "document.querySelector('.descriptions output, .column, .tile')")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 360
        assert browser.execute_script(NAMELESS) == []
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    ground = set()
    for _ in range(3):
        browser.find_element(By.ID, "theme").click()
        ground.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert len(ground) == 2
    assert json.loads(browser.execute_script("return JSON.stringify(document.documentElement.dataset)")) == {}
