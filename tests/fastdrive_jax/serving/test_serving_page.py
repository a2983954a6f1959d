"""The page in headless Chromium."""

import shutil
import time
from pathlib import Path
from urllib.parse import urlsplit

import cv2
import pytest
from tiny_service import picture, running, service_of, until

from fastdrive_jax.serving import worker as worker_module
from fastdrive_jax.serving.demo import DemoDrive, DemoFrame
from fastdrive_jax.serving.programs import run_batch

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and chromium-driver are not installed"
)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def draw(frame: int) -> DemoFrame:
    jpeg = cv2.imencode(".jpg", picture(frame)[..., ::-1])[1].tobytes()
    return DemoFrame({"CAM_FRONT": jpeg}, 4.0, 1, ((2.0, 0.0), (4.0, 0.5)))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_window_size(1280, 900)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(browser, ready):
    """The page, playing, once it has shown two frames."""
    with running(service_of(ready, demo=[DemoDrive("a drive", 30, 0.1, draw)])) as address:
        browser.get(address)
        until(lambda: int(told(browser, "frame") or 0) >= 2)
        yield browser
        browser.get("about:blank")


def told(browser, name: str) -> str | None:
    return browser.execute_script(f"return document.body.dataset.{name} ?? null")


def found(browser, selector: str):
    return browser.find_element("css selector", selector)


def brightness(browser) -> list[float]:
    """Of the canvas in the middle of each token."""
    script = """
      const canvas = document.getElementById("canvas-CAM_FRONT");
      const context = canvas.getContext("2d");
      const { data, width } = context.getImageData(0, 0, canvas.width, canvas.height);
      const [rows, columns] = [2, 5];
      return [...Array(rows * columns).keys()].map((token) => {
        const x = Math.floor(((token % columns) + 0.5) * canvas.width / columns);
        const y = Math.floor((Math.floor(token / columns) + 0.5) * canvas.height / rows);
        return (data[4 * (y * width + x)] + data[4 * (y * width + x) + 1]) / 2;
      });
    """
    return browser.execute_script(script)


def test_it_plays_and_follows_the_slider(page, tmp_path):
    assert found(page, "#state").text == "ready"
    assert told(page, "kept") == "5"  # it starts with half
    slider = found(page, "#ratio")
    slider.send_keys("\ue014")  # arrow right
    until(lambda: told(page, "kept") == "10")
    assert slider.get_attribute("aria-valuetext") == "100%, 10 tokens"
    slider.send_keys("\ue012")  # arrow left
    until(lambda: told(page, "kept") == "5")
    shot = tmp_path / "page.png"
    assert page.save_screenshot(str(shot))
    pixels = cv2.imread(str(shot))
    assert pixels.std() > 20  # no blank page
    assert page.get_log("browser") == []


def test_pruned_tokens_are_shaded_and_kept_ones_are_not(page):
    found(page, "#play").click()  # pause
    until(lambda: found(page, "#play").text == "Play")
    time.sleep(0.3)
    label = found(page, "#canvas-CAM_FRONT").get_attribute("aria-label")
    assert label == "CAM_FRONT: 5 of 10 tokens kept"
    shaded = brightness(page)
    found(page, "#shade").click()
    plain = brightness(page)
    found(page, "#shade").click()
    page.get_log("browser")  # reading a canvas twice is worth a hint to Chromium
    darker = [a < 0.7 * b for a, b in zip(shaded, plain, strict=True)]
    same = [abs(a - b) < 1 for a, b in zip(shaded, plain, strict=True)]
    assert sum(darker) == 5
    assert sum(same) == 5


def test_a_latency_target_takes_the_place_of_the_ratio(page):
    found(page, "[value=target]").click()
    assert not found(page, "#ratio").is_displayed()
    assert found(page, "#target").is_displayed()
    until(lambda: "target" in found(page, "#facts").text)
    found(page, "[value=ratio]").click()
    until(lambda: "target" not in found(page, "#facts").text)
    assert page.get_log("browser") == []


def test_the_plan_is_drawn_and_told(page):
    assert len(page.find_elements("css selector", "#map .dot")) == 6
    assert found(page, "#map-text").text.startswith("In 3 s: ")
    rows = page.find_elements("css selector", "#waypoints tr")
    assert len(rows) == 6


def test_who_restarts_while_a_plan_is_on_its_way_begins_anew(page, monkeypatch):
    def slow(*given):
        time.sleep(0.3)
        return run_batch(*given)

    if found(page, "#play").text == "Pause":
        found(page, "#play").click()
    monkeypatch.setattr(worker_module, "run_batch", slow)
    page.execute_script(
        "const click = (id) => document.getElementById(id).click();"
        "click('step'); setTimeout(() => click('again'), 150)"
    )
    until(lambda: found(page, "#place-text").text == "1 of 30")
    until(lambda: page.execute_script("return document.body.dataset.frame") == "0", 5)
    assert found(page, "#notes").text == ""


def test_frames_of_ones_own_are_planned(page, tmp_path):
    files = []
    for frame in range(2):
        file = tmp_path / f"frame{frame}.png"
        file.write_bytes(cv2.imencode(".png", picture(40 + frame)[..., ::-1])[1].tobytes())
        files.append(str(file))
    found(page, "#files").send_keys("\n".join(files))
    until(lambda: found(page, "#drop-text").text.startswith("2 frames"))
    until(lambda: found(page, "#place-text").text == "2 of 2")
    assert page.get_log("browser") == []


def test_a_text_file_is_refused_in_words(page, tmp_path):
    file = Path(tmp_path / "notes.png")
    file.write_text("no picture")
    found(page, "#files").send_keys(str(file))
    until(lambda: "neither JPEG nor PNG" in found(page, "#notes").text)
    logged = page.get_log("browser")  # the browser's own line on the refused request
    assert all("415" in one["message"] for one in logged)


def test_nothing_is_wider_than_a_phone(page):
    size = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    until(lambda: page.execute_script("return window.innerWidth") == 360)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_every_control_has_a_name(page):
    names = page.execute_script(
        "return [...document.querySelectorAll('input, select, button')].map("
        "(e) => e.textContent.trim() || e.labels?.[0]?.textContent.trim() || '')"
    )
    assert len(names) >= 12
    assert all(names)


def test_it_says_that_the_service_is_gone_and_goes_on_when_it_is_back(page, ready):
    demo = [DemoDrive("a drive", 30, 0.1, draw)]
    with running(service_of(ready, demo=demo)) as address:
        page.get(address)
        until(lambda: int(told(page, "frame") or 0) >= 2)
    until(lambda: found(page, "#state").text == "no connection")
    assert "does not answer" in found(page, "#notes").text
    assert found(page, "main[inert]")
    page.execute_script("document.body.dataset.frame = -1")
    with running(service_of(ready, demo=demo), urlsplit(address).port):
        until(lambda: int(told(page, "frame") or 0) >= 1)  # not loaded anew, and playing
        assert found(page, "#state").text == "ready"
        assert found(page, "#notes").text == ""
        page.get("about:blank")
