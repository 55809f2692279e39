"""Pages that need no network and no script, readable on a phone, in light and in dark: of a run, and of a comparison.

Plots are drawn by matplotlib as SVG, whose text and lines take the colour of the page.
"""

import io
import itertools
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from lowbit.files import replacing

_INK = "#010203"  # what is drawn in this becomes the colour of the page's text
_SALTS = itertools.count()  # for ids that no other plot of the page has
_WIDTH = 4.8  # inches of every plot: as wide as a phone, so that its text is read there too
_SERIES = ("#3b82c4", "#e0803a", "#3f9d63", "#c3516f", "#8a6fc1", "#8c8c3a", "#3aa0a0", "#b0703f")
_ERRORS = "Relative errors, of outputs where calibration data was seen, else of weights."
_OUTLIERS = "The largest input channel of a layer over its median channel"
_LOSSES = "Mean squared error, or what the step states, of each block or module of blocks."
_EMBEDDINGS, _HEAD = "embeddings", "head"  # where a block's number stands for others
Grid = dict[str, dict[int | str, float]]  # rows of a heat map: values by block
_ERROR, _BITS = "error of each linear (log10)", "bits of each weight"  # titles of heat maps


def comparison_page(comparison: dict[str, Any]) -> str:
    """The HTML of a comparison (see `comparison`)."""
    rows = [row for row in comparison["rows"] if "failed" not in row]
    return _rendered(
        "comparison.html.jinja",
        c=comparison,
        rows=rows,
        judged=judged,
        titles=[*judged(comparison["float"]["evaluations"][0])],
        front=comparison["front"],
        warnings=[
            *(f"{row['name']} failed: {row['failed']}" for row in comparison["rows"] if "failed" in row),
            *(f"{name} is not finished: the time was up" for name in comparison["left_out"]),
            *(f"{row['name']}: {warning}" for row in rows for warning in _warnings(row["linears"], row["notes"], row)),
        ],
        plots=_plots_of_comparison(comparison, rows),
    )


def report_page(report: dict[str, Any]) -> str:
    """The HTML of a run (see `run`)."""
    notes = _notes(report)
    return _rendered(
        "report.html.jinja",
        r=report,
        judged=judged,
        warnings=[*report.get("notes", []), *_warnings(report["linears"], notes, report)],
        plots=_plots_of_run(report, notes),
    )


def _rendered(template: str, **values: Any) -> str:
    from jinja2 import Environment, FunctionLoader

    loader = FunctionLoader(lambda name: files("lowbit").joinpath(name).read_text(encoding="utf-8"))
    environment = Environment(autoescape=True, loader=loader, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)


