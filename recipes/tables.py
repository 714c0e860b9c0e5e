"""What is shown of a comparison: Markdown tables, paired intervals, a CSV file and a figure."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from cells import DENSE, Cell, Found
from harness import parse_method
from rivals import MASKED

from lit_prune.methods import PRESETS

if TYPE_CHECKING:
    from pathlib import Path

BOOTSTRAPS = 2000
# Controls that must not go missing: channels only, uniform, with FLAP's score.
MLP_UNIFORM = "flap:allocator=uniform,granularities=channel"
CONTROLS = (MLP_UNIFORM, f"{MLP_UNIFORM},compensation=least_squares")
FAMILIES = ("ours", "least squares", "others", "controls", "references")
BETTER, WORSE = "‡", "†"
OUT_OF_REACH, FAILED = "×", "failed"
Cells = list[dict[str, Any]]


def family_of(method: str) -> str:
    name, options = parse_method(method)
    if method in MASKED:
        return "references"
    if method in CONTROLS or name == "random":
        return "controls"
    if name in ("conditional", "paper"):
        return "ours"
    known = PRESETS[name].compensation if name in PRESETS else "none"
    least_squares = options.get("compensation", known) == "least_squares"
    return "least squares" if least_squares else "others"


def mean_nll(cell: dict[str, Any], text: str = "") -> float:
    """Return nats per token, on the main text or (``text="other_"``) on the other."""
    return sum(cell[f"{text}nll"]) / sum(cell[f"{text}tokens"])


def perplexity(cell: dict[str, Any], text: str = "") -> float:
    return float(np.exp(mean_nll(cell, text)))


def interval(cells: Cells, others: Cells, text: str = "") -> tuple[float, float]:
    """Return the 95 % interval of the paired difference in NLL per token, over documents.

    The same documents are drawn for both; seeds are averaged (their spread is shown apart).
    """
    rng = np.random.default_rng(0)
    tokens = np.array(cells[0][f"{text}tokens"])
    one = np.mean([cell[f"{text}nll"] for cell in cells], axis=0)
    other = np.mean([cell[f"{text}nll"] for cell in others], axis=0)
    draws = rng.integers(len(tokens), size=(BOOTSTRAPS, len(tokens)))
    differences = (one - other)[draws].sum(1) / tokens[draws].sum(1)
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)


def verdict(low: float, high: float) -> str:
    return "better" if high < 0 else "worse" if low > 0 else "no difference shown"


def table(found: Found, text: str = "") -> str:
    """Return perplexities as Markdown, one row a method, by family; spread over seeds."""
    ratios = found.asked["ratios"]
    lines = ["| method | " + " | ".join(f"{r:.0%}" for r in ratios) + " |"]
    lines.append("|---|" + "---:|" * len(ratios))
    for family in FAMILIES:
        methods = [method for method in found.asked["methods"] if family_of(method) == family]
        if methods and len({family_of(method) for method in found.asked["methods"]}) > 1:
            lines.append(f"| *{family}* |" + " |" * len(ratios))
        for method in methods:
            row = [_entry(found, method, ratio, text) for ratio in ratios]
            lines.append(f"| `{method}` | " + " | ".join(row) + " |")
            if method == found.first and any(found.moved_ratios(ratio) for ratio in ratios):
                again = [_again(found, ratio, text) for ratio in ratios]
                lines.append(f"| `{method}`, where others stand | " + " | ".join(again) + " |")
    return "\n".join(lines)


def _entry(found: Found, method: str, ratio: float, text: str) -> str:
    cells, fair = found.column(method, ratio), found.fair(method, ratio)
    if refused := found.refused(method, ratio):
        return OUT_OF_REACH if "not_reached" in refused else FAILED
    if not cells or not cells[0][f"{text}nll"]:
        return "–"
    mark = ""
    if fair and method != found.first and method not in MASKED:
        low, high = interval(cells, fair, text)
        mark = BETTER if high < 0 else WORSE if low > 0 else ""
    place = found.run_at(method, ratio)
    return _number(cells, text) + mark + (f" @{place:.1%}" if place != ratio else "")


def _again(found: Found, ratio: float, text: str) -> str:
    """Return the first method at the other ratios of this column."""
    entries = []
    for place in found.moved_ratios(ratio):
        cells = found.of(found.first, place)
        entries.append(f"{_number(cells, text) if cells else '–'} @{place:.1%}")
    return ", ".join(entries)


def _number(cells: Cells, text: str) -> str:
    values = [perplexity(cell, text) for cell in cells]
    spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{spread}"


def caption(found: Found, text: str = "") -> str:
    """Say in words what the numbers of `table` are."""
    scored = found.conditions["other" if text else "scored"]
    seeds = found.asked["seeds"]
    words = (
        f"Perplexity on {scored['text']} ({scored['tokens']} tokens), dense "
        f"{perplexity(found.dense, text):.2f}, against decoder parameters removed; calibrated on "
        f"{found.conditions['calibration_rows']} windows of {found.conditions['context']} tokens "
        f"({found.conditions['calibrated_on']})"
    )
    if len(seeds) > 1:
        words += f", mean ± standard deviation over {len(seeds)} calibration sets"
    words += (
        f". {WORSE} worse, {BETTER} better than `{found.first}` at the same ratio: the paired 95 % "
        f"interval excludes 0 (bootstrap over {scored['drawn_by_bootstrap']} documents or "
        "stretches)."
    )
    if found.moved:
        words += " @: the nearest ratio that the method can reach."
    if any(method in MASKED for method in found.asked["methods"]):
        words += " References: two of every four linear weights are zero, nothing is removed."
    return words + f" {OUT_OF_REACH}: no such ratio; –: not run." + "".join(_refusals(found))


def _refusals(found: Found) -> list[str]:
    """Say why cells are empty that were run."""
    return [
        f"\n- `{method}` at {ratio:.0%}: {'; '.join(refused.values())}"
        for method in found.asked["methods"]
        for ratio in found.asked["ratios"]
        if (refused := found.refused(method, ratio))
    ]


def costs(found: Found, near: float = 0.3) -> str:
    """Return what each pruned model, and its pruning, costs at the ratio nearest to ``near``."""
    ratio = min(found.asked["ratios"], key=lambda r: abs(r - near))
    lines = [
        f"At {ratio:.0%} (clock: {found.conditions['clock']}; ± is how far noise may move it):",
        "",
        "| method | excess nats | removed | FLOPs | KV | prefill | decode | forward peak "
        "| pruning | rise |",
        "|---|" + "---:|" * 9,
    ]
    lines += [
        f"| `{method}` | " + " | ".join(_cost(cells, found.dense)) + " |"
        for method in found.asked["methods"]
        if (cells := found.column(method, ratio))
    ]
    lines += [
        "",
        "Excess over the dense model, nats per token: 95 % of a bootstrap over documents.",
    ]
    lines += ["FLOPs, KV bytes and peak memory of a forward over those of the dense model;"]
    lines += ["prefill and decode as speed-up; seconds and rise in memory of the whole pruning."]
    return "\n".join(lines)


def accuracy_table(found: Found) -> str:
    """Return zero-shot accuracies in per cent, a row for each method and ratio; seeds averaged."""
    tasks = found.conditions["tasks"]
    lines = [
        f"| method | removed | {' | '.join(tasks)} | mean |",
        "|---|" + "---:|" * (len(tasks) + 2),
    ]
    rows = [(DENSE, [found.dense])]
    for ratio in found.asked["ratios"]:
        rows += [(method, found.column(method, ratio)) for method in found.asked["methods"]]
    for method, cells in rows:
        if cells:
            means = [100 * float(np.mean([cell["accuracy"][t] for cell in cells])) for t in tasks]
            removed = np.mean([cell["achieved"] for cell in cells])
            numbers = " | ".join(f"{value:.1f}" for value in (*means, np.mean(means)))
            lines.append(f"| `{method}` | {removed:.1%} | {numbers} |")
    return "\n".join(lines)


def speed_up(cell: dict[str, Any], seconds: str, spread: str) -> tuple[float, float]:
    """Return dense time over pruned time, and how far noise alone may move it from 1."""
    dense = cell["dense_latency"]
    return dense[seconds] / cell[seconds], (dense[spread] + cell[spread]) / cell[seconds]


def _cost(cells: Cells, dense: dict[str, Any]) -> list[str]:
    cell = cells[0]
    low, high = interval(cells, [dense] * len(cells))

    def over(name: str) -> str:
        return f"{cell[name] / dense[name]:.2f}" if cell[name] and dense[name] else "–"

    prefill = speed_up(cell, "prefill_seconds", "prefill_spread")
    decode = speed_up(cell, "decode_seconds_per_token", "decode_spread")
    rise = cell["prune_peak_bytes"]
    return [
        f"{np.mean([mean_nll(x) for x in cells]) - mean_nll(dense):.3f} ({low:.3f} … {high:.3f})",
        f"{cell['achieved']:.1%}",
        over("flops_per_token"),
        over("kv_cache_bytes_per_token"),
        f"{prefill[0]:.2f}× ± {prefill[1]:.2f}",
        f"{decode[0]:.2f}× ± {decode[1]:.2f}",
        over("peak_forward_bytes"),
        f"{cell['calibrate_seconds'] + cell['plan_seconds']:.1f} s",
        "–" if rise is None else f"{rise / 2**20:.0f} MiB",
    ]


def duels(found: Found) -> str:
    """Compare the first method with the best others in each column, paired, at equal ratios."""
    lines = []
    for ratio in found.asked["ratios"]:
        others = [
            method
            for method in found.asked["methods"][1:]
            if found.column(method, ratio) and method not in MASKED
        ]
        rivals = [m for m in others if family_of(m) != "ours"]
        groups = {
            "the best other": others,
            "the best rival": rivals,
            "the best rival without least squares": [
                m for m in rivals if "least_squares" not in m and family_of(m) != "least squares"
            ],
        }
        told = set()
        for words, methods in groups.items():
            same = [m for m in methods if found.run_at(m, ratio) == ratio]
            if same and (best := _best(found, same, ratio)) not in told:
                told.add(best)
                lines += _duel(found, best, ratio, words)
        for method in others:
            if found.run_at(method, ratio) != ratio:
                lines += _duel(found, method, ratio, "at the ratio that it reaches")
    return "\n".join(lines)


def _best(found: Found, methods: list[str], ratio: float) -> str:
    return min(methods, key=lambda m: float(np.mean([mean_nll(c) for c in found.column(m, ratio)])))


def _duel(found: Found, method: str, ratio: float, words: str) -> list[str]:
    fair, cells = found.fair(method, ratio), found.column(method, ratio)
    if not fair:
        return []
    low, high = interval(fair, cells)
    one, other = (np.mean([perplexity(cell) for cell in side]) for side in (fair, cells))
    line = (
        f"- {found.run_at(method, ratio):.1%}: `{found.first}` against {words}, `{method}`: "
        f"{verdict(low, high)} ({low:+.4f} … {high:+.4f} nats per token, perplexity "
        f"{one / other - 1:+.1%}"
    )
    if fair[0]["other_nll"]:
        low, high = interval(fair, cells, "other_")
        line += f"; on the other text {verdict(low, high)}, {low:+.4f} … {high:+.4f}"
    return [line + ")"]


def summary(found: Found) -> list[dict[str, Any]]:
    """Return every entry of the tables with its intervals, seeds averaged."""
    rows = []
    for method in found.asked["methods"]:
        for ratio in found.asked["ratios"]:
            cells, fair = found.column(method, ratio), found.fair(method, ratio)
            for name, text in (("main", ""), ("other", "other_")):
                if not cells or not cells[0][f"{text}nll"]:
                    continue
                values = [perplexity(cell, text) for cell in cells]
                rows.append(
                    {
                        "method": method,
                        "family": family_of(method),
                        "asked": ratio,
                        "run_at": found.run_at(method, ratio),
                        "text": name,
                        "perplexity": float(np.mean(values)),
                        "perplexity_by_seed": values,
                        "excess_nll": interval(cells, [found.dense] * len(cells), text),
                        "against_first": interval(cells, fair, text) if fair else None,
                    }
                )
    return rows


def write_csv(found: Found, path: Path) -> None:
    """Write one line for each cell; intervals are of its own seed."""
    lists = ("nll", "tokens", "other_nll", "other_tokens", "dense_latency", "accuracy")
    tasks = found.conditions.get("tasks", [])
    names = [name for name in Cell.__dataclass_fields__ if name not in lists]
    texts = {"": "", "other_": "other_"} if found.dense["other_nll"] else {"": ""}
    heads = [
        f"{text}{name}"
        for text in texts
        for name in (
            *("mean_nll", "perplexity", "excess", "excess_low", "excess_high"),
            *("against_first_low", "against_first_high"),
        )
    ]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["method", "family", "ratio", "seed", *heads, *names, "prefill_speed_up",
             "prefill_speed_up_spread", "decode_speed_up", "decode_speed_up_spread", *tasks]
        )  # fmt: skip
        for key, cell in found.cells.items():
            if "nll" not in cell:
                continue
            method, ratio, seed = key.rsplit("|", 2) if "|" in key else (key, "0", "")
            first = found.cells.get(f"{found.first}|{ratio}|{seed}", {})
            numbers: list[Any] = []
            for text in texts:
                excess = mean_nll(cell, text) - mean_nll(found.dense, text)
                numbers += [mean_nll(cell, text), perplexity(cell, text), excess]
                numbers += interval([cell], [found.dense], text)
                numbers += interval([cell], [first], text) if "nll" in first else ("", "")
            writer.writerow(
                [
                    *(method, "" if method == DENSE else family_of(method), ratio, seed),
                    *numbers,
                    *(cell[name] for name in names),
                    *speed_up(cell, "prefill_seconds", "prefill_spread"),
                    *speed_up(cell, "decode_seconds_per_token", "decode_spread"),
                    *(cell["accuracy"][task] for task in tasks),
                ]
            )


def figure(found: Found, path: Path) -> None:
    """Draw excess NLL against the ratio that was really removed."""
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6), layout="constrained")
    dense = mean_nll(found.dense)
    ends = []
    for number, method in enumerate(m for m in found.asked["methods"] if m not in MASKED):
        points = [
            (cell["achieved"], mean_nll(cell) - dense)
            for ratio in found.asked["ratios"]
            for cell in found.column(method, ratio)
        ]
        if points:
            # the first method stands out; colours alone would not tell twenty others apart
            width = 3 if number == 0 else 1.2
            style = ("-", "--", ":", "-.")[number // 6 % 4]
            xs, ys = zip(*sorted(points), strict=True)
            (line,) = axes.plot(
                xs, ys, style, color=f"C{number % 6}", lw=width, marker="o", markersize=width + 1
            )
            ends.append((ys[-1], method, line))
    ends.sort(key=lambda end: -end[0])  # the legend stands in the order of the lines' ends
    axes.legend(
        [line for *_, line in ends],
        [method for _, method, _ in ends],
        fontsize="x-small",
        loc="center left",
        bbox_to_anchor=(1, 0.5),
        handlelength=4,
    )
    axes.set(xlabel="decoder parameters removed", ylabel="excess NLL (nats per token)")
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(mpl.ticker.PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
