"""The page in a real browser, Debian's chromium, without a window: skipped where there is none."""

import json
import shutil
import time

import pytest

from flatmin.report import write_report

webdriver = pytest.importorskip("selenium.webdriver")
SWITCHES = "--headless=new --no-sandbox --disable-dev-shm-usage --use-angle=swiftshader --enable-unsafe-swiftshader"
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=2>"
pytestmark = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs chromium and chromium-driver (apt-get install chromium chromium-driver)",
)


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


@pytest.fixture
def browser(chromium, comparison):
    """Opens a comparison's page; every plot is drawn, for the window is as high as the page."""

    def open_page(labels=("base", "sam", HOSTILE), *, width=1200, scheme="light", height=9000):
        page = write_report([comparison(labels)])
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        set_scheme(chromium, scheme)
        for kind in ("browser", "performance"):
            chromium.get_log(kind)
        chromium.get(page.as_uri())
        missing = "return [...document.querySelectorAll('.plot')].filter(plot => !plot._fullLayout).length"
        wait(lambda: chromium.execute_script(missing) == 0)
        return chromium

    return open_page


def set_scheme(driver, scheme):
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def wait(ready):
    for _ in range(150):
        if ready():
            return
        time.sleep(0.1)
    pytest.fail("the page did not come to it in 15 seconds")


def test_no_error_no_request_and_nothing_of_a_users_runs(browser):
    driver = browser()
    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert [url for url in urls if not url.startswith(("file:", "data:", "blob:"))] == []
    assert sum(url.startswith("file:") for url in urls) == 1
    assert driver.execute_script("return window.hacked === undefined")


def test_every_plot_has_its_data(browser):
    script = """return [...document.querySelectorAll('.plot')].map(plot => plot.data.some(trace =>
        (trace.z ?? trace.x)?.length > 0) && plot.querySelector('svg.main-svg, canvas') !== null)"""
    drawn = browser().execute_script(script)
    assert len(drawn) > 15
    assert all(drawn)


def test_dark_and_light_reach_the_plots(browser):
    driver = browser(scheme="dark")
    ink = "return document.querySelector('.plot').layout.font.color"
    dark = driver.execute_script(ink)
    set_scheme(driver, "light")
    wait(lambda: driver.execute_script(ink) != dark)
    assert driver.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(247, 246, 242)"


def test_a_phone_does_not_scroll_sideways(browser):
    driver = browser(("base", "sam", "saf with=a very long label"), width=320, height=20000)
    assert driver.execute_script("return document.documentElement.scrollWidth") == 320


def test_by_keyboard(browser):
    from selenium.webdriver.common.keys import Keys

    driver = browser(("base", "sam", "saf"))
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


def test_a_method_is_hidden_everywhere_and_surfaces_turn_together(browser):
    driver = browser(("base", "sam", "saf"))
    driver.execute_script("document.querySelectorAll('.method')[1].click()")
    hidden = "return document.querySelector('[data-figure$=test_accuracy]').data.map(trace => trace.visible ?? true)"
    assert driver.execute_script(hidden) == [True, False, True, True, False, True]
    eyes = "return [...document.querySelectorAll('[data-landscape]')].map(p => p._fullLayout.scene.camera.eye.x)"
    before = driver.execute_script(eyes)
    driver.execute_script("document.querySelector('[data-turn=left]').click()")
    wait(lambda: all(now != was for now, was in zip(driver.execute_script(eyes), before, strict=True)))
    assert len(set(driver.execute_script(eyes))) == 1
    driver.execute_script("document.querySelector('[data-view=map]').click()")
    kinds = "return [...document.querySelectorAll('[data-landscape]')].map(plot => plot.data[0].type)"
    assert set(driver.execute_script(kinds)) == {"contour"}
