"""What is shown of `assumptions.py`: rank correlations, Markdown, and a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from scipy.stats import spearmanr

if TYPE_CHECKING:
    from pathlib import Path

KINDS = ("attention", "mlp")
ESTIMATES = ("vasicek", "histogram")
# What each predicts in.
MEASURES = {
    "transfer_entropy": "nats of entropy",
    "kl": "nats per token",
    "nll": "nats per token",
    "frobenius": "squared norm",
}
CHOSEN = "chosen at "


def spearman(one: Any, other: Any) -> float:
    return float(spearmanr(one, other).statistic)


def correlations(damages: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the rank correlation of each measure's prediction with what was measured."""
    plans = [one for one in damages["plans"] if not one["group"].startswith(CHOSEN)]
    groups = {"sub-blocks": damages["sub_blocks"], "plans of one ratio": plans}
    for one in plans:
        groups.setdefault(f"of these, {one['group']}", []).append(one)
    return {
        group: {
            name: spearman([o["predicted"][name] for o in ones], [o["measured"] for o in ones])
            for name in ones[0]["predicted"]
        }
        for group, ones in groups.items()
        if len(ones) > 1
    }


def perplexities(found: dict[str, Any]) -> dict[tuple[str, str], dict[int, list[float]]]:
    """Return perplexities over seeds, by method and source, by number of rows."""
    by_line: dict[tuple[str, str], dict[int, list[float]]] = {}
    for key, perplexity in found.items():
        if key.count("|") == 3:
            method, source, rows, _ = key.split("|")
            by_line.setdefault((method, source), {}).setdefault(int(rows), []).append(perplexity)
    return dict(sorted(by_line.items()))


def summary(found: dict[str, Any]) -> str:
    """Return all three answers as Markdown tables."""
    dense = np.exp(found["damage"]["dense_mean_nll"])
    return "\n\n".join(
        [
            _table("excess kurtosis and rank correlations", _shapes(found["gaussian"])),
            _table("rank correlation with the measured loss", _correlations(found["damage"])),
            _table("perplexity, by calibration rows", _perplexities(found)),
            f"Dense: {dense:.2f}. ±: standard deviation over seeds, where there are several.",
        ]
    )


def _table(title: str, rows: dict[str, dict[str, str]]) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"| {title} | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(row.get(c, "–") for c in columns) + " |")
    return "\n".join(lines)


