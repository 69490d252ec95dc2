"""Specialisation that can be seen: which experts a variant uses for which kind of text, and how sure that is.

    python bench/specialisation.py --data DIR [--blocks NAME=FOLDER ...] [--windows 16] [--out docs/figures] [--threads N]

All variants read the same held-out windows. Per layer: mutual information of expert (weighted by its gate) and
domain, and the specialisation index, each with its excess over the mean with the labels of whole files permuted (does
routing depend on the domain at all?), beside the excess of fresh routers on the same hidden states (did training add
to it?); and how evenly experts are loaded. For `mom` also how alike the Masters' outputs are, trained and fresh. Prints markdown tables, writes
specialisation.json and a heat map per variant, specialisation-NAME.png. About 4 seconds a window on one core. With
one window a domain there is nothing to permute.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from inputs import open_base, open_blocks, parser, windows_by_domain
from numpy.typing import NDArray
from specialisation_report import LayerResult, MastersResult, draw, layers_table, masters_table
from torch import Tensor
from tqdm import tqdm

from model.blocks import build_block
from model.blocks.base import BlockConfig, ExpertBlock
from model.blocks.mom import MomBlock
from model.training.data import WindowSet
from model.training.gates import block_inputs, dense_gates, master_outputs
from model.training.specialisation import (
    PermutationTest,
    Statistic,
    gate_shares,
    load_entropy_ratio,
    mean_cosine_similarity,
    mutual_information,
    permutation_test,
    specialisation_index,
)
from model.training.upper import lower_states
from model.transformer import Transformer

ROUTED = ("some", "moe", "mom", "fm-moe")
WINDOWS_PER_STEP = 4


@dataclass(slots=True)
class Layer:
    """One layer of one variant, its untrained likes, and what was seen of them; W windows, S seeds."""

    block: ExpertBlock
    fresh: list[ExpertBlock]
    mass: list[NDArray[np.float32]] = field(
        default_factory=list
    )  # (W, 1 + S, E); the trained one comes first
    similarity: list[NDArray[np.float64]] = field(default_factory=list)  # (1 + S, N, N) per step

    def see(self, hidden: Tensor) -> None:
        """Hidden states (B, T, H) that reach this layer."""
        blocks = [self.block, *self.fresh]
        gates = [dense_gates(block, block.normed(hidden)).sum(1) for block in blocks]
        self.mass.append(torch.stack(gates, dim=1).numpy())
        masters = [block for block in blocks if isinstance(block, MomBlock)]
        if masters:
            outputs = (master_outputs(block, block.normed(hidden)).flatten(0, 1).numpy() for block in masters)
            self.similarity.append(np.stack([mean_cosine_similarity(each) for each in outputs]))


def fresh_blocks(config: BlockConfig, seeds: int) -> list[ExpertBlock]:
    """Blocks as they are before training."""
    made: list[ExpertBlock] = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        made.append(build_block(config).requires_grad_(requires_grad=False).eval())
    return made


@torch.inference_mode()
def read_windows(
    model: Transformer, variants: Mapping[str, Mapping[int, Layer]], windows: Mapping[str, WindowSet]
) -> None:
    """Show every window to every layer of every variant; the layers below all blocks run once."""
    first = min(min(layers) for layers in variants.values())
    with tqdm(total=sum(map(len, windows.values())), unit="window") as bar:
        for window_set in windows.values():
            for start in range(0, len(window_set), WINDOWS_PER_STEP):
                tokens = torch.from_numpy(window_set.tokens[start : start + WINDOWS_PER_STEP, :-1]).long()
                shared = lower_states(model, tokens, first)
                for layers in variants.values():
                    blocks = {layer: seen.block for layer, seen in layers.items()}
                    for layer, hidden in block_inputs(model, blocks, shared, first):
                        layers[layer].see(hidden)
                bar.update(len(tokens))


def summed_by_file(
    mass: NDArray[np.float32], windows: Mapping[str, WindowSet]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Mass per window (W, ...) -> per file (U, ...), and each file's domain (U)."""
    pairs = [
        (number, file) for number, each in enumerate(windows.values()) for file in each.file_index.tolist()
    ]
    files, unit = np.unique(np.array(pairs), axis=0, return_inverse=True)
    sums = np.zeros((len(files), *mass.shape[1:]))
    np.add.at(sums, unit.ravel(), mass)
    return sums, files[:, 0]


