"""Tables and plots of the plasticity experiments, from what their JSON files hold."""

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from plasticity_texts import UNTRAINED

mpl.use("Agg")
import matplotlib.pyplot as plt

Interval = Callable[[NDArray[np.float64], NDArray[np.int64]], tuple[float, float]]


def recovered(target: str, entry: dict, losses: dict) -> float:
    """Percent of the loss that random keys cost which is gone."""
    gap = entry["random"][target] - entry["anchors"][target]
    return 100 * (entry["random"][target] - losses[target]) / gap


def harm(target: str, entry: dict, losses: dict) -> tuple[float, str]:
    """The worst change of any other domain against the start, in percent, and which."""
    changes = {
        name: 100 * (loss / entry["random"][name] - 1) for name, loss in losses.items() if name != target
    }
    worst = max(changes, key=lambda name: changes[name])
    return changes[worst], worst


def discovery_table(known: dict, tokens: list[int]) -> str:
    """One row a target and rule."""
    head = "| target (loss: anchors, random keys) | rule | " + " | ".join(
        f"{t:,} tokens" for t in sorted(tokens)
    )
    lines = [head + " | worst change elsewhere |", "|" + "---|" * (len(tokens) + 3)]
    for target, entry in known.items():
        losses = f"{entry['anchors'][target]:.3f}, {entry['random'][target]:.3f}"
        for rule, readings in entry["rules"].items():
            cells = [
                f"{recovered(target, entry, readings[str(t)]):.0f} %" if str(t) in readings else ""
                for t in sorted(tokens)
            ]
            latest = readings[max(readings, key=int)]
            change, where = harm(target, entry, latest)
            lines.append(
                f"| {target} ({losses}) | {rule} | {' | '.join(cells)} | {change:+.2f} % ({where}) |"
            )
    return "\n".join(lines)


def discovery_plot(known: dict, path: Path) -> None:
    """Recovered gap against tokens, a panel a target."""
    figure, axes = plt.subplots(
        1, len(known), figsize=(5 * len(known), 4), sharey=True, squeeze=False, layout="constrained"
    )
    rules = list(dict.fromkeys(rule for entry in known.values() for rule in entry["rules"]))
    for axis, (target, entry) in zip(axes[0], known.items(), strict=True):
        for rule, readings in entry["rules"].items():
            seen = sorted(map(int, readings))
            gone = [recovered(target, entry, readings[str(tokens)]) for tokens in seen]
            axis.plot([0, *seen], [0, *gone], "o-", color=f"C{rules.index(rule)}", label=rule)
        axis.set(title=target, xlabel="tokens of mixed traffic", ylim=(-30, 110))
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.axhline(100, color="grey", linewidth=0.5)
    axes[0][0].set_ylabel("gap recovered, %")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(rules), fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def gains_of(entry: dict, rule: str) -> NDArray[np.float64]:
    """Percent of the frozen loss saved, session by session."""
    frozen = np.array(entry["losses"]["frozen"])
    return 100 * (frozen - np.array(entry["losses"][rule])) / frozen


def sessions_table(known: dict, interval: Interval) -> str:
    """Per context: one row a rule, one column a domain, then the domains never trained together."""
    parts: list[str] = []
    for context, by_domain in known.items():
        domains = list(by_domain)
        rules = [rule for rule in next(iter(by_domain.values()))["losses"] if rule != "frozen"]
        named = " | ".join(f"{d}{'*' if d in UNTRAINED else ''}" for d in domains)
        lines = [
            f"\nContext {context}: percent of the frozen loss saved, 95 % interval over files; * never trained\n",
            f"| rule | {named} | all * | sessions better | worst session | drift |",
            "|" + "---|" * (len(domains) + 5),
        ]
        for rule in rules:
            gains = {d: gains_of(by_domain[d], rule) for d in domains if rule in by_domain[d]["losses"]}
            cells = [
                _cell(gains[d], by_domain[d]["file_index"], interval) if d in gains else "" for d in domains
            ]
            fresh = [d for d in gains if d in UNTRAINED]
            offsets = np.cumsum([0, *(1 + max(by_domain[d]["file_index"]) for d in fresh)])
            index = [np.array(by_domain[d]["file_index"]) + o for d, o in zip(fresh, offsets, strict=False)]
            together = (
                _cell(np.concatenate([gains[d] for d in fresh]), np.concatenate(index), interval)
                if fresh
                else ""
            )
            every = np.concatenate(list(gains.values()))
            drift = max(by_domain[d]["drift"][rule] for d in gains)
            lines.append(
                f"| {rule} | {' | '.join(cells)} | {together} | {(every > 0).sum()} of {len(every)} "
                f"| {every.min():+.2f} | {drift:.2f} |"
            )
        parts.append("\n".join(lines))
    return "\n".join(parts)


