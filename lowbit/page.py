"""The comparison as one HTML page that needs no network and no script: readable on a phone, in light and in dark.

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
_SERIES = ("#3b82c4", "#e0803a", "#3f9d63", "#c3516f", "#8a6fc1", "#8c8c3a", "#3aa0a0", "#b0703f")


def write_page(path: Path, comparison: dict[str, Any]) -> None:
    """Write the page of a comparison (see `comparison`).

    Raises:
        ImportError: matplotlib is not installed.
    """
    text = page(comparison)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(comparison: dict[str, Any]) -> str:
    """The HTML of a comparison."""
    from jinja2 import Environment

    rows = [row for row in comparison["rows"] if "failed" not in row]
    template = Environment(autoescape=True).from_string(files("lowbit").joinpath("page.html.jinja").read_text(encoding="utf-8"))
    return template.render(
        c=comparison,
        rows=rows,
        failed=[row for row in comparison["rows"] if "failed" in row],
        front=comparison["front"],
        warnings=_warnings(rows),
        plots=plots(comparison, rows),
    )


def _warnings(rows: list[dict[str, Any]]) -> list[str]:
    found = [f"{row['name']}: {warning}" for row in rows for warning in row["warnings"]]
    found += [
        f"{row['name']}: its low-rank corrections are in {row['adapter']}/, to be loaded beside"
        for row in rows
        if row["adapter"]
    ]
    for row in rows:
        undone = [note for note in row["notes"] if note.get("kept") is False]
        if undone:
            found.append(f"{row['name']}: {len(undone)} trainings made held-out rows worse and were undone")
    return found


# ------------------------------------------------------------------------------------------------------------- plots


def plots(comparison: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Title, caption and SVG of every plot that there is something to show in."""
    found = []
    if rows:
        found.append(
            {"title": "Quality against size", "text": "Lower and further left is better.", "svg": _pareto(comparison, rows)}
        )
    for row in rows:
        grids = {
            "error of each linear (log10)": {x["name"]: x["error"] for x in row["linears"]},
            "bits of each weight": {x["name"]: x["bits_per_weight"] for x in row["linears"]},
        }
        svg = _heat({title: by_layer(values) for title, values in grids.items()})
        text = "Relative errors, of outputs where calibration data was seen, else of weights."
        found.append({"title": f"{row['name']}: layer by layer", "text": text, "svg": svg})
    if comparison["sensitivities"]:
        costs = _sensitivities(comparison["sensitivities"])
        text = (
            f"What each scheme costs at each decision of a plan, measured by {comparison['sensitivities']['signal']} (log10)."
        )
        found.append({"title": "Sensitivity", "text": text, "svg": _heat(costs)})
    if rows and comparison["float"]["outliers"]:
        text = (
            "The largest input channel of a layer over its median channel: in the original, and after the recipe's transforms."
        )
        found.append({"title": "Outliers of activations", "text": text, "svg": _outliers(comparison, rows)})
    curves = [(n["steps"], n["curve"]) for row in rows for n in row["notes"] if n.get("curve") and "steps" in n]
    if curves:
        found.append(
            {"title": "Losses of learned steps", "text": "Mean squared error, or what the step states.", "svg": _curves(curves)}
        )
    for row in rows:
        if row["histogram"]:
            text = f"{row['histogram']['linear']}, the linear with the largest error; marks: the grid of its first group. "
            text += "Quantized are the weights as the recipe's transforms left them."
            found.append({"title": f"{row['name']}: weights", "text": text, "svg": _histogram(row["histogram"])})
    return found


def by_layer(values: dict[str, float]) -> dict[str, dict[int, float]]:
    """Values by what kind of linear they are of, and by the number of their block: means where there are several (experts)."""
    found: dict[str, dict[int, list[float]]] = {}
    for name, value in values.items():
        numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
        if numbers:
            kind = name.rpartition(".")[2] if len(numbers) == 1 else name.rpartition(".")[2] + " (experts)"
            found.setdefault(kind, {}).setdefault(int(numbers[0]), []).append(value)
    return {kind: {block: sum(each) / len(each) for block, each in blocks.items()} for kind, blocks in found.items()}


def _sensitivities(measured: dict[str, Any]) -> dict[str, dict[str, dict[int, float]]]:
    found: dict[str, dict[str, dict[int, float]]] = {}
    for scheme in measured["schemes"]:
        grid: dict[str, dict[int, float]] = {}
        for row in measured["decisions"].values():
            if scheme in row["cost"]:
                kind = "+".join(dict.fromkeys(name.rpartition(".")[2] for name in row["linears"][:3]))
                grid.setdefault(kind, {})[row["block"]] = row["cost"][scheme]
        found[f"{scheme} (log10)"] = grid
    return found


