"""The picture of docs/bench.md: times beside PyTorch, from a record of scripts/bench.py."""

from __future__ import annotations

from pathlib import Path

from bench_render import Record, by_unit, fastest_inductor, one_size

_ONE_SIZE = "inductor, ours for one size, too"
_COLOURS = {
    "eager": "#9aa5b1", "eager graph": "#6b8fb5", "inductor": "#d08a3c", _ONE_SIZE: "#ecc894",
    "torch_tensorrt": "#7a5ba6",
}  # fmt: skip


def bars(record: Record) -> dict[str, dict[str, float]]:
    """By model and batch: how many times as long as ours each other way takes."""
    found: dict[str, dict[str, float]] = {}
    rows = [row for row in record["rows"] if row["part"] == "beside" and "way" in row]
    alone = one_size(record)
    for unit, ways in by_unit(rows).items():
        named = {name: ways.get(name) for name in ("eager", "eager graph", "torch_tensorrt")}
        named["inductor"] = fastest_inductor(ways)[1]
        values = {name: row["ratio"] for name in named if (row := named[name]) and "ratio" in row}
        if "inductor" in values and unit in alone:
            values[_ONE_SIZE] = values["inductor"] / alone[unit]
        if values:
            found[unit] = values
    return found


def draw(record: Record, path: Path) -> bool:
    """A bar chart of the ratios; False where there are none, and nothing is written."""
    values = bars(record)
    if not values:
        return False
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise SystemExit("The picture needs matplotlib: pip install matplotlib.") from error
    mpl.use("agg")
    from matplotlib import pyplot as plt

    ways = [way for way in _COLOURS if any(way in found for found in values.values())]
    batches = sorted({int(unit.rsplit(" ", 1)[1]) for unit in values})
    models = list(dict.fromkeys(unit.rsplit(" ", 1)[0] for unit in values))
    figure, axes = plt.subplots(
        1, len(batches), sharey=True, squeeze=False, layout="constrained",
        figsize=(2.5 + 4.5 * len(batches), 1.6 + len(models) * (0.14 + 0.16 * len(ways))),
    )  # fmt: skip
    thick = 0.8 / len(ways)
    for plot, batch in zip(axes[0], batches, strict=True):
        for index, way in enumerate(ways):
            shown = [(place, values.get(f"{model} {batch}", {}).get(way)) for place, model in enumerate(models)]
            places = [place + (index - (len(ways) - 1) / 2) * thick for place, value in shown if value is not None]
            lengths = [value for _, value in shown if value is not None]
            label = way.replace("torch_tensorrt", "Torch-TensorRT")
            widths = [length - 1 for length in lengths]  # from 1, so that faster and slower go to two sides
            plot.barh(places, widths, thick * 0.92, left=1, color=_COLOURS[way], label=label)
            for place, length in zip(places, lengths, strict=True):
                side, shift = ("left", 1.03) if length >= 1 else ("right", 1 / 1.03)
                plot.text(length * shift, place, f"{length:.2f}", fontsize=7, ha=side, va="center")
        plot.axvline(1.0, color="#222222", linewidth=1)
        plot.set_xscale("log")
        most = max((max(found.values()) for found in values.values()), default=1.0)
        least = min((min(found.values()) for found in values.values()), default=1.0)
        plot.set_xlim(min(0.5, least * 0.75), max(2.0, most * 1.4))
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if plot.get_xlim()[0] <= tick <= plot.get_xlim()[1]]
        plot.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        plot.minorticks_off()
        plot.set_title(f"batch {batch}", fontsize=10)
        plot.set_xlabel("time / ours (right of 1: ours is faster)", fontsize=9)
        plot.grid(axis="x", color="#dddddd", linewidth=0.6)
        plot.set_axisbelow(True)
        for side in ("top", "right"):
            plot.spines[side].set_visible(False)
    axes[0][0].set_yticks(range(len(models)), [name.partition(":")[0] for name in models], fontsize=9)
    axes[0][0].set_ylim(len(models) - 0.4, -0.6)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(ways), fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True