def measure(number: int, seen: Layer, windows: Mapping[str, WindowSet], permutations: int) -> LayerResult:
    """The statistics of one layer."""
    mass, labels = summed_by_file(np.concatenate(seen.mass), windows)  # (U, 1 + S, E)
    shares = np.stack([gate_shares(mass[:, i], labels, len(windows)) for i in range(mass.shape[1])])
    load = shares[0].mean(0)

    def tests(statistic: Statistic) -> list[PermutationTest]:
        return [
            permutation_test(statistic, mass[:, i], labels, len(windows), permutations)
            for i in range(mass.shape[1])
        ]

    information, *untrained_information = tests(mutual_information)
    index, *untrained_index = tests(specialisation_index)
    return LayerResult(
        layer=number,
        shares=shares[0].tolist(),
        information=information,
        untrained_information=untrained_information,
        index=index,
        untrained_index=untrained_index,
        load_entropy_ratio=float(load_entropy_ratio(shares[0])),
        load_variation=float(load.std() / load.mean()),
        unused_experts=int((load == 0).sum()),
    )


def compare_masters(number: int, seen: Layer) -> MastersResult:
    trained, *fresh = np.mean(seen.similarity, axis=0).tolist()
    return MastersResult(layer=number, trained=trained, untrained=fresh)


def parse() -> argparse.Namespace:
    made = parser(__doc__, windows=16)
    made.add_argument(
        "--blocks", action="append", default=[], metavar="NAME=FOLDER", help="instead of the shipped"
    )
    made.add_argument("--permutations", type=int, default=1000)
    made.add_argument("--seeds", type=int, default=5, help="fresh blocks per layer")
    return made.parse_args()


def main() -> None:
    arguments = parse()
    model = open_base(arguments).transformer
    named = dict(each.split("=", 1) for each in arguments.blocks) or dict.fromkeys(ROUTED)
    folders = open_blocks(
        {name: folder and Path(folder) for name, folder in named.items()}, model.config.hidden_size
    )
    windows = windows_by_domain(arguments)
    variants = {
        name: {
            layer: Layer(block, fresh_blocks(folder.config, arguments.seeds))
            for layer, block in folder.blocks.items()
        }
        for name, folder in folders.items()
    }
    read_windows(model, variants, windows)
    results = {
        name: [measure(number, seen, windows, arguments.permutations) for number, seen in layers.items()]
        for name, layers in variants.items()
    }
    masters = {
        name: [compare_masters(number, seen) for number, seen in layers.items()]
        for name, layers in variants.items()
        if next(iter(layers.values())).similarity
    }
    report(arguments, windows, results, masters)


def report(
    arguments: argparse.Namespace,
    windows: Mapping[str, WindowSet],
    results: Mapping[str, list[LayerResult]],
    masters: Mapping[str, list[MastersResult]],
) -> None:
    described = {
        "windows": {domain: len(each) for domain, each in windows.items()},
        "files": {domain: len(np.unique(each.file_index)) for domain, each in windows.items()},
        "permutations": arguments.permutations,
        "variants": {name: [asdict(each) for each in layers] for name, layers in results.items()},
        "masters": {name: [asdict(each) for each in layers] for name, layers in masters.items()},
    }
    (arguments.out / "specialisation.json").write_text(json.dumps(described, indent=1) + "\n")
    for name, layers in results.items():
        picture = arguments.out / f"specialisation-{name}.png"
        draw(name, layers, list(windows), picture, masters=name in masters)
    print(layers_table(results, len(windows)))
    for name, layers in masters.items():
        print(f"\n{masters_table(name, layers)}")


if __name__ == "__main__":
    main()
