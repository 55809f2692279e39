"""The pages of a comparison and of a run: everything in them, nothing from elsewhere, and what a browser makes of them."""

import json
import math
import random
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from lowbit.page import by_layer, check_figure, comparison_page, report_page, save_figure

BLOCKS, KINDS = 32, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
NAMES = [f"model.layers.{block}.self_attn.{kind}" for block in range(BLOCKS) for kind in KINDS]


def row(number: int) -> dict[str, Any]:
    """What `comparison` writes of one recipe of a model of 224 linears."""
    chance = random.Random(number)
    linears = [
        {
            "name": name,
            "scheme": "w4a16-g128",
            "method": "gptq",
            "bits_per_weight": chance.choice((3.125, 4.125)),
            "error": chance.lognormvariate(-5, 1),
            "error_rtn": 0.01,
            "warnings": ["damping was raised to 0.04"] if number == 1 and name == NAMES[3] else [],
        }
        for name in NAMES
    ]
    return {
        "name": f"recipe <{number}>",
        "recipe": {
            "steps": [{"method": "gptq", "options": {"damping": 0.02}}],
            "format": "lowbit",
            "data": {"rows": 8, "length": 128, "seed": 0},
        },
        "bytes": 10**9 + number * 10**8,
        "bits": 4.1,
        "loss": 0.01 * (number + 1),
        "seconds": 61.0,
        "peak_rss": 2 * 10**9,
        "load_seconds": 1.5,
        "decode_tokens_per_second": 20.0,
        "linears": linears,
        "notes": [{"block": "model.layers.0", "step": "mrem", "steps": 100, "kept": number != 2, "curve": [3.0, 2.0, 1.5]}],
        "adapter": None,
        "evaluations": [
            {"source": "test.txt", "perplexity": 20.0 + number, "kl": 0.01 * (number + 1), "top1_agreement": 0.9}
            for _ in range(2)
        ],
        "samples": [{"prompt": "Once upon", "text": f" a time & {'x' * 300}"}],
        "outliers": {name: 2.0 + number for name in NAMES},
        "histograms": [
            {
                "linear": name,
                "low": -1.0,
                "high": 1.0,
                "float": [1, 5, 9, 5],
                "quantized": [0, 9, 9, 2],
                "grid": [-1.0, -0.5, 0.0, 0.5],
            }
            for name in NAMES[:2]
        ],
    }


@pytest.fixture(scope="module")
def comparison() -> dict[str, Any]:
    """Eight recipes, and one that failed."""
    rows = [row(number) for number in range(8)]
    measured = row(0)
    return {
        "lowbit": "0.0",
        "model": "a model",
        "device": "cpu",
        "threads": 2,
        "texts": [{"source": "test.txt", "tokens": 1000, "window": 128, "windows": None}] * 2,
        "float": {
            key: measured[key] for key in ("evaluations", "load_seconds", "decode_tokens_per_second", "samples", "outliers")
        }
        | {"bytes": 4 * 10**9},
        "rows": [*rows, {"name": "broken", "recipe": rows[0]["recipe"], "failed": "group 128 does not divide 96"}],
        "front": ["recipe <0>"],
        "left_out": ["late"],
        "sensitivities": {
            "signal": "kl",
            "per": "linear",
            "schemes": ["w2a16-g64", "w4a16-g128"],
            "decisions": {
                name: {"block": block, "linears": [name], "cost": {"w2a16-g64": 0.1, "w4a16-g128": 0.01}}
                for name, block in [
                    ("model.embed_tokens", -1),
                    *((n, int(n.split(".")[2])) for n in NAMES),
                    ("lm_head", BLOCKS),
                ]
            },
        },
    }


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """The report of one run, with something of everything."""
    one = row(1)
    note = {"step": "mrem", "steps": 100, "kept": False, "curve": [3.0, 2.0, 1.5]}
    return {
        "lowbit": "0.0",
        "device": "cpu",
        "threads": 2,
        "versions": {"torch": "2.99"},
        "model": {"name": "a <model>"},
        "recipe": one["recipe"] | {"rules": [{"match": "", "scheme": "w4a16-g128"}]},
        "sizes": {
            "source_bytes": 4 * 10**9,
            "output_bytes": 10**9,
            "bits_per_quantized_weight": 4.125,
            "bits_per_parameter": 4.5,
            "quantized_weights": 10**9,
            "parameters": 2 * 10**9,
        },
        "gate": {"weights_compared": 224, "rows": 2, "largest_logit_difference": 0.001, "largest_logit": 12.0},
        "stages": [{"stage": "probe", "seconds": 1.5, "peak_rss": 10**9}],
        "blocks": [{"block": "model.layers.0", "seconds": 2.0, "peak_rss": 10**9, "transforms": [note]}],
        "evaluations": [
            {"source": "t.txt", "windows": 3, "window": 128, "perplexity": 21.5, "reference_perplexity": None, "kl": None},
            {
                "source": "t.txt",
                "windows": 3,
                "window": 128,
                "perplexity": 21.5,
                "reference_perplexity": 20.0,
                "kl": 0.0123,
                "top1_agreement": 0.9,
            },
        ],
        "searches": [
            {"step": "smooth_search", "alpha": 0.5, "curve": [{"alpha": None, "loss": 0.5}, {"alpha": 0.5, "loss": 0.25}]}
        ],
        "outliers": {"before": dict.fromkeys(NAMES, 40.0), "after": dict.fromkeys(NAMES, 4.0)},
        "histograms": one["histograms"],
        "linears": one["linears"],
        "float_matrices": [{"name": "lm_head", "reason": "outside the blocks"}],
        "adapter": None,
    }