def _figure(width: float, height: float, count: int = 1) -> tuple[Any, list[Any]]:
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"the page's plots need matplotlib ({error}): pip install 'lowbit[plots]'") from error
    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK)
    style = ink | {"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = [figure.add_subplot(count, 1, i + 1) for i in range(count)]
    return figure, axes


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": str(next(_SALTS))}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # As wide as the page allows; ids once on a page.
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    return re.sub(r' id="(?![pm][0-9a-f]{10}")[^"]*"', "", text)


def _pareto(comparison: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    figure, (axis,) = _figure(6.4, 3.6)
    for i, row in enumerate(rows):
        point = (row["bytes"] / 1e6, row["evaluations"][0]["kl"])
        axis.plot(*point, "o", color=_SERIES[i % len(_SERIES)])
        axis.annotate(row["name"], point, xytext=(5, 4), textcoords="offset points", color=_INK, fontsize=8)
    best = [next(row for row in rows if row["name"] == name) for name in comparison["front"]]
    line = [row["bytes"] / 1e6 for row in best], [row["evaluations"][0]["kl"] for row in best]
    axis.plot(*line, color=_INK, linewidth=0.8, zorder=0)
    if all(row["evaluations"][0]["kl"] > 0 for row in rows):
        axis.set_yscale("log")
    axis.set_xlabel("weight files, MB")
    axis.set_ylabel(f"KL to the original, {rows[0]['evaluations'][0]['source']}")
    axis.margins(x=0.18, y=0.12)
    return _svg(figure)


def _heat(grids: dict[str, dict[str, dict[int, float]]]) -> str:
    from math import log10, nan

    height = sum(0.6 + 0.22 * max(len(grid), 1) for grid in grids.values())
    figure, axes = _figure(6.4, height, len(grids))
    for axis, (title, grid) in zip(axes, grids.items(), strict=True):
        blocks = sorted({block for row in grid.values() for block in row})
        cells = [[row.get(block, nan) for block in blocks] for row in grid.values()]
        if "log10" in title:
            cells = [[log10(value) if value > 0 else nan for value in row] for row in cells]
        image = axis.imshow(cells, aspect="auto", cmap="viridis", interpolation="nearest")
        axis.set_yticks(range(len(grid)), list(grid))
        shown = range(0, len(blocks), max(1, len(blocks) // 16))
        axis.set_xticks(list(shown), [str(blocks[i]) for i in shown])
        axis.set_title(title, fontsize=9, loc="left", color=_INK)
        bar = figure.colorbar(image, ax=axis, fraction=0.03, pad=0.02)
        bar.ax.tick_params(colors=_INK)
        bar.outline.set_visible(False)
    return _svg(figure)


def _outliers(comparison: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    kinds = by_layer(comparison["float"]["outliers"])
    shown = sorted(kinds, key=lambda kind: -max(kinds[kind].values()))[:4]
    figure, axes = _figure(6.4, 1.6 * len(shown), len(shown))
    for axis, kind in zip(axes, shown, strict=True):
        line = sorted(kinds[kind].items())
        axis.plot(*zip(*line, strict=True), color=_INK, linewidth=1.2, label="original")
        for i, row in enumerate(rows):
            after = by_layer(row["outliers"]).get(kind)
            if after:
                axis.plot(
                    *zip(*sorted(after.items()), strict=True), color=_SERIES[i % len(_SERIES)], linewidth=1, label=row["name"]
                )
        axis.set_title(kind, fontsize=9, loc="left", color=_INK)
        axis.set_yscale("log")
    axes[-1].set_xlabel("block")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8, labelcolor=_INK)
    return _svg(figure)


def _curves(curves: list[tuple[int, list[float]]]) -> str:
    figure, (axis,) = _figure(6.4, 3.2)
    for i, (steps, losses) in enumerate(curves):
        at = [steps * (k + 1) / len(losses) for k in range(len(losses))]
        axis.plot(at, losses, linewidth=0.8, color=_SERIES[i % len(_SERIES)])
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    return _svg(figure)


def _histogram(given: dict[str, Any]) -> str:
    figure, (axis,) = _figure(6.4, 2.2)
    width = (given["high"] - given["low"]) / len(given["float"])
    edges = [given["low"] + i * width for i in range(len(given["float"]) + 1)]
    axis.stairs(given["float"], edges, fill=True, color=_SERIES[0], alpha=0.5, label="original")
    axis.stairs(given["quantized"], edges, color=_SERIES[1], linewidth=1, label="quantized")
    for value in given["grid"]:
        axis.plot([value, value], [0, 0.06], color=_INK, linewidth=1, transform=axis.get_xaxis_transform())
    axis.set_yscale("symlog", linthresh=10)
    axis.legend(frameon=False, fontsize=8, labelcolor=_INK)
    axis.set_xlabel("weight")
    return _svg(figure)