def _notes(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [note | {"block": block["block"]} for block in report["blocks"] for note in block["transforms"]]


def judged(evaluation: dict[str, Any]) -> dict[str, str]:
    """The figures of an evaluation by their titles, for a table; those that only a reference gives are empty without one."""
    e = evaluation
    if "perplexity" in e:
        figures = {"ppl": (e["perplexity"], ".4g"), "KL": (e["kl"], "#.3g"), "same top": (e.get("top1_agreement"), ".1%")}
    elif e["kl"] is not None:
        figures = {"KL": (e["kl"], "#.3g"), "same choice": (e["top1_agreement"], ".1%")}
    else:
        figures = {"relative error": (e["relative_error"], "#.3g"), "cosine": (e["cosine"], ".5f")}
        if e["sentence_cosine"] is not None:
            figures["cosine of sentences"] = (e["sentence_cosine"], ".5f")
    texts = {title: "" if value is None else format(value, form) for title, (value, form) in figures.items()}
    return {title: text.replace("%", " %") for title, text in texts.items()}


def _warnings(linears: list[dict[str, Any]], notes: list[dict[str, Any]], about: dict[str, Any]) -> list[str]:
    found = [f"{row['name']}: {warning}" for row in linears for warning in row["warnings"]]
    if about["adapter"]:
        found.append(f"its low-rank corrections are in {about['adapter']}/, to be loaded beside")
    undone = sum(note.get("kept") is False for note in notes)
    if undone:
        found.append(f"{undone} trainings made held-out rows worse and were undone")
    return found


# ------------------------------------------------------------------------------------------------------------- plots


def _plot(title: str, text: str, svg: str) -> dict[str, str]:
    return {"title": title, "text": text, "svg": svg}


def _plots_of_run(report: dict[str, Any], notes: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Title, caption and SVG of every plot that there is something to show in."""
    found = [_plot("Layer by layer", _ERRORS, _layers([report["linears"]])[0])]
    if report["outliers"]:
        text = f"{_OUTLIERS}, on {report['gate']['rows']} rows of calibration data: in the original, and in the result."
        before, after = report["outliers"]["before"], report["outliers"]["after"]
        found.append(_plot("Outliers of activations", text, _outliers(before, {"quantized": after})))
    found += _losses([(note["step"], note) for note in notes])
    if report["histograms"]:
        text = "Of each kind, the linear with the largest error; marks: the grid of its first group."
        found.append(_plot("Weights before and after", text, _histograms(report["histograms"])))
    return found


def _plots_of_comparison(comparison: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    found = []
    if rows:
        text = "Lower and further left is better; the line joins what no other recipe beats in both."
        found.append(_plot("Quality against size", text, _pareto(comparison, rows)))
    if comparison["sensitivities"]:
        signal = comparison["sensitivities"]["signal"]
        text = f"What each scheme costs at each decision of a plan, measured by {signal} (log10)."
        found.append(_plot("Sensitivity", text, _heat(_sensitivities(comparison["sensitivities"]))))
    layers = _layers([row["linears"] for row in rows])
    text = f"{_ERRORS} Colours mean the same in all recipes."
    found += [_plot(f"{row['name']}: layer by layer", text, svg) for row, svg in zip(rows, layers, strict=True)]
    if rows and comparison["float"]["outliers"]:
        text = f"{_OUTLIERS}: in the original, and after the recipe's transforms."
        after = {row["name"]: row["outliers"] for row in rows}
        found.append(_plot("Outliers of activations", text, _outliers(comparison["float"]["outliers"], after)))
    found += _losses([(row["name"], note) for row in rows for note in row["notes"]])
    for row in rows:
        worst = row["histograms"][:1]
        if worst:
            text = f"{worst[0]['linear']}, the linear with the largest error; marks: the grid of its first group."
            found.append(_plot(f"{row['name']}: weights", text, _histograms(worst)))
    return found


def _losses(notes: list[tuple[str, dict[str, Any]]]) -> list[dict[str, str]]:
    """Of notes of steps, by what their curves are labelled with."""
    curves = [(name, note["steps"], note["curve"]) for name, note in notes if note.get("curve") and "steps" in note]
    return [_plot("Losses of learned steps", _LOSSES, _curves(curves))] if curves else []


def _layers(recipes: list[list[dict[str, Any]]]) -> list[str]:
    """Errors and bits of the linears of each recipe, in the same colours."""
    limits = {}
    for title, key in ((_ERROR, "error"), (_BITS, "bits_per_weight")):
        values = [row[key] for linears in recipes for row in linears if row[key] > 0]
        if values:
            limits[title] = (min(values), max(values))
    found = []
    for linears in recipes:
        errors = {row["name"]: row["error"] for row in linears}
        bits = {row["name"]: row["bits_per_weight"] for row in linears}
        found.append(_heat({_ERROR: by_layer(errors), _BITS: by_layer(bits)}, limits))
    return found


def by_layer(values: dict[str, float]) -> Grid:
    """Values by what kind of linear they are of, and by the number of their block: means where there are several (experts)."""
    found: dict[str, dict[int | str, list[float]]] = {}
    for name, value in values.items():
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        if numbers:
            kind = name.rpartition(".")[2] if len(numbers) == 1 else name.rpartition(".")[2] + " (experts)"
            found.setdefault(kind, {}).setdefault(int(numbers[0]), []).append(value)
    return {kind: {block: sum(each) / len(each) for block, each in blocks.items()} for kind, blocks in found.items()}


def _sensitivities(measured: dict[str, Any]) -> dict[str, Grid]:
    """By scheme, the costs of all decisions; those outside the blocks have a name in place of a block's number."""
    found: dict[str, Grid] = {}
    for scheme in measured["schemes"]:
        grid: Grid = {}
        for row in measured["decisions"].values():
            if scheme not in row["cost"]:
                continue
            leaves = dict.fromkeys(name.rpartition(".")[2] for name in row["linears"])
            kind = "block" if measured["per"] == "block" and len(leaves) > 1 else "+".join([*leaves][:3])
            inside = re.search(r"\.\d+\.", row["linears"][0])
            grid.setdefault(kind, {})[row["block"] if inside else _EMBEDDINGS if row["block"] < 0 else _HEAD] = row["cost"][
                scheme
            ]
        found[f"{scheme} (log10)"] = grid
    return found


def check_figure(path: str | Path) -> None:
    """Refuse a name for a picture whose ending names no format, before there is a picture.

    Raises:
        ValueError: with the endings that are known.
    """
    from matplotlib.figure import Figure

    known = sorted(Figure().canvas.get_supported_filetypes())
    if Path(path).suffix[1:].lower() not in known:
        raise ValueError(f"{path} does not end in a format of pictures; allowed are .{', .'.join(known)}")


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a matplotlib figure in the format that the name's ending says."""
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:].lower(), bbox_inches="tight")


