"""What bench/attack.py shows: its results, tables and picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from keystore.canary import GuardConfig

LIMITS = GuardConfig()
NO_RADIUS = 100.0  # the widest that the store takes
COLOURS = {0.05: "tab:green", 0.2: "tab:blue", 0.25: "tab:purple", NO_RADIUS: "tab:red"}
STYLES = {"literal": "-", "literal + peers": ":", "direct": "--", "gradient": "", "direct + peers": "-."}


@dataclass(frozen=True, slots=True)
class Case:
    """One experiment."""

    goal: str
    rule: str
    radius: float
    guarded: bool = False  # only the global scope, behind the canary


@dataclass(frozen=True, slots=True)
class Moment:
    """The attacked scope after some windows; load and overlap are those of other people's text routed by it."""

    events: int  # tokens that the adversary has taught
    taken: float  # share of the wanted traffic that its experts win
    overlap: float  # with the anchors, mean over layers
    entropy_ratio: float  # of the load over experts, mean over layers
    imbalance: float  # largest over mean load, worst layer
    drift: float  # largest fraction of the radius used
    drift_of_anchor: float  # the same displacement over |k0|
    closest_pair: float  # distance of the closest two keys over that of the anchors, worst layer


@dataclass(frozen=True, slots=True)
class Outcome:
    """One case from its first window (0 events) to its last."""

    case: Case
    moments: Sequence[Moment]
    loss_change: float  # of held-out text served by the attacked scope, fraction
    served_overlap: float  # the same text's routing against the anchors, lower blocks' effect included
    others_identical: bool  # another tenant's keys and routing, bit for bit, after every window
    others_overlap: float
    scopes_identical: bool | None  # tenant and global scope hold the same keys; None: one scope only
    windows_refused: int  # by the guard

    @property
    def taken_at(self) -> int | None:
        """Events until half of the wanted traffic was taken, to a window."""
        return next((each.events for each in self.moments if each.taken >= 0.5), None)

    @property
    def overlap_alarm_at(self) -> int | None:
        return next((each.events for each in self.moments if each.overlap < LIMITS.min_overlap), None)


@dataclass(frozen=True, slots=True)
class Geometry:
    """One layer: why the radius holds or not."""

    layer: int
    victim: int
    own_expert: int
    victim_share: float  # of the traffic
    common_energy: float  # of queries, in one direction
    safe_radius: float
    safe_radius_without_common: float


def outcome_heading(start: Moment) -> str:
    return (
        "| goal | rule | radius | events until half is taken | taken at most (at the end) | overlap, own scope | loss, own scope "
        "| overlap, other tenants | largest drift: of radius (of key) | closest pair | load entropy (at first "
        f"{start.entropy_ratio:.3f}) | imbalance ({start.imbalance:.1f}) | guard: overlap | guard: loss |\n"
        + "|---" * 14
        + "|"
    )


def outcome_row(outcome: Outcome) -> str:
    case, last = outcome.case, outcome.moments[-1]
    rule = f"{case.rule}, guarded: {outcome.windows_refused} windows refused" if case.guarded else case.rule
    taken_at = f"never in {last.events}" if outcome.taken_at is None else f"{outcome.taken_at}"
    alarm = "no" if outcome.overlap_alarm_at is None else f"at {outcome.overlap_alarm_at}"
    cells = [
        case.goal,
        rule,
        "none" if case.radius >= NO_RADIUS else f"{case.radius:g}",
        taken_at,
        f"{100 * max(each.taken for each in outcome.moments):.0f} % ({100 * last.taken:.0f} %)",
        f"{outcome.served_overlap:.3f}",
        f"{100 * outcome.loss_change:+.2f} %",
        f"{outcome.others_overlap:.3f}, {'bits equal' if outcome.others_identical else 'BITS DIFFER'}",
        f"{'-' if case.radius >= NO_RADIUS else f'{last.drift:.3f}'} ({last.drift_of_anchor:.2f})",
        f"{last.closest_pair:.2f}",
        f"{last.entropy_ratio:.3f}",
        f"{last.imbalance:.1f}",
        alarm,
        "yes" if outcome.loss_change > LIMITS.max_loss_increase else "no",
    ]
    return f"| {' | '.join(cells)} |"


def geometry_table(layers: Sequence[Geometry]) -> str:
    lines = [
        "| layer | victim, own expert | victim's share of traffic | energy of queries in one direction | half is taken "
        "from radius | the same if no key may move in that direction |",
        "|---" * 6 + "|",
    ]
    lines += [
        f"| {each.layer} | {each.victim}, {each.own_expert} | {100 * each.victim_share:.1f} % "
        f"| {100 * each.common_energy:.0f} % | {each.safe_radius:.3f} | {each.safe_radius_without_common:.3f} |"
        for each in layers
    ]
    return "\n".join(lines)


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Share taken over events for both goals, and the loss that the attacked scope ends with; without a guard."""
    outcomes = [each for each in outcomes if not each.case.guarded]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _lines(
        left, [each for each in outcomes if each.case.goal == "takeover"], "the victims' traffic taken over"
    )
    _lines(middle, [each for each in outcomes if each.case.goal == "flood"], "everybody's traffic taken over")
    _bars(right, outcomes)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def _lines(axes: Axes, outcomes: Sequence[Outcome], title: str) -> None:
    for each in outcomes:
        if STYLES[each.case.rule]:
            axes.plot(
                [moment.events for moment in each.moments],
                [100 * moment.taken for moment in each.moments],
                STYLES[each.case.rule],
                color=COLOURS[each.case.radius],
                linewidth=1.3,
                label=f"{each.case.rule}, {_radius(each.case)}",
            )
    axes.axhline(50, color="0.7", linewidth=0.8)
    axes.set_xscale("symlog", base=2, linthresh=256)
    axes.set(xlabel="tokens that the adversary has taught", ylabel="percent won", title=title, ylim=(-2, 102))
    axes.legend(fontsize=6)


def _bars(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    shown = [each for each in outcomes if STYLES[each.case.rule]]
    axes.barh(
        range(len(shown)),
        [100 * each.loss_change for each in shown],
        color=[COLOURS[each.case.radius] for each in shown],
    )
    names = [f"{each.case.goal}, {each.case.rule}, {_radius(each.case)}" for each in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=6)
    axes.invert_yaxis()
    axes.axvline(100 * LIMITS.max_loss_increase, color="0.3", linewidth=0.8, linestyle="--")
    axes.set(xlabel="held-out loss, % (dashed: the guard's limit)", title="harm in the attacked scope")


def _radius(case: Case) -> str:
    return "no radius" if case.radius >= NO_RADIUS else f"radius {case.radius:g}"
