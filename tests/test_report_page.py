"""The page in a browser: it loads alone, sorts, filters, toggles, and can be used by phone, by keyboard, in the dark.

These tests drive the system's Chromium; where there is none they are skipped.
"""

import time
from itertools import pairwise

import pytest
from chromium import browser, seen, sync_api
from report_records import comparison, failed

from svdpeft.compare import report

__all__ = ["browser"]  # a fixture
pytestmark = [
    seen,
    pytest.mark.xdist_group("browser"),  # one worker has it
]
EVIL = "</script><b>bold</b>"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Write the page of a comparison, once for the same options."""
    made = {}

    def write(change=None, **options):
        key = (change, repr(options))
        if key not in made:
            head, runs, trials = comparison(**options)
            if change:
                head, runs, trials = change(head, runs, trials)
            made[key] = tmp_path_factory.mktemp("page") / "report.html"
            made[key].write_text(report.page(report.Results(runs, trials, head)))
        return made[key]

    return write


@pytest.fixture
def opened(browser, written):
    """Open a page; at the end nothing may have gone wrong in it, and nothing but the file been asked for."""
    contexts, wrong, asked = [], [], []

    def open_page(change=None, *, width=1280, height=900, scheme="light", **options):
        file = written(change, **{"items": 60, **options})
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        assert asked == [file.as_uri()]
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []
    assert len(asked) == len(contexts)


def show(page, section):
    """Scroll to a section and wait until its picture is drawn."""
    page.locator(f"#{section}").scroll_into_view_if_needed()
    page.locator(f"#{section} .plot svg").wait_for()


def redrawn(page):
    """Wait until what was changed has been drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def marks(page, section):
    """The methods that have a mark in a picture."""
    return set(
        page.eval_on_selector_all(f"#{section} .plot [data-label]", "all => all.map((mark) => mark.dataset.label)")
    )


def shown(page):
    """The methods in the table, from the top."""
    return page.eval_on_selector_all("#runs tbody tr:not([hidden]) th", "all => all.map((head) => head.dataset.v)")


def chip(page, label):
    return page.locator(f'.chip[data-label="{label}"] input')


def unfold(page, section):
    """Open the numbers of a picture."""
    page.locator(f"#{section} summary").click()
    page.locator(f"#{section} .numbers table").wait_for()


def all_pictures(page):
    for section in ("differences", "cost", "loss", "search", "drift"):
        show(page, section)


def test_it_draws_every_picture_for_every_method(opened):
    page = opened()
    all_pictures(page)
    everyone = set(shown(page))
    assert len(everyone) == 9
    assert marks(page, "differences") == everyone - {"LoRA"}
    assert marks(page, "cost") == marks(page, "loss") == marks(page, "search") == everyone
    assert marks(page, "drift") == everyone - {"Full", "HeadOnly"}  # they have no factors
    for svg in page.locator(".plot svg").all():
        assert svg.get_attribute("role") == "img"
        assert svg.get_attribute("aria-label")
        assert svg.get_attribute("aria-description")


def test_every_column_sorts_both_ways_and_what_is_missing_is_last(opened):
    page = opened()
    heads = page.locator("#runs thead th")
    words = "#runs tbody tr td:nth-child({0}), #runs tbody tr th:nth-child({0})"
    assert heads.nth(1).get_attribute("aria-sort") == "descending"
    for column in range(heads.count()):
        head = heads.nth(column)
        if head.locator("button").count() == 0:
            continue  # the picture of the interval
        for direction in ("ascending", "descending"):
            head.locator("button").click()
            assert head.get_attribute("aria-sort") == direction
            assert page.locator('[aria-sort="ascending"], [aria-sort="descending"]').count() == 1
            values = page.eval_on_selector_all(words.format(column + 1), "all => all.map((cell) => cell.dataset.v)")
            known = [value for value in values if value != ""]
            assert values == known + [""] * (len(values) - len(known))
            if head.get_attribute("data-kind") == "number":
                known = [float(value) for value in known]
            else:
                known = [value.lower() for value in known]
            assert known == sorted(known, reverse=direction == "descending"), head.inner_text()
    assert "Sorted by" in page.locator("#count").inner_text()


