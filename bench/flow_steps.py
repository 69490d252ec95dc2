"""Flow-matching experts: what each solver and number of steps costs, and what it does to the loss.

    python bench/flow_steps.py --data DIR [--blocks FOLDER] [--windows 2] [--rounds 5] [--out docs/figures] [--threads N]

Every combination reads the same held-out windows; its change against the variant's own solver and steps is paired.
Speed is a prompt of 512 tokens as it is served, with `flow_steps` of the request; combinations take turns, and the
ratio to the default is the median over rounds. A request chooses the steps; the solver belongs to the variant, so
other solvers here are the same weights under another configuration. Prints a markdown table, writes flow_steps.json
and flow_steps.png. About a minute a window on one core, most of it for many steps of rk4. The base computes in bfloat16:
changes under about 0.001 nats are its rounding.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from inputs import open_base, open_blocks, parser, windows_by_domain
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from model.blocks import build_block
from model.blocks.base import ExpertBlock, ExpertUsage
from model.blocks.fm_moe import FmMoeConfig
from model.blocks.solvers import SOLVERS
from model.checkpoints.blocks import BlockFolder
from model.kv_cache import CacheBudget
from model.training.data import WindowSet
from model.training.evaluate import window_losses
from model.transformer import Segment, Transformer, Variant

STEPS = (1, 2, 4, 8, 16)
Choice = tuple[str, int]  # solver, steps


@dataclass(frozen=True, slots=True)
class FlowResult:
    """One solver and number of steps. Losses in nats, domains weighted alike; changes against the default."""

    solver: str
    steps: int
    evaluations: int  # of an expert's velocity network per token
    loss: float
    loss_change: float  # nats, paired by window
    loss_change_error: float  # standard error over windows
    against_base: float  # nats; below 0 is better than without blocks
    prompt_tokens_per_s: float
    speed_ratio: float


def as_configured(folder: BlockFolder, solver: str, steps: int) -> dict[int, ExpertBlock]:
    """The same weights under another solver and number of steps."""
    assert isinstance(folder.config, FmMoeConfig), folder.config
    config = replace(folder.config, solver=solver, flow_steps=steps)
    blocks: dict[int, ExpertBlock] = {}
    for layer, block in folder.blocks.items():
        blocks[layer] = build_block(config).requires_grad_(requires_grad=False).eval()
        blocks[layer].load_state_dict(block.state_dict(), assign=True)
    return blocks


def speeds(
    model: Transformer,
    variants: Mapping[Choice, Mapping[int, ExpertBlock]],
    tokens: Sequence[int],
    rounds: int,
) -> dict[Choice, list[float]]:
    """Prompt tokens per second as served, by choice and round; the first round only warms up."""
    measured: dict[Choice, list[float]] = {choice: [] for choice in variants}
    usage = ExpertUsage.of(next(iter(next(iter(variants.values())).values())).config)
    for _ in range(rounds + 1):
        for choice, blocks in variants.items():
            cache = CacheBudget(model.config, len(tokens) + 64, model.dtype, model.device).reserve(
                len(tokens)
            )
            started = time.perf_counter()
            model.step([Segment(tokens, 0, cache, Variant(blocks, usage), flow_steps=choice[1])]).cpu()
            measured[choice].append(len(tokens) / (time.perf_counter() - started))
    return {choice: each[1:] for choice, each in measured.items()}


def measure(
    model: Transformer,
    folder: BlockFolder,
    windows: Mapping[str, WindowSet],
    choices: Sequence[Choice],
    default: Choice,
    rounds: int,
) -> list[FlowResult]:
    variants = {choice: as_configured(folder, *choice) for choice in choices}
    named = {"dense": {}} | {f"{solver} {steps}": variants[solver, steps] for solver, steps in choices}
    losses = {name: list(by.values()) for name, by in window_losses(model, named, windows, 2).items()}
    prompt = next(iter(windows.values())).tokens[0, :-1].tolist()
    timed = speeds(model, variants, prompt, rounds)
    reference, base = losses["{} {}".format(*default)], losses["dense"]
    results: list[FlowResult] = []
    for solver, steps in choices:
        mine = losses[f"{solver} {steps}"]
        change, error = _paired(mine, reference)
        speed = timed[solver, steps]
        results.append(
            FlowResult(
                solver=solver,
                steps=steps,
                evaluations=steps * len(SOLVERS[solver].nodes),
                loss=float(np.mean([each.mean() for each in mine])),
                loss_change=change,
                loss_change_error=error,
                against_base=_paired(mine, base)[0],
                prompt_tokens_per_s=statistics.median(speed),
                speed_ratio=statistics.median(a / b for a, b in zip(speed, timed[default], strict=True)),
            )
        )
    return results


def table(results: Sequence[FlowResult], default: Choice) -> str:
    lines = [
        "| solver | steps | velocity evaluations | loss, nats | against the default (standard error) | against dense "
        "| prompt tokens/s | ratio to the default |",
        "|---" * 8 + "|",
    ]
    lines += [
        f"| {each.solver} | {each.steps}{' (default)' if (each.solver, each.steps) == default else ''} "
        f"| {each.evaluations} | {each.loss:.4f} | {each.loss_change:+.4f} ({each.loss_change_error:.4f}) "
        f"| {each.against_base:+.4f} | {each.prompt_tokens_per_s:.0f} | {each.speed_ratio:.2f} |"
        for each in results
    ]
    return "\n".join(lines)


def draw(results: Sequence[FlowResult], default: Choice, path: Path) -> None:
    """Loss and speed over velocity evaluations, a line per solver, the default ringed."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, solver in enumerate(dict.fromkeys(each.solver for each in results)):
        own = [each for each in results if each.solver == solver]
        evaluations = [each.evaluations * 1.04**number for each in own]  # beside each other, not on top
        left.errorbar(
            evaluations,
            [each.loss_change for each in own],
            yerr=[each.loss_change_error for each in own],
            marker="o",
            markersize=4,
            capsize=2,
            label=solver,
        )
        right.plot(
            evaluations, [each.prompt_tokens_per_s for each in own], marker="o", markersize=4, label=solver
        )
    chosen = next(each for each in results if (each.solver, each.steps) == default)
    left.axhline(0, color="0.6", linewidth=0.8)
    _ring(left, chosen.evaluations, chosen.loss_change, f"served: {default[0]}, {default[1]} steps")
    _ring(right, chosen.evaluations, chosen.prompt_tokens_per_s, None)
    left.set_ylabel("held-out loss against the default, nats")
    right.set_ylabel("prompt tokens/s")
    right.set_ylim(bottom=0)
    left.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": None})


