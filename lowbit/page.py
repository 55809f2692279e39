"""Pages that need no network and no script, readable on a phone, in light and in dark: of a run, and of a comparison.

Plots are drawn by matplotlib as SVG, whose text and lines take the colour of the page.
"""

import io
import itertools
import re
from importlib.resources import files
from typing import Any

_INK = "#010203"  # what is drawn in this becomes the colour of the page's text
_SALTS = itertools.count()  # for ids that no other plot of the page has
_SERIES = ("#3b82c4", "#e0803a", "#3f9d63", "#c3516f", "#8a6fc1", "#8c8c3a", "#3aa0a0", "#b0703f")
_ERRORS = "Relative errors, of outputs where calibration data was seen, else of weights."
_OUTLIERS = "The largest input channel of a layer over its median channel"
_LOSSES = "Mean squared error, or what the step states, of each block or module of blocks."


def comparison_page(comparison: dict[str, Any]) -> str:
    """The HTML of a comparison (see `comparison`)."""
    rows = [row for row in comparison["rows"] if "failed" not in row]
    return _rendered(
        "comparison.html.jinja",
        c=comparison,
        rows=rows,
        front=comparison["front"],
        warnings=[
            *(f"{row['name']} failed: {row['failed']}" for row in comparison["rows"] if "failed" in row),
            *(f"{name} was not run: the time was up" for name in comparison["left_out"]),
            *(f"{row['name']}: {warning}" for row in rows for warning in _warnings(row["linears"], row["notes"], row)),
        ],
        plots=_plots_of_comparison(comparison, rows),
    )


def report_page(report: dict[str, Any]) -> str:
    """The HTML of a run (see `run`)."""
    notes = _notes(report)
    return _rendered(
        "report.html.jinja", r=report, warnings=_warnings(report["linears"], notes, report), plots=_plots_of_run(report, notes)
    )


def _rendered(template: str, **values: Any) -> str:
    from jinja2 import Environment, FunctionLoader

    loader = FunctionLoader(lambda name: files("lowbit").joinpath(name).read_text(encoding="utf-8"))
    environment = Environment(autoescape=True, loader=loader, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)


def _notes(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [note | {"block": block["block"]} for block in report["blocks"] for note in block["transforms"]]


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
    found = [_plot("Layer by layer", _ERRORS, _layers(report["linears"]))]
    if report["outliers"]:
        text = f"{_OUTLIERS}, on {report['gate']['rows']} rows of calibration data: in the original, and in the result."
        before, after = report["outliers"]["before"], report["outliers"]["after"]
        found.append(_plot("Outliers of activations", text, _outliers(before, {"quantized": after})))
    found += _losses(notes)
    if report["histograms"]:
        text = "Of each kind, the linear with the largest error; marks: the grid of its first group."
        found.append(_plot("Weights before and after", text, _histograms(report["histograms"])))
    return found


def _plots_of_comparison(comparison: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    found = []
    if rows:
        found.append(_plot("Quality against size", "Lower and further left is better.", _pareto(comparison, rows)))
    found += [_plot(f"{row['name']}: layer by layer", _ERRORS, _layers(row["linears"])) for row in rows]
    if comparison["sensitivities"]:
        signal = comparison["sensitivities"]["signal"]
        text = f"What each scheme costs at each decision of a plan, measured by {signal} (log10)."
        found.append(_plot("Sensitivity", text, _heat(_sensitivities(comparison["sensitivities"]))))
    if rows and comparison["float"]["outliers"]:
        text = f"{_OUTLIERS}: in the original, and after the recipe's transforms."
        after = {row["name"]: row["outliers"] for row in rows}
        found.append(_plot("Outliers of activations", text, _outliers(comparison["float"]["outliers"], after)))
    found += _losses([note for row in rows for note in row["notes"]])
    for row in rows:
        worst = row["histograms"][:1]
        if worst:
            text = f"{worst[0]['linear']}, the linear with the largest error; marks: the grid of its first group."
            found.append(_plot(f"{row['name']}: weights", text, _histograms(worst)))
    return found


def _losses(notes: list[dict[str, Any]]) -> list[dict[str, str]]:
    curves = [(note["steps"], note["curve"]) for note in notes if note.get("curve") and "steps" in note]
    return [_plot("Losses of learned steps", _LOSSES, _curves(curves))] if curves else []


def _layers(linears: list[dict[str, Any]]) -> str:
    errors = {row["name"]: row["error"] for row in linears}
    bits = {row["name"]: row["bits_per_weight"] for row in linears}
    return _heat({"error of each linear (log10)": by_layer(errors), "bits of each weight": by_layer(bits)})


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
    from matplotlib import rc_context
    from matplotlib.figure import Figure

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


def _outliers(before: dict[str, float], after: dict[str, dict[str, float]]) -> str:
    """One diagram for each of the kinds of linears with the largest outliers; `after` by what they were changed by."""
    kinds = by_layer(before)
    shown = sorted(kinds, key=lambda kind: -max(kinds[kind].values()))[:4]
    figure, axes = _figure(6.4, 1.6 * len(shown), len(shown))
    for axis, kind in zip(axes, shown, strict=True):
        lines = {"original": kinds[kind]} | {name: by_layer(values).get(kind, {}) for name, values in after.items()}
        colours = itertools.chain((_INK,), itertools.cycle(_SERIES))
        for (name, values), colour in zip(lines.items(), colours, strict=False):
            at = sorted(values)
            axis.plot(at, [values[block] for block in at], color=colour, linewidth=1.1, label=name, marker=".", markersize=3)
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


def _histograms(given: list[dict[str, Any]]) -> str:
    figure, axes = _figure(6.4, 0.5 + 1.7 * len(given), len(given))
    for axis, each in zip(axes, given, strict=True):
        width = (each["high"] - each["low"]) / len(each["float"])
        edges = [each["low"] + i * width for i in range(len(each["float"]) + 1)]
        axis.stairs(each["float"], edges, fill=True, color=_SERIES[0], alpha=0.5, label="original")
        axis.stairs(each["quantized"], edges, color=_SERIES[1], linewidth=1, label="quantized")
        for value in each["grid"]:
            axis.plot([value, value], [0, 0.06], color=_INK, linewidth=1, transform=axis.get_xaxis_transform())
        axis.set_yscale("symlog", linthresh=10)
        axis.set_title(each["linear"], fontsize=9, loc="left", color=_INK)
    axes[0].legend(frameon=False, fontsize=8, labelcolor=_INK)
    axes[-1].set_xlabel("weight")
    return _svg(figure)
