"""Six panels of what flow-matching experts do on held-out text: who is chosen, and how tokens are carried.

    python bench/flow_picture.py --data DIR [--blocks FOLDER] [--layer N] [--domain NAME] [--out docs/figures]

The README of mixture-of-flows 0.2.0 shows a call that draws this (`visualize_flow_matching_moe`); the package does
not have it. For one layer (the last one by default): mean router probability of each expert, selections, balance
score of every layer, gates token by token over a piece of text, the speed along the flow, and the flow of some tokens
projected on two principal components. Writes flow_picture.png. About 2 seconds a window on one core.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from flow_panels import Flow, Panels, draw
from inputs import label, open_base, open_blocks, parser, windows_by_domain
from torch import Tensor

from model.blocks.flow_experts import FlowExperts, time_embedding, velocity
from model.blocks.fm_moe import FmMoeBlock
from model.blocks.solvers import SOLVERS, integrate
from model.tokenizer import TextTokenizer
from model.training.data import WindowSet
from model.training.gates import block_inputs, dense_gates
from model.training.upper import lower_states
from model.transformer import Transformer

FINE_STEPS = 32  # the flow is drawn finer than it is served
CARRIED_TOKENS = 64  # of each expert
SHOWN_TOKENS = 40
Rows = dict[str, Tensor]  # normed hidden states (T, H) by domain


@torch.inference_mode()
def read_rows(
    model: Transformer, blocks: Mapping[int, FmMoeBlock], windows: Mapping[str, WindowSet]
) -> dict[int, Rows]:
    """What every layer's experts get of the windows, by layer."""
    first = min(blocks)
    rows: dict[int, Rows] = {layer: {} for layer in blocks}
    for domain, window_set in windows.items():
        hidden = lower_states(model, torch.from_numpy(window_set.tokens[:, :-1]).long(), first)
        for layer, reached in block_inputs(model, blocks, hidden, first):
            rows[layer][domain] = blocks[layer].normed(reached).flatten(0, 1)
    return rows


def carry(experts: FlowExperts, expert: int, rows: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Rows (n, H) along one expert's flow: displacements (steps + 1, n, H) and velocities (steps, n, H)."""
    names = ("input_proj", "input_norm", "input_norm_bias", "hidden_proj", "hidden_bias", "hidden_norm")
    names = (*names, "hidden_norm_bias", "velocity_proj", "velocity_bias")
    own = [experts.get_parameter(name)[expert] for name in names]
    displacements: list[Tensor] = []
    velocities: list[Tensor] = []

    def recorded(displacement: Tensor, time: float) -> Tensor:
        embedding = time_embedding(time, experts.time_embed_size, rows.device)
        bias = experts.input_bias[expert] + experts.time_proj[expert] @ embedding
        displacements.append(displacement)
        velocities.append(velocity(rows + displacement, bias, *own))
        return velocities[-1]

    last = integrate(SOLVERS["euler"], recorded, torch.zeros_like(rows), steps)
    return torch.stack([*displacements, last]), torch.stack(velocities)


def flow_of(block: FmMoeBlock, expert: int, rows: Tensor) -> Flow | None:
    """The flow of some tokens for which the expert is the first choice; None if there are none."""
    _, expert_ids, _ = block.route(rows)
    chosen = torch.nonzero(expert_ids[:, 0] == expert).squeeze(1)
    if not len(chosen):
        return None
    picks = chosen[torch.linspace(0, len(chosen) - 1, min(CARRIED_TOKENS, len(chosen))).long()]
    displacements, velocities = carry(block.experts, expert, rows[picks], FINE_STEPS)
    served = block.experts(rows[picks], torch.full((len(picks), 1), expert), block.config.flow_steps)
    return Flow(expert, displacements.numpy(), velocities.norm(dim=-1).numpy(), served.squeeze(1).numpy())


@torch.inference_mode()
def look(
    blocks: Mapping[int, FmMoeBlock],
    rows: Mapping[int, Rows],
    layer: int,
    windows: WindowSet,
    tokenizer: TextTokenizer,
) -> Panels:
    """Everything that the picture shows."""
    block, everything = blocks[layer], torch.cat(list(rows[layer].values()))
    stats = block.usage_stats(everything)
    start = len(windows.tokens[0]) // 2
    shown = slice(start, start + SHOWN_TOKENS)
    flows = [flow_of(block, expert, everything) for expert in range(block.config.num_experts)]
    return Panels(
        layer=layer,
        served=f"{block.config.solver}, {block.config.flow_steps} steps",
        expert_probs=stats.expert_probs.numpy(),
        expert_selections=stats.expert_selections.numpy(),
        balance={
            number: blocks[number].usage_stats(torch.cat(list(by_domain.values()))).balance_score
            for number, by_domain in rows.items()
        },
        balance_of_domains={
            number: np.array([blocks[number].usage_stats(each).balance_score for each in by_domain.values()])
            for number, by_domain in rows.items()
        },
        domain=label(windows.domain),
        tokens=[_readable(tokenizer.decode([token])) for token in windows.tokens[0, shown].tolist()],
        gates=dense_gates(block, rows[layer][windows.domain][shown].unsqueeze(0))[0].numpy(),
        flows=[flow for flow in flows if flow is not None],
    )


def _readable(text: str) -> str:
    return text.strip(" ").replace("\n", "↵").replace("\t", "→") or "␣"


def parse() -> argparse.Namespace:
    made = parser(__doc__, windows=2)
    made.add_argument("--blocks", type=Path, help="folder of trained fm-moe blocks instead of the shipped")
    made.add_argument("--layer", type=int, help="the last one with a block by default")
    made.add_argument("--domain", default="python", help="whose text is shown token by token")
    return made.parse_args()


def main() -> None:
    arguments = parse()
    base = open_base(arguments)
    folder = open_blocks({"fm-moe": arguments.blocks}, base.transformer.config.hidden_size)["fm-moe"]
    blocks = {layer: block for layer, block in folder.blocks.items() if isinstance(block, FmMoeBlock)}
    assert blocks, f"not flow-matching experts: {folder.config}"
    windows = windows_by_domain(arguments)
    rows = read_rows(base.transformer, blocks, windows)
    layer = max(blocks) if arguments.layer is None else arguments.layer
    panels = look(blocks, rows, layer, windows[arguments.domain], base.tokenizer)
    path = arguments.out / "flow_picture.png"
    draw(panels, path)
    scores = ", ".join(f"layer {number} {score:.3f}" for number, score in panels.balance.items())
    print(f"balance scores: {scores}\n{path}")


if __name__ == "__main__":
    main()