def _ring(axes: Axes, x: float, y: float, text: str | None) -> None:
    axes.plot(
        [x], [y], marker="o", markersize=11, fillstyle="none", color="black", linestyle="none", label=text
    )
    axes.set_xscale("log", base=2)
    ticks = [2**i for i in range(7)]
    axes.set_xticks(ticks, [str(each) for each in ticks])
    axes.set_xlabel("velocity evaluations per token and expert")


def _paired(mine: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> tuple[float, float]:
    """Mean change over domains, and its standard error from the spread of windows within each."""
    changes = [a.astype(np.float64) - b for a, b in zip(mine, theirs, strict=True)]
    variances = [each.var(ddof=1) / len(each) if len(each) > 1 else 0.0 for each in changes]
    return float(np.mean([each.mean() for each in changes])), float(np.sqrt(np.sum(variances)) / len(changes))


def parse() -> argparse.Namespace:
    made = parser(__doc__, windows=2)
    made.add_argument("--blocks", type=Path, help="folder of trained fm-moe blocks instead of the shipped")
    made.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    made.add_argument("--steps", nargs="+", type=int, default=list(STEPS))
    made.add_argument("--rounds", type=int, default=5)
    return made.parse_args()


def main() -> None:
    arguments = parse()
    model = open_base(arguments).transformer
    folder = open_blocks({"fm-moe": arguments.blocks}, model.config.hidden_size)["fm-moe"]
    assert isinstance(folder.config, FmMoeConfig), folder.config
    default = (folder.config.solver, folder.config.flow_steps)
    asked = {(solver, steps) for solver in arguments.solvers for steps in arguments.steps}
    choices = sorted(asked | {default}, key=lambda choice: (list(SOLVERS).index(choice[0]), choice[1]))
    windows = windows_by_domain(arguments)
    results = measure(model, folder, windows, choices, default, arguments.rounds)
    described = {
        "default": {"solver": default[0], "steps": default[1]},
        "windows": {domain: len(each) for domain, each in windows.items()},
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "results": [asdict(each) for each in results],
    }
    (arguments.out / "flow_steps.json").write_text(json.dumps(described, indent=1) + "\n")
    draw(results, default, arguments.out / "flow_steps.png")
    print(table(results, default))


if __name__ == "__main__":
    main()