def test_the_filter_and_the_switches_work_on_the_table_and_on_every_picture(opened):
    page = opened()
    all_pictures(page)
    chip(page, "PiSSA").uncheck()
    everyone = {"SORSA", "SVFT topk", "LoRA", "DoRA of PiSSA", "SVFT banded", "SVFT plain", "Full", "HeadOnly"}
    assert set(shown(page)) == everyone
    for section in ("differences", "cost", "loss", "search", "drift"):
        show(page, section)
        redrawn(page)
        assert "PiSSA" not in marks(page, section)
        assert "SORSA" in marks(page, section)
    assert page.locator("#count").inner_text() == "8 of 9 shown"

    page.locator("#filter").fill("svft")
    assert set(shown(page)) == {"SVFT topk", "SVFT banded", "SVFT plain"}
    assert page.locator(".chip:visible").count() == 3
    show(page, "loss")
    redrawn(page)
    assert marks(page, "loss") == set(shown(page))
    assert page.locator("#differences tbody tr:visible").count() == 3
    page.locator("#none").click()
    assert shown(page) == []
    page.locator("#filter").fill("")
    assert set(shown(page)) == everyone - {"SVFT topk", "SVFT banded", "SVFT plain"}
    page.locator("#all").click()
    assert len(shown(page)) == 9

    page.locator("#none").click()
    show_empty = page.locator("#loss .plot .empty")
    page.locator("#loss").scroll_into_view_if_needed()
    show_empty.wait_for()
    assert "no method is chosen" in show_empty.inner_text()


def test_budgets_are_chosen_one_by_one(opened):
    page = opened(count=4, budgets=("0.5%", "1%"))
    assert len(shown(page)) == 8
    page.locator("#budget").select_option("1%")
    assert len(shown(page)) == 4
    show(page, "cost")
    unfold(page, "cost")
    assert page.locator("#cost details tbody th").all_inner_texts()[0].endswith(" at 1%")


def test_methods_without_factors_are_shown_at_every_budget(opened):
    page = opened(budgets=("0.5%", "1%"))
    assert len(shown(page)) == 16
    show(page, "differences")
    assert page.locator("#differences .plot circle, #differences .plot path[data-label]").count() >= 16
    for budget in ("0.5%", "1%"):
        page.locator("#budget").select_option(budget)
        assert len(shown(page)) == 9
        assert set(shown(page)) >= {"Full", "HeadOnly"}
        redrawn(page)
        assert marks(page, "differences") == set(shown(page)) - {"LoRA"}
        names = page.locator("#differences tbody tr:visible th").all_inner_texts()
        assert len(names) == 8
        assert f"Full against {budget}" in names
        assert page.locator("#search tbody tr:not([hidden])").count() == 9


def test_methods_as_given_can_be_chosen(opened):
    page = opened(count=4, budgets=(None, "1%"))
    page.locator("#budget").select_option("none")
    assert len(shown(page)) == 4


def _wide(head, runs, trials):
    for run, value in zip([run for run in runs if run["label"] == "PiSSA"], (0.60, 0.93, 0.95), strict=True):
        run["metric"]["value"] = value
    return head, runs, trials


