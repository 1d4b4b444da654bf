"""The page in a real browser: headless Chromium, driven by selenium."""

import json
import os
import shutil
import subprocess
import time
import warnings

import pytest

from heterolora.page.render import write_page
from tests.conftest import ROOT
from tests.runs import ranks_of, tiny_space, write_history, write_run

pytestmark = pytest.mark.slow

WIDTHS = (400, 1280)


@pytest.fixture(scope="module")
def chrome():
    """A driver; skipped where there is no Chromium and none can be installed."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="no selenium: pip install -e '.[dev]'")
    try:
        done = subprocess.run(
            [str(ROOT / ".ci" / "install-chromium")], capture_output=True, text=True, timeout=600, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"Chromium could not be installed: {error}")
    if done.returncode:
        pytest.skip(f"Chromium could not be installed: {' '.join(done.stderr.split())[-300:]}")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--disable-dev-shm-usage", "--disable-gpu", "--force-prefers-reduced-motion"):
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # selenium leaves sockets to the collector
        driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Twelve finished runs, the first of them dynamic, one with a hostile name, and one that failed."""
    root, space = tmp_path_factory.mktemp("page"), tiny_space()
    for number in range(12):
        proxy = ("snip", "spectral", "grad_norm")[number % 3]
        title = "<script>document.title='broken'</script>" if number == 3 else None
        ranks = ranks_of(space, number) | {"0.q": 0, "1.v": 3}
        seed, accuracy = number // 3, 0.7 + 0.001 * (7 * number % 12)
        write_run(root / f"{number}_run", space, proxy=proxy, seed=seed, accuracy=accuracy, ranks=ranks, title=title)
    write_history(root / "0_run", space)
    write_run(root / "12_run", space, state="failed", error="no memory <b>left</b>")
    write_page([root], root / "report.html")
    return root / "report.html"


@pytest.fixture
def opened(chrome, page):
    """The page, wide, with the first run drawn."""
    return look(chrome, page, 1280)


def look(chrome, page, width):
    chrome.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    chrome.get(page.as_uri())
    until(lambda: chrome.execute_script("return document.getElementById('shown').dataset.run") == "0")
    return chrome


def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


def draw_everything(chrome):
    """Scroll through the page, so that every figure comes into view."""
    for plot in chrome.find_elements("css selector", ".plot"):
        chrome.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
        until(lambda plot=plot: plot.get_attribute("data-drawn"))


def column(chrome, table, name):
    """Texts of a column, top to bottom, of the rows that can be seen."""
    heads = [head.text.strip() for head in chrome.find_elements("css selector", f"#{table} th")]
    index = heads.index(name) + 1
    cells = chrome.find_elements("css selector", f"#{table} tbody tr:not([hidden]) td:nth-child({index})")
    return [cell.text for cell in cells]


def head(chrome, table, name):
    heads = chrome.find_elements("css selector", f"#{table} th")
    return next(found for found in heads if found.text.strip() == name)


def figure(chrome, caption):
    """The drawn figure with this caption."""
    found = next(f for f in chrome.find_elements("css selector", "figure") if f.text.startswith(caption))
    plot = found.find_element("css selector", ".plot")
    chrome.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", plot)
    until(lambda: plot.get_attribute("data-drawn"))
    return plot