def _cell(gains: NDArray[np.float64], file_index: list[int] | NDArray[np.int64], interval: Interval) -> str:
    low, high = interval(gains, np.array(file_index))
    return f"{gains.mean():+.2f} ({low:+.2f} to {high:+.2f})"


def sessions_plot(known: dict, path: Path) -> None:
    """Every session's gain, a panel a context."""
    figure, axes = plt.subplots(len(known), 1, figsize=(10, 4 * len(known)), squeeze=False)
    for axis, (context, by_domain) in zip(axes[:, 0], known.items(), strict=True):
        rules = [rule for rule in next(iter(by_domain.values()))["losses"] if rule != "frozen"]
        for place, (domain, entry) in enumerate(by_domain.items()):
            spread = (place - len(by_domain) / 2) * 0.12
            for column, rule in enumerate(rules):
                if rule not in entry["losses"]:
                    continue
                gains = gains_of(entry, rule)
                axis.plot(
                    np.full(len(gains), column + spread),
                    gains,
                    ".",
                    color=f"C{place}",
                    label=domain if rule == rules[-1] else None,
                )
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.set_xticks(range(len(rules)), rules, rotation=20, ha="right")
        axis.set(title=f"context {context}", ylabel="loss saved, %", ylim=(-2, 2))
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def curve_table(curves: dict) -> str:
    """Both arms of bench/plastic_training.py: the frozen loss and what every rule saves of it, along the training."""
    rules = _rules_of(curves)
    lines = [
        f"| arm | step | frozen loss | {' | '.join(f'{rule}, % saved' for rule in rules)} | best loss |",
        "|" + "---|" * (len(rules) + 4),
    ]
    for arm, curve in curves.items():
        for reading in curve:
            saved = [f"{mean_gain(reading, rule):+.2f}" for rule in rules]
            best = min(mean_loss(reading, rule) for rule in ("frozen", *rules))
            frozen = mean_loss(reading, "frozen")
            lines.append(f"| {arm} | {reading['step']} | {frozen:.4f} | {' | '.join(saved)} | {best:.4f} |")
    return "\n".join(lines)


def mean_loss(reading: dict, rule: str) -> float:
    """Mean over domains of the mean over sessions, nats a token."""
    return float(np.mean([np.mean(losses[rule]) for losses in reading["losses"].values()]))


def mean_gain(reading: dict, rule: str) -> float:
    """Percent of the same model's frozen loss saved, mean over domains of the mean over sessions."""
    return float(
        np.mean([gains_of({"losses": losses}, rule).mean() for losses in reading["losses"].values()])
    )


def curve_plot(curves: dict, path: Path) -> None:
    """What each rule saves along the training, a panel an arm."""
    figure, axes = plt.subplots(
        1, len(curves), figsize=(5 * len(curves), 4), sharey=True, layout="constrained"
    )
    for axis, (arm, curve) in zip(axes, curves.items(), strict=True):
        steps = [reading["step"] for reading in curve]
        for rule in _rules_of(curves):
            axis.plot(steps, [mean_gain(reading, rule) for reading in curve], "o-", label=rule)
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.set(title=arm, xlabel="training step")
    axes[0].set_ylabel("frozen loss saved, %")
    axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _rules_of(curves: dict) -> list[str]:
    first = next(iter(curves.values()))[0]["losses"]
    return [rule for rule in next(iter(first.values())) if rule != "frozen"]