def test_an_interval_that_leaves_the_picture_has_an_arrow(opened):
    page = opened(_wide)
    show(page, "cost")
    lines = "all => all.map((line) => [+line.getAttribute('y1'), +line.getAttribute('y2')])"
    cut = page.locator('#cost .plot .cut [data-label="PiSSA"]')
    assert cut.count() == 2  # above and below
    ends = page.eval_on_selector_all('#cost .plot line[data-label="PiSSA"]', lines)
    low, high = page.locator("#cost .plot svg").evaluate("svg => svg.scale('y').domain.map(svg.scale('y').apply)")
    assert sorted(*ends) == pytest.approx([high, low])
    assert page.locator("#cost .plot svg").evaluate("svg => svg.scale('y').domain[1]") == 100  # no share is above
    bars = page.locator("#runs tr:has(th[data-v='PiSSA']) .bar .cut")
    assert bars.count() == 2
    others = page.locator("#runs tr:has(th[data-v='SVFT plain']) .bar")
    line = others.locator("line:not(.ref)")
    whole = float(line.get_attribute("x1")) >= 4 and float(line.get_attribute("x2")) <= 126
    assert whole == (others.locator(".cut").count() == 0)


def test_intervals_that_have_room_are_whole(opened):
    page = opened(_narrow)
    show(page, "cost")
    show(page, "differences")
    assert page.locator(".plot line[data-label]").count() > 8
    assert page.locator("#cost .cut").count() == 0