def hover(chrome, plot, x, y):
    """Move the mouse to a cell of a map; the tooltip's text, empty if there is none."""
    across, down = chrome.execute_script(
        "const [plot, x, y] = arguments, { xaxis, yaxis } = plot._fullLayout, box = plot.getBoundingClientRect();"
        "const at = (axis, v) => axis._offset + axis.l2p(axis.type === 'category' ? axis._categories.indexOf(v) : v);"
        "return [box.left + at(xaxis, x), box.top + at(yaxis, y)]",
        plot, x, y,
    )  # fmt: skip
    for nudge in (3, 0):
        mouse = {"type": "mouseMoved", "x": across + nudge, "y": down}
        chrome.execute_cdp_cmd("Input.dispatchMouseEvent", mouse)
    time.sleep(0.4)
    return " ".join(text.text for text in plot.find_elements("css selector", ".hoverlayer .hovertext"))


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_goes_wrong_and_nothing_is_fetched(chrome, page, width):
    chrome.get_log("browser"), chrome.get_log("performance")
    look(chrome, page, width)
    draw_everything(chrome)
    assert chrome.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert {url for url in urls if not url.startswith(("data:", "blob:"))} == {page.as_uri()}
    assert chrome.title != "broken"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_its_window_and_can_be_read(chrome, page, width):
    look(chrome, page, width)
    draw_everything(chrome)
    assert chrome.execute_script("return document.documentElement.scrollWidth") <= width
    sizes = chrome.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => e.checkVisibility() && "
        "[...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && !['SCRIPT', 'STYLE'].includes(e.tagName))"
        ".map(e => [parseFloat(getComputedStyle(e).fontSize), e.tagName, e.textContent.slice(0, 30)])"
    )
    assert len(sizes) > 300
    assert min(sizes)[0] >= 11, min(sizes)


def test_the_table_sorts_numbers_as_numbers_and_says_so(opened):
    name = "test accuracy"
    before = column(opened, "runs", name)
    head(opened, "runs", name).find_element("css selector", "button").click()
    falling = column(opened, "runs", name)
    assert falling != before
    assert falling == [*sorted(filter(None, before), reverse=True), ""]  # the failed run has none, and stands last
    assert head(opened, "runs", name).get_attribute("aria-sort") == "descending"
    head(opened, "runs", name).find_element("css selector", "button").send_keys("\n")  # by keyboard
    assert column(opened, "runs", name) == [*sorted(filter(None, before)), ""]
    assert head(opened, "runs", name).get_attribute("aria-sort") == "ascending"
    head(opened, "runs", "run").find_element("css selector", "button").click()
    assert column(opened, "runs", "run") == [f"{number}_run" for number in range(13)]  # 2 before 10
    assert head(opened, "runs", name).get_attribute("aria-sort") == "none"


def test_the_filter_hides_rows(opened):
    box = opened.find_element("css selector", "[data-table=runs] input[type=search]")
    box.send_keys("SPECTRAL 4_")
    assert column(opened, "runs", "run") == ["4_run"]
    assert "1 of 13 rows" in opened.find_element("css selector", "[data-table=runs]").text
    box.clear()
    box.send_keys(" ")
    assert len(column(opened, "runs", "run")) == 13


def test_the_map_shows_a_tooltip_with_site_rank_and_cost(opened):
    plot = figure(opened, "Rank of each site")
    text = hover(opened, plot, 1, "v")
    for part in ("1.v", "rank 3", "192 parameters", "% of the budget", "snip", "of 29"):
        assert part in text
    assert "rank 0" in hover(opened, plot, 0, "q")
    assert hover(opened, plot, 0, "shortcut_ffn") == ""  # no such site


def test_another_run_is_shown_when_it_is_asked_for(opened):
    opened.find_element("css selector", "button[data-run='3']").click()
    until(lambda: opened.find_element("id", "shown").get_attribute("data-run") == "3")
    assert "<script>document.title" in opened.find_element("id", "shown").text  # as text
    assert "Decisions of the dynamic run" not in opened.find_element("id", "shown").text
    opened.find_element("id", "after").click()
    until(lambda: opened.find_element("id", "shown").get_attribute("data-run") == "4")
    from selenium.webdriver.support.ui import Select

    Select(opened.find_element("id", "chosen")).select_by_visible_text("0_run")
    until(lambda: opened.find_element("id", "shown").get_attribute("data-run") == "0")
    assert "Decisions of the dynamic run" in opened.find_element("id", "shown").text
    plot = figure(opened, "Rank of each site over time")
    assert "every 10 steps <1>" in hover(opened, plot, "10", "0.q")