class _Tags(HTMLParser):
    """What is open when the page ends, and every address in it."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def check(text: str) -> None:
    """No script, nothing fetched, well formed, small."""
    tags = _Tags()
    tags.feed(text)
    assert tags.open == [] and tags.scripts == 0
    assert all(address.startswith(("#", "data:")) for address in tags.addresses)
    assert len(text) < 5e6
    # every id is there once, so that no plot is cut by the outline of another
    ids = re.findall(r'\bid="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert not re.search("#010203", text)


def test_one_page_holds_all(comparison: dict[str, Any]) -> None:
    """Escaped, with the numbers of the comparison."""
    text = comparison_page(comparison)
    check(text)
    assert "recipe &lt;3&gt;" in text and "recipe <3>" not in text
    for wanted in (
        "Quality against size",
        "layer by layer",
        "Sensitivity",
        "Outliers",
        "Losses of learned",
        "weights",
        "Once upon",
    ):
        assert wanted in text, wanted
    assert "<td>0.0300</td>" in text and "90.0 %" in text


def test_the_page_of_a_run(report: dict[str, Any]) -> None:
    """The numbers of the report, every plot that there is something for, and what to mind on top."""
    text = report_page(report)
    check(text)
    assert "a &lt;model&gt;" in text and "a <model>" not in text
    top = text.partition("<h2>Result")[0]
    assert "damping was raised" in top and "1 trainings made held-out rows worse" in top
    for wanted in (
        "4000.0 &rarr; 1000.0",
        "4.12",
        "<td>0.0123</td>",
        "lm_head",
        "2.5000e-01",
        "Layer by layer",
        "Outliers of activations",
        "Losses of learned steps",
        "Weights before and after",
        NAMES[1],
        f"{report['linears'][5]['error']:.3e}",
    ):
        assert wanted in text, wanted
    plain = report | {"outliers": None, "histograms": [], "evaluations": [], "searches": [], "blocks": []}
    shorter = report_page(plain | {"linears": report["linears"][4:]})
    assert 'class="alarm"' not in shorter and "Outliers" not in shorter and "Losses" not in shorter


def test_what_to_mind_is_on_top(comparison: dict[str, Any]) -> None:
    """Failures, what was left out, warnings and undone trainings stand before the table."""
    top = comparison_page(comparison).partition("<h2>Result")[0]
    for wanted in (
        "group 128 does not divide 96",
        "late is not finished",
        "damping was raised",
        "1 trainings made held-out rows worse",
    ):
        assert wanted in top
    clean = comparison | {"rows": comparison["rows"][3:4], "front": ["recipe <3>"], "left_out": []}
    assert 'class="alarm"' not in comparison_page(clean)


def test_notes_of_a_run_are_on_top(report: dict[str, Any]) -> None:
    top = report_page(report | {"notes": ["The source was quantized already <fp8>."]}).partition("<h2>Result")[0]
    assert "The source was quantized already &lt;fp8&gt;." in top
    assert "quantized already" not in report_page(report)


def test_names_are_no_formulas(comparison: dict[str, Any]) -> None:
    """matplotlib would read what is between two dollars as one, and this as a bad one."""
    named = json.loads(json.dumps(comparison).replace("recipe <1>", "a$^$b").replace("q_proj", "q$^$proj"))
    page = comparison_page(named)
    assert page.count("a$^$b") == comparison_page(comparison).count("recipe &lt;1&gt;") and "q$^$proj" in page


@pytest.mark.parametrize("name", ["roofline", "roofline.xyz", ".png"])
def test_pictures_of_no_format(name: str) -> None:
    with pytest.raises(ValueError, match=r"does not end in a format of pictures; allowed are .*\.png"):
        check_figure(name)


def test_pictures(tmp_path: Path) -> None:
    """Written by the ending of the name, not through a link."""
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "a.PNG").symlink_to(tmp_path / "victim")
    check_figure(tmp_path / "a.PNG")
    save_figure(Figure(), tmp_path / "a.PNG")
    assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG") and (tmp_path / "victim").read_text() == "precious"


def test_by_layer() -> None:
    """Linears by kind and block; experts are averaged."""
    found = by_layer({"m.layers.3.mlp.up": 1.0, "m.layers.0.e.0.w1": 1.0, "m.layers.0.e.1.w1": 3.0, "lm_head": 9.0})
    assert found == {"up": {3: 1.0}, "w1 (experts)": {0: 2.0}}


@pytest.mark.slow
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (1440, "dark")])
@pytest.mark.parametrize("of", ["comparison", "report"])
def test_in_a_browser(of: str, request: pytest.FixtureRequest, tmp_path: Path, width: int, scheme: str) -> None:
    """Nothing is wider than the window, no complaint on the console, quick, and dark where dark is asked for."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium on the PATH")
    from playwright.sync_api import sync_playwright

    path = tmp_path / "page.html"
    make = {"comparison": comparison_page, "report": report_page}[of]
    path.write_text(make(request.getfixturevalue(of)), encoding="utf-8")
    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
        shown = context.new_page()
        shown.on("console", lambda message: complaints.append(message.text))
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        shown.on("request", lambda request: complaints.append(request.url) if request.url.startswith("http") else None)
        shown.goto(path.as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth") <= width
        timing = shown.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
        picture = shown.screenshot(full_page=True)
        back = shown.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = shown.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
        browser.close()
    assert complaints == []
    assert timing < 2000
    assert len(picture) > 50_000
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (back, ink)]
    assert (light[0] < 150 < light[1]) if scheme == "dark" else (light[0] > 600 > light[1]), (back, ink)
    assert math.isfinite(timing)