def _narrow(head, runs, trials):
    for i, run in enumerate(runs):
        run["metric"]["value"] = 0.5 + 0.05 * (i // 3) + 0.002 * (i % 3)
    return head, runs, trials


def _two_grids(head, runs, trials):
    for trial in trials:
        if trial["label"] == "PiSSA":
            trial["identity"]["lr"] *= 1.2
    return head, runs, trials


@pytest.mark.parametrize("width", [360, 1280])
def test_names_of_learning_rates_do_not_overlap(opened, width):
    page = opened(_two_grids, width=width)
    show(page, "search")
    boxes = page.eval_on_selector_all(
        "#search .plot text",
        "all => all.filter((text) => /e−|^0[.]01$/.test(text.textContent)).map((text) => text.getBoundingClientRect())"
        ".map((box) => [box.left, box.right])",
    )
    ticks = sorted(boxes)
    assert len(ticks) >= 3
    assert all(a[1] < b[0] for a, b in pairwise(ticks)), ticks


def _search_gave_nothing(head, runs, trials):
    for trial in trials:
        if trial["label"] in ("PiSSA", "LoRA"):
            del trial["value"], trial["metric"]
            trial["error" if trial["label"] == "LoRA" else "undefined"] = "RuntimeError: out of memory"
    return head, runs, trials


def test_a_search_that_failed_has_no_chosen_mark_and_what_is_not_defined_no_cross(opened):
    page = opened(_search_gave_nothing, count=4)
    show(page, "search")
    cells = {
        row.locator("th").text_content(): row.locator("td").all_text_contents()
        for row in page.locator("#search tbody tr").all()
    }
    assert cells["LoRA"] == ["–", "", "failed"]
    assert cells["PiSSA"] == ["–", "", "not defined"]
    assert marks(page, "search") == {"SORSA", "SVFT topk", "LoRA"}
    assert page.locator("#search .plot text", has_text="✕").count() == 5


def test_the_axis_of_cost_can_be_changed_and_the_front_follows(opened):
    page = opened()
    show(page, "cost")
    label = page.locator("#cost .plot svg")
    assert label.get_attribute("aria-label") == "accuracy % against trainable"
    unfold(page, "cost")
    for key, heading in (("step", "step ms"), ("memory", "peak MiB"), ("speed", "images/s"), ("factors", "in factors")):
        page.locator("#axis").select_option(key)
        redrawn(page)
        assert label.get_attribute("aria-label") == f"accuracy % against {heading}"
        table = [row.locator("th, td").all_inner_texts() for row in page.locator("#cost details tbody tr").all()]
        cost = {name: float(cells[0]) * (-1 if key == "speed" else 1) for name, *cells in table}
        value = {name: float(cells[1]) for name, *cells in table}
        beaten = {a for a in cost for b in cost if a != b and cost[b] <= cost[a] and value[b] > value[a]}
        assert {name for name, *cells in table if cells[-1] == "yes"} == set(cost) - beaten
    assert "at 0" not in page.locator("#front").inner_text()


def test_what_has_no_place_on_a_logarithmic_axis_is_named(opened):
    page = opened(_one_is_large)
    show(page, "cost")
    page.locator("#axis").select_option("factors")
    redrawn(page)
    assert "Without a place on this axis, at 0: Full, HeadOnly." in page.locator("#front").inner_text()
    assert marks(page, "cost") == set(shown(page)) - {"Full", "HeadOnly"}


def test_curves_are_smoothed_logarithmic_or_as_they_are(opened):
    page = opened()
    show(page, "loss")

    def paths():
        redrawn(page)
        return page.eval_on_selector_all(
            "#loss .plot path[data-label]", "all => all.map((path) => path.getAttribute('d'))"
        )

    smooth = paths()
    page.locator("#smooth").uncheck()
    rough = paths()
    page.locator("#log").check()
    assert len({tuple(smooth), tuple(rough), tuple(paths())}) == 3
    assert len(smooth) == 9 + 3 * 8  # a mean for each, and the seeds of the eight that have a colour


def test_trajectories_of_sites_and_both_ways_to_match(opened):
    page = opened()
    show(page, "drift")
    unfold(page, "drift")
    rows = page.locator("#drift tbody tr")
    assert rows.count() == 7 * 3  # methods with factors, seeds
    by_index = rows.first.locator("td").nth(3).inner_text()
    page.locator("#match").select_option("delta_d_assigned")
    redrawn(page)
    assert float(rows.first.locator("td").nth(3).inner_text()) == pytest.approx(0.8 * float(by_index), rel=0.02)
    page.locator("#view").select_option("0")
    redrawn(page)
    assert rows.count() == 12  # sites
    assert marks(page, "drift") == {shown(page)[0]}


def test_pointing_at_a_method_lights_it_everywhere(opened):
    page = opened()
    show(page, "cost")
    page.locator('.chip[data-label="PiSSA"]').hover()
    assert set(page.eval_on_selector_all(".plot .lit", "all => all.map((m) => m.dataset.label)")) == {"PiSSA"}
    assert page.locator("#runs tr.lit th").inner_text() == "PiSSA"
    page.mouse.move(1, 1)
    assert page.locator(".lit").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pointing_into_a_picture_says_what_is_there(opened, scheme):
    page = opened(scheme=scheme)
    show(page, "differences")
    x = page.locator('#differences .plot path[data-label="SORSA"], #differences .plot circle[data-label="SORSA"]')
    x.first.hover()
    tip = page.locator("#differences .tip text")
    tip.wait_for()
    assert "SORSA" in tip.text_content()
    assert page.locator("#runs tr.lit th").inner_text() == "SORSA"
    paint = "() => getComputedStyle(document.querySelector('#differences .tip path')).fill"
    assert page.evaluate(paint) == {"light": "rgb(238, 241, 245)", "dark": "rgb(35, 41, 50)"}[scheme]


def test_it_can_be_used_by_keyboard_alone(opened):
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    reached, visible = set(), []
    for _ in range(80):
        page.keyboard.press("Tab")
        focus = page.evaluate(
            "() => { const e = document.activeElement; return [e.id || e.closest('[data-label]')?.dataset.label ||"
            " e.closest('th')?.textContent || e.tagName, getComputedStyle(e).outlineStyle] }"
        )
        if focus[0] == "BODY":
            break
        reached.add(focus[0])
        visible.append(focus[1])
    assert {"filter", "all", "none", "SORSA", "accuracy %", "axis", "smooth", "log", "view", "match", "csv"} <= reached
    assert set(visible) <= {"solid", "auto"}

    page.locator('.chip[data-label="SORSA"] input').focus()
    assert page.locator("#runs tr.lit th").inner_text() == "SORSA"
    page.keyboard.press("Space")
    assert "SORSA" not in shown(page)
    page.get_by_role("button", name="trainable").focus()
    page.keyboard.press("Enter")
    assert page.locator('th[aria-sort="ascending"]').inner_text().startswith("trainable")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_the_button(opened, scheme):
    page = opened(scheme=scheme)
    colour = "() => getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(246, 247, 249)", "rgb(16, 19, 23)"
    assert page.evaluate(colour) == (light if scheme == "light" else dark)
    page.locator("#theme").click()
    assert page.evaluate(colour) == (dark if scheme == "light" else light)
    page.locator("#theme").click()
    assert page.evaluate(colour) == (light if scheme == "light" else dark)


@pytest.mark.parametrize("width", [320, 360])
def test_a_phone_scrolls_down_only(opened, width):
    page = opened(width=width, height=740, labels={"PiSSA": "a_very_long_label_without_any_place_to_break_it_" * 3})
    all_pictures(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    table = page.locator("#runs .scroll")
    first = page.locator("#runs tbody th").first
    assert table.evaluate("box => box.scrollWidth > box.clientWidth")
    left = first.bounding_box()["x"]
    table.evaluate("box => box.scrollLeft = 300")
    assert first.bounding_box()["x"] == pytest.approx(left, abs=1)  # the names stay
    for box in page.locator("button:visible, select:visible").all():
        assert box.bounding_box()["height"] >= 24


def test_five_hundred_runs(opened):
    started = time.perf_counter()
    page = opened(count=50, seeds=10, steps=200, items=20, budgets=("0.5%",))
    assert len(shown(page)) == 50
    all_pictures(page)
    page.locator("#filter").fill("sorsa")
    page.locator("#loss").scroll_into_view_if_needed()
    redrawn(page)
    assert marks(page, "loss") == set(shown(page))
    assert len(shown(page)) == 42
    coloured = page.eval_on_selector_all(".chip path", "all => all.map((p) => p.getAttribute('fill'))")
    assert len([colour for colour in coloured if colour != "var(--rest)"]) == 8
    assert time.perf_counter() - started < 60  # about 8 on two cores


def test_methods_have_different_colours_symbols_and_dashes_and_keep_them(opened):
    page = opened()

    def styles():
        found = page.eval_on_selector_all(
            ".chip",
            """all => all.map((chip) => [chip.dataset.label, ...["path fill", "path d", "line stroke-dasharray"]
            .map((of) => chip.querySelector(of.split(" ")[0]).getAttribute(of.split(" ")[1]))])""",
        )
        return {label: style for label, *style in found if style[0] != "var(--rest)"}

    before = styles()
    assert len(before) == 8  # of nine
    assert "HeadOnly" not in before
    chip(page, "SORSA").uncheck()
    after = styles()
    assert after == {label: style for label, style in before.items() if label != "SORSA"} | {
        "HeadOnly": before["SORSA"]
    }
    for part in zip(*after.values(), strict=True):
        assert len(set(part)) == 8


def _one_is_large(head, runs, trials):
    for run in runs[:3]:
        run["parameters"] = {**run["parameters"], "factors": 10**8}
    return head, runs, trials


def _all_failed(head, runs, trials):
    return head, [failed(run) for run in runs], trials


def _no_comparison(head, runs, trials):
    return None, runs, trials


def _one_run(head, runs, trials):
    return head, runs[:1], []


def _diverged(head, runs, trials):
    for run in runs[:3]:
        run["metric"] = {**run["metric"], "value": None}
        run["items"] = {"accuracy": [None] * len(run["items"]["accuracy"])}
        run["loss"] = [[step, None if step > 3 else loss] for step, loss in run["loss"]]
    return head, runs, [failed(trials[0]) | {"rung": 0}, *trials[1:]]


@pytest.mark.parametrize(
    ("change", "options", "missing"),
    [
        (_all_failed, {}, {"runs", "differences", "cost", "loss", "drift"}),
        (_no_comparison, {}, {"differences"}),
        (_one_run, {}, {"differences", "search"}),
        (None, {"seeds": 1}, set()),
        (None, {"trials": False}, {"search"}),
        (None, {"spectra": False}, {"drift"}),
        (None, {"steps": 1}, set()),
        (None, {"budgets": (None,)}, set()),
        (_diverged, {}, set()),
    ],
    ids=[
        "all failed",
        "no comparison.json",
        "one run",
        "one seed",
        "no trials",
        "no spectra",
        "one step",
        "no budget",
        "diverged",
    ],
)
def test_what_is_missing_is_left_out_and_the_rest_is_there(opened, change, options, missing):
    page = opened(change, **{"count": 4, "steps": 12, **options})
    for section in ("runs", "differences", "cost", "loss", "search", "drift"):
        assert page.locator(f"#{section}").is_visible() == (section not in missing), section
        if section not in missing | {"runs"}:
            show(page, section)
        assert page.locator(f'nav a[href="#{section}"]').count() == (section not in missing)
    assert page.locator("#again pre, #again table").count() > 0


def test_a_label_is_never_markup(opened):
    page = opened(count=4, labels={"LoRA": EVIL, "PiSSA": "<img src=x onerror=alert(1)>"})
    all_pictures(page)
    assert page.locator("b, img").count() == 0
    assert EVIL in shown(page)
    assert EVIL in page.locator("#chips").inner_text()
    page.locator("#filter").fill("<img")
    assert len(shown(page)) == 1
    show(page, "cost")
    unfold(page, "cost")
    assert page.locator("#cost tbody th").inner_text() == "<img src=x onerror=alert(1)>"


def test_numbers_and_citations_can_be_taken_away(opened, tmp_path):
    page = opened(count=4)
    for button, name, begins in (("csv", "results.csv", "label,budget,seed"), ("json", "report.json", '{"title"')):
        with page.expect_download() as download:
            page.locator(f"#{button}").click()
        assert download.value.suggested_filename == name
        download.value.save_as(tmp_path / name)
        assert (tmp_path / name).read_text().startswith(begins)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button = page.locator("#cite .copy")
    button.click()
    sync_api.expect(button).to_have_text("Copied")
    assert "hu2022lora" in page.evaluate("navigator.clipboard.readText()")


def test_it_is_whole_without_scripts(browser, written):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(written(items=60).as_uri())
    assert page.locator("#runs tbody tr").count() == 9
    assert page.locator("noscript").inner_text().startswith("Charts, sorting")
    for needless in ("#toolbar", "#cost", "#theme"):
        assert not page.locator(needless).is_visible()
    context.close()


def test_paper_has_every_picture(opened):
    page = opened()
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".plot svg").count() == 5
    assert not page.locator("#toolbar").is_visible()
    assert page.locator("#runs thead button").first.is_visible()
    assert page.locator("#runs .scroll").evaluate("box => getComputedStyle(box).maxHeight") == "none"


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 360)])
def test_axe_finds_nothing(opened, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
    page = opened(scheme=scheme, width=width)
    all_pictures(page)
    for summary in page.locator("summary").all():
        if summary.locator("..").get_attribute("open") is None:
            summary.click()
    page.evaluate("scrollTo(0, 0)")
    found = axe.Axe().run(page).response["violations"]
    assert [(v["id"], v["impact"], [n["html"][:120] for n in v["nodes"][:3]]) for v in found] == []


def test_headings_landmarks_and_captions(opened):
    page = opened()
    levels = [int(tag[1]) for tag in page.eval_on_selector_all("h1,h2,h3", "all => all.map((h) => h.tagName)")]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert page.locator("html").get_attribute("lang") == "en"
    for landmark in ("banner", "main", "navigation", "search", "contentinfo"):
        assert page.get_by_role(landmark).count() == 1
    assert page.locator("table:not(:has(caption))").count() == 0
    assert page.locator("#count").get_attribute("role") == "status"
