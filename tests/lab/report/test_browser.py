"""The page in a real browser, Debian's chromium, without a window: skipped where there is none."""

import base64
import json
import re
import shutil
import time

import pytest

from flatmin.lab.report import write_report

webdriver = pytest.importorskip("selenium.webdriver")
SWITCHES = "--headless=new --no-sandbox --disable-dev-shm-usage --use-angle=swiftshader --enable-unsafe-swiftshader"
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2>"
pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs chromium and chromium-driver (apt-get install chromium chromium-driver)",
)


WIDE = {"width": 1200, "height": 9000, "deviceScaleFactor": 1, "mobile": False}  # every plot is in the window


@pytest.fixture(scope="module")
def chromium():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for switch in SWITCHES.split():
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def opened(chromium, make_comparison, tmp_path_factory):
    """Opens the page of a comparison once for all tests; returns what the browser said and asked for meanwhile."""
    page = write_report([make_comparison(tmp_path_factory.mktemp("browser"), ("base", "sam", HOSTILE))])
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", WIDE)
    set_media(chromium)
    chromium.get(page.as_uri())
    missing = "return [...document.querySelectorAll('.plot')].filter(plot => !plot._fullLayout).length"
    wait(lambda: chromium.execute_script(missing) == 0)
    return {kind: chromium.get_log(kind) for kind in ("browser", "performance")}


@pytest.fixture
def driver(chromium, opened):
    """The browser with the page open, wide and light."""
    yield chromium
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", WIDE)
    set_media(chromium)


def set_media(driver, media="", scheme="light"):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


def wait(ready):
    for _ in range(300):
        if ready():
            return
        time.sleep(0.05)
    pytest.fail("the page did not come to it in 15 seconds")


def test_no_error_no_request_and_nothing_of_a_users_runs(driver, opened):
    assert [entry for entry in opened["browser"] if entry["level"] == "SEVERE"] == []
    events = [json.loads(entry["message"])["message"] for entry in opened["performance"]]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []
    assert sum(url.startswith("file:") for url in urls) == 1
    assert driver.execute_script("return window.hacked === undefined")


def test_every_plot_has_its_data(driver):
    script = """return [...document.querySelectorAll('.plot')].map(plot => plot.data.some(trace =>
        (trace.z ?? trace.x)?.length > 0) && plot.querySelector('svg.main-svg, canvas') !== null)"""
    drawn = driver.execute_script(script)
    assert len(drawn) > 15
    assert all(drawn)


def test_dark_and_light_reach_the_plots(driver):
    ink = "return document.querySelector('.plot').layout.font.color"
    light = driver.execute_script(ink)
    assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(247, 246, 242)"
    set_media(driver, scheme="dark")
    wait(lambda: driver.execute_script(ink) != light)
    assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 24)"


def test_a_phone_does_not_scroll_sideways(driver):
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**WIDE, "width": 320, "height": 20000})
    wait(lambda: driver.execute_script("return document.documentElement.scrollWidth") == 320)


def test_by_keyboard(driver):
    from selenium.webdriver.common.keys import Keys

    driver.execute_script("document.body.tabIndex = -1; document.body.focus()")
    focus = "return document.activeElement"
    driver.switch_to.active_element.send_keys(Keys.TAB)
    assert driver.execute_script(focus).get_attribute("class") == "skip"
    seen, wanted = set(), {"scroll summary", "method", "left", "quiet"}
    for _ in range(150):
        if wanted <= seen:
            break
        driver.switch_to.active_element.send_keys(Keys.TAB)
        seen.add(driver.execute_script(focus + ".className || document.activeElement.dataset.turn || ''"))
    assert wanted <= seen


def test_on_paper_the_table_and_all_plots_as_maps(driver):
    printed = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"])
    assert printed.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 9
    set_media(driver, "print")
    heights = "return [...document.querySelectorAll('.summary table, .verdict, pre')].map(part => part.offsetHeight)"
    assert min(driver.execute_script(heights)) > 20
    nothing = "return getComputedStyle(document.querySelector('nav')).display"
    assert driver.execute_script(nothing) == "none"


def test_a_method_is_hidden_in_all_curves(driver):
    button = "document.querySelectorAll('.method')[1].click()"
    driver.execute_script(button)
    shown = """return [...document.querySelectorAll('[data-curves]')].flatMap(plot =>
        plot.data.filter(trace => trace.meta.row === 1).map(trace => trace.visible ?? true))"""
    assert len(driver.execute_script(shown)) > 8
    assert not any(driver.execute_script(shown))
    assert driver.execute_script(
        "return document.querySelector('[data-figure$=cost]').data.every(t => t.visible ?? true)"
    )
    driver.execute_script(button)
    assert all(driver.execute_script(shown))


def test_surfaces_turn_together_and_are_maps_if_asked(driver):
    eyes = "return [...document.querySelectorAll('[data-landscape]')].map(p => p._fullLayout.scene?.camera.eye.x)"
    wait(lambda: None not in driver.execute_script(eyes))
    before = driver.execute_script(eyes)
    driver.execute_script("document.querySelector('[data-turn=left]').click()")
    wait(lambda: all(now != was for now, was in zip(driver.execute_script(eyes), before, strict=True)))
    assert len(set(driver.execute_script(eyes))) == 1
    driver.execute_script("document.querySelector('[data-view=map]').click()")
    kinds = "return [...document.querySelectorAll('[data-landscape]')].map(plot => plot.data[0].type)"
    assert set(driver.execute_script(kinds)) == {"contour"}
