"""What the page is made of, without a browser: escaped words, its own scripts, published libraries, size, colours."""

import base64
import hashlib
import itertools
import json
import math
import re
import statistics
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest
from report_records import comparison, failed

from svdpeft.compare import report
from svdpeft.compare.report.payload import ALL_POINTS, payload, thin

ASSETS = files("svdpeft.compare.report").joinpath("page")


def results(change=None, **options):
    """The results of a small comparison, its parts changed by a function first."""
    head, runs, trials = comparison(**{"count": 4, "items": 60, "steps": 20, **options})
    if change:
        change(head, runs, trials)
    return report.Results(runs, trials, head)


class Elements(HTMLParser):
    """What a browser's parser would find."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.script, self.texts, self.inside = [], {}, [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside = dict(attributes).get("id", "code") if tag == "script" else ""

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside:
            self.script[self.inside] = self.script.get(self.inside, "") + data
        else:
            self.texts.append(data)


EVIL = """</script><b onclick="x">&'"<!-- ${x} \u2028 ]]> `"""


def test_whatever_a_record_says_is_only_text():
    def change(head, runs, trials):
        runs[0] = failed(runs[0], EVIL)
        for run in runs:
            run["machine"] = {**run["machine"], "device": EVIL}
            run["identity"]["model"] = EVIL
        for run in runs[1:]:
            run["method"] = {**run["method"], "text": EVIL}

    found = results(change, labels={"LoRA": EVIL})
    page = Elements(report.page(found))
    plain = Elements(report.page(results()))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags} | {"h3", "li", "code"}
    assert not [tag for tag, attributes in page.tags if tag == "b" or any(name.startswith("on") for name in attributes)]
    labels = {row["label"] for row in json.loads(page.script["data"])["rows"]}
    assert EVIL in labels
    assert labels == {row.label for row in found.rows}
    assert any(EVIL in text for text in page.texts)
    text = report.markdown(found)
    assert "<b" not in re.sub(r"(?ms)^```.*?^```$|(?<!\\)`[^`\n]*`", "", text)


def test_the_page_loads_nothing_and_runs_only_its_own_scripts():
    text = report.page(results())
    page = Elements(text)
    links = [value for _, attributes in page.tags for name in ("src", "href") if (value := attributes.get(name))]
    assert all(link.startswith(("#", "data:")) for link in links), links
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert "default-src 'none'" in policy
    scripts = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert len(scripts) == 4
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "unsafe-eval" not in policy
    assert "@import" not in text
    assert "url(" not in ASSETS.joinpath("style.css").read_text()


def test_the_libraries_end_no_script():
    """Their hashes are held by tests/test_sbom.py."""
    assert not [path for path in ASSETS.joinpath("vendor").glob("*.js") if b"</script" in path.read_bytes().lower()]


def test_an_ordinary_page_is_below_a_megabyte_and_five_hundred_runs_below_two():
    head, runs, trials = comparison()
    assert len(report.page(report.Results(runs, trials, head)).encode()) < 1e6
    head, runs, trials = comparison(count=50, seeds=10, steps=200, items=20)
    many = report.Results(runs, trials, head)
    data = payload(many)
    assert sum(len(seed[0]) for row in data["rows"] for seed in row["loss"]["seeds"]) <= ALL_POINTS
    assert len(report.page(many).encode()) < 2e6


def test_a_shortened_curve_keeps_its_mean():
    curve = [(i, math.sin(i)) for i in range(600)]
    short = thin(curve, 200)
    assert len(short) == 200
    assert statistics.fmean(y for _, y in short) == pytest.approx(statistics.fmean(y for _, y in curve))
    assert thin(curve, 600) == curve
    assert len(thin(curve, 599)) == 300


# -- colours ----------------------------------------------------------------------------------------------------------

STYLE = ASSETS.joinpath("style.css").read_text()
PAIRS = {name: pair for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", STYLE)}
# Machado, Oliveira, Fernandes 2009: how colours look to protan, deutan and tritan eyes, in linear RGB.
EYES = {
    "usual": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour):
    c = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
    """WCAG 2: between two colours."""
    bright = sorted(float(linear(colour) @ [0.2126, 0.7152, 0.0722]) for colour in (a, b))
    return (bright[1] + 0.05) / (bright[0] + 0.05)


def oklab(rgb):
    cones = np.array([[0.4122, 0.5363, 0.0515], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
    lab = [[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    return np.array(lab) @ np.cbrt(cones @ rgb)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_words_and_marks_stand_out(theme):
    colour = {name: pair[theme] for name, pair in PAIRS.items()}
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    for words, behind in itertools.product(("ink", "soft", "accent", "good", "warn"), ("page", "paper", "raised")):
        assert contrast(colour[words], colour[behind]) >= 4.5, (words, behind)
    for mark in ("edge", "rest", *(f"c{i}" for i in range(8))):
        assert contrast(colour[mark], colour["paper"]) >= 3, mark


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_the_methods_colours_differ_for_every_eye(theme, eyes):
    seen = [oklab(np.clip(np.array(EYES[eyes]) @ linear(PAIRS[f"c{i}"][theme]), 0, 1)) for i in range(8)]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 0.09