def _figure(height: float, count: int = 1) -> tuple[Any, list[Any]]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    style = ink | {"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = [figure.add_subplot(count, 1, i + 1) for i in range(count)]
    return figure, axes


def _svg(figure: Any) -> str:
    from matplotlib import rc_context
    from matplotlib.text import Text

    stream = io.StringIO()
    for text in figure.findobj(Text):  # names of recipes and linears are no formulas, whatever $ they have
        text.set_parse_math(False)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": str(next(_SALTS)), "text.parse_math": False}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    # As wide as the page allows; ids once on a page.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return re.sub(r' id="(?![pm][0-9a-f]{10}")[^"]*"', "", svg)


def _pareto(comparison: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    figure, (axis,) = _figure(3.6)
    points = [(row["bytes"] / 1e6, row["loss"]) for row in rows]
    sizes = [size for size, _ in points]
    for i, (row, point) in enumerate(zip(rows, points, strict=True)):
        right = point[0] > (min(sizes) + max(sizes)) / 2  # a label there ends at its point
        axis.plot(*point, "o", color=_SERIES[i % len(_SERIES)])
        given = {"xytext": (-6 if right else 6, 4), "ha": "right" if right else "left"}
        axis.annotate(row["name"], point, textcoords="offset points", color=_INK, fontsize=8, **given)
    best = [points[[row["name"] for row in rows].index(name)] for name in comparison["front"]]
    axis.plot(*zip(*best, strict=True), color=_INK, linewidth=0.8, zorder=0)
    if all(kl > 0 for _, kl in points):
        _logarithmic(axis)
    axis.set_xlabel("weight files, MB")
    first = rows[0]["evaluations"][0]
    axis.set_ylabel(f"{'relative error' if first['kl'] is None else 'KL to the original'}, {first['source']}")
    axis.margins(x=0.08, y=0.12)
    return _svg(figure)


def _heat(grids: dict[str, Grid], limits: dict[str, tuple[float, float]] | None = None) -> str:
    """Heat maps one below the other, by title; `limits` are values of the ends of their colours, else their own."""
    from math import log10, nan

    height = sum(0.6 + 0.22 * max(len(grid), 1) for grid in grids.values())
    figure, axes = _figure(height, len(grids))
    for axis, (title, grid) in zip(axes, grids.items(), strict=True):
        blocks = sorted({block for row in grid.values() for block in row}, key=_place)
        cells = [[row.get(block, nan) for block in blocks] for row in grid.values()]
        low, high = (limits or {}).get(title, (None, None))
        if "log10" in title:
            cells = [[log10(value) if value > 0 else nan for value in row] for row in cells]
            low, high = (value and log10(value) for value in (low, high))
        image = axis.imshow(cells, aspect="auto", cmap="viridis", interpolation="nearest", vmin=low, vmax=high)
        axis.set_yticks(range(len(grid)), list(grid))
        numbers = [i for i, block in enumerate(blocks) if isinstance(block, int)]
        shown = [i for i, block in enumerate(blocks) if isinstance(block, str)] + numbers[:: max(1, len(numbers) // 8)]
        axis.set_xticks(shown, [str(blocks[i]) for i in shown])
        for label in axis.get_xticklabels():  # names are longer than their columns: they reach outwards, where there is room
            if label.get_text() in (_EMBEDDINGS, _HEAD):
                label.set(ha="right" if label.get_text() == _EMBEDDINGS else "left", in_layout=False)
        axis.set_title(title, fontsize=9, loc="left", color=_INK)
        bar = figure.colorbar(image, ax=axis, fraction=0.03, pad=0.02)
        bar.ax.tick_params(colors=_INK)
        bar.outline.set_visible(False)
    return _svg(figure)


def _place(block: int | str) -> float:
    """Where a column of a heat map stands."""
    return block if isinstance(block, int) else {_EMBEDDINGS: -1.0}.get(block, float("inf"))


def _outliers(before: dict[str, float], after: dict[str, dict[str, float]]) -> str:
    """One diagram for each of the kinds of linears with the largest outliers; `after` by what they were changed by."""
    kinds = by_layer(before)
    shown = sorted(kinds, key=lambda kind: -max(kinds[kind].values()))[:4]
    figure, axes = _figure(1.6 * len(shown), len(shown))
    for axis, kind in zip(axes, shown, strict=True):
        lines = {"original": kinds[kind]} | {name: by_layer(values).get(kind, {}) for name, values in after.items()}
        colours = itertools.chain((_INK,), itertools.cycle(_SERIES))
        for (name, values), colour in zip(lines.items(), colours, strict=False):
            at = sorted(values)
            axis.plot(at, [values[block] for block in at], color=colour, linewidth=1.1, label=name, marker=".", markersize=3)
        axis.set_title(kind, fontsize=9, loc="left", color=_INK)
        _logarithmic(axis)
    axes[-1].set_xlabel("block")
    _legend(figure, axes[0])
    return _svg(figure)


def _curves(curves: list[tuple[str, int, list[float]]]) -> str:
    figure, (axis,) = _figure(3.2)
    names = [*dict.fromkeys(name for name, _, _ in curves)]
    for name, steps, losses in curves:
        at = [steps * (k + 1) / len(losses) for k in range(len(losses))]
        axis.plot(at, losses, linewidth=0.8, color=_SERIES[names.index(name) % len(_SERIES)], label=name)
    _logarithmic(axis)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    _legend(figure, axis)
    return _svg(figure)


def _logarithmic(axis: Any) -> None:
    """A scale of y with few, plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Any, axis: Any) -> None:
    """What the lines of a plot are, each name once, below it."""
    named = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    place = {"loc": "outside lower center", "ncols": 2, "frameon": False}
    figure.legend([*named.values()], [*named], fontsize=8, labelcolor=_INK, **place)


def _histograms(given: list[dict[str, Any]]) -> str:
    figure, axes = _figure(0.5 + 1.7 * len(given), len(given))
    for axis, each in zip(axes, given, strict=True):
        width = (each["high"] - each["low"]) / len(each["float"])
        edges = [each["low"] + i * width for i in range(len(each["float"]) + 1)]
        axis.stairs(each["float"], edges, fill=True, color=_SERIES[0], alpha=0.5, label="original")
        axis.stairs(each["quantized"], edges, color=_SERIES[1], linewidth=1, label="quantized")
        for value in each["grid"]:
            axis.plot([value, value], [0, 0.06], color=_INK, linewidth=1, transform=axis.get_xaxis_transform())
        axis.set_yscale("symlog", linthresh=10)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(each["linear"], fontsize=9, loc="left", color=_INK)
    axes[0].legend(frameon=False, fontsize=8, labelcolor=_INK)
    axes[-1].set_xlabel("weight")
    return _svg(figure)