def _shapes(results: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    rows = {}
    for kind in KINDS:
        here = [one for one in results if one["kind"] == kind]
        if here:
            medians = [one["excess_kurtosis"][1] for one in here]
            least = {name: f"{name}, median (least)" for name in ESTIMATES}
            rows[kind] = {
                "kurtosis, median (range)": f"{np.median(medians):.1f} "
                f"({min(medians):.1f} … {max(medians):.1f})",
                **{
                    title: f"{np.median([one[name] for one in here]):.3f} "
                    f"({min(one[name] for one in here):.3f})"
                    for name, title in least.items()
                },
            }
    return rows


def _correlations(damages: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {
        group: {name: f"{value:.2f}" for name, value in values.items()}
        for group, values in correlations(damages).items()
    }


def _perplexities(found: dict[str, Any]) -> dict[str, dict[str, str]]:
    return {
        f"`{method}`, {source}": {
            str(n): f"{np.mean(v):.2f}" + (f" ± {np.std(v, ddof=1):.2f}" if len(v) > 1 else "")
            for n, v in sorted(by_rows.items())
        }
        for (method, source), by_rows in perplexities(found).items()
    }


def figure(found: dict[str, Any], path: Path) -> None:
    """Draw the first and third answer above, the second below: sub-blocks, then plans."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn, axes = plt.subplots(3, 4, figsize=(16, 11), layout="constrained")
    _draw_shapes(axes[0, :2], found["gaussian"])
    _draw_perplexities(axes[0, 2:], found)
    damages = found["damage"]
    known = correlations(damages)
    _draw_damage(axes[1], "sub-blocks", damages["sub_blocks"], "kind", known["sub-blocks"])
    rho = known.get("plans of one ratio", {})
    _draw_damage(axes[2], "plans", damages["plans"], "group", rho)
    drawn.savefig(path, dpi=110)
    plt.close(drawn)


def _draw_damage(
    axes: Any, title: str, ones: list[dict[str, Any]], key: str, rho: dict[str, float]
) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in ones:
        name = one[key]
        groups.setdefault(f"{CHOSEN}10 … 50 %" if name.startswith(CHOSEN) else name, []).append(one)
    for ax, (measure, unit) in zip(axes, MEASURES.items(), strict=True):
        for label, points in groups.items():
            xs, ys = zip(*((o["predicted"][measure], o["measured"]) for o in points), strict=True)
            marker, size = ("*", 90) if label.startswith(CHOSEN) else ("o", 24)
            ax.scatter(xs, ys, s=size, marker=marker, alpha=0.8, label=label)
        if measure == "nll":  # the same quantity: on the diagonal where it is met
            ends = [one["measured"] for one in ones if one["measured"] > 0]
            diagonal = (min(ends), max(ends)) if ends else ()
            ax.plot(
                diagonal, diagonal, color="black", linewidth=0.8, zorder=0, label="as predicted"
            )
            ax.legend(handles=ax.lines, fontsize="small")
        words = measure.replace("_", " ")
        ax.set_title(f"{title}, {words}: rank correlation {rho.get(measure, np.nan):.2f}", size=9)
        ax.set(xscale="log", yscale="log", xlabel=f"predicted ({unit})")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("measured on held-out text,\nincrease of NLL (nats per token)")
    axes[0].legend(fontsize="small")


def _draw_shapes(axes: Any, results: list[dict[str, Any]]) -> None:
    for number, kind in enumerate(KINDS):
        here = [one for one in results if one["kind"] == kind]
        layers = np.array([one["layer"] for one in here])
        low, middle, high = np.array([one["excess_kurtosis"] for one in here]).reshape(-1, 3).T
        bars = (middle - low, high - middle)
        shifted = layers + (-0.12, 0.12)[number]
        axes[0].errorbar(shifted, middle, bars, fmt="o", capsize=3, label=kind)
        for name, style in zip(ESTIMATES, ("o-", "s:"), strict=True):
            values = [one[name] for one in here]
            color, label = f"C{number}", f"{kind}, {name}"
            axes[1].plot(layers, values, style, color=color, markersize=4, label=label)
    axes[0].axhline(0, color="black", linewidth=0.8)
    axes[0].set_yscale("symlog", linthresh=1)
    least = min(one["excess_kurtosis"][0] for one in results)
    axes[0].set_ylim(bottom=min(-0.5, 1.5 * least))
    axes[0].set_title("excess kurtosis of channels, quartiles", size=10)
    axes[0].text(0.02, 0.02, "0: Gaussian", transform=axes[0].transAxes, size=8)
    axes[1].set_title("rank correlation with the Gaussian entropy", size=10)
    for ax in axes:
        ax.set_xlabel("layer")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")


def _draw_perplexities(axes: Any, found: dict[str, Any]) -> None:
    lines = perplexities(found)
    methods = list(dict.fromkeys(method for method, _ in lines))
    for ax, method in zip(axes, methods, strict=False):
        for (other, source), by_rows in lines.items():
            if other == method:
                counts = sorted(by_rows)
                means = [np.mean(by_rows[n]) for n in counts]
                spread = [np.std(by_rows[n], ddof=len(by_rows[n]) > 1) for n in counts]
                ax.errorbar(counts, means, spread, marker="o", capsize=3, label=source)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(mpl.ticker.ScalarFormatter())
        ax.set_title(f"{method}: perplexity on held-out text", size=10)
        ax.set_xlabel("calibration rows")
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
