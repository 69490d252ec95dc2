"""What all cases of bench/attack.py share: the keys, the adversary's text, and everybody's traffic as it is served."""

# T tokens of the traffic, M experts, D key size

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from attack_adversary import Goal, common_direction, flood, safe_radius, takeover
from attack_report import Geometry
from attack_serving import Reading, Serving
from inputs import open_base, open_blocks, windows_by_domain
from numpy.typing import NDArray

from keystore.canary import CanaryRun
from keystore.records import Float32Array
from keystore.snapshot import KeySnapshot
from model.keys import AnchorKeys

ByLayer = Mapping[int, Float32Array]
Masks = Mapping[int, NDArray[np.bool_]]  # (T, M) by layer: selected


@dataclass(slots=True)
class World:
    """What all cases share."""

    anchors: ByLayer  # (M, D)
    num_experts_per_tok: int
    goals: Mapping[str, Mapping[int, Goal]]
    serving: Serving  # everybody's traffic
    honest: Reading  # the same, served with the anchors
    readings: dict[str, Reading] = field(default_factory=dict[str, Reading])

    def read(self, view: KeySnapshot) -> Reading:
        """Serve the traffic with a version, once for all versions that hold the same."""
        if view.checksum not in self.readings:
            self.readings[view.checksum] = replace(self.serving.read(view), queries={})
        return self.readings[view.checksum]

    def run(self, view: KeySnapshot) -> CanaryRun:
        """The traffic as a guard's canary."""
        reading = self.read(view)
        return CanaryRun(reading.loss, reading.expert_ids)

    def selected(self, view: AnchorKeys | KeySnapshot) -> Masks:
        """What the traffic's queries select in each layer, had the layers below not changed."""
        masks: dict[int, NDArray[np.bool_]] = {}
        for layer, queries in self.honest.queries.items():
            ids = view.search(layer, queries, self.num_experts_per_tok)[1]
            masks[layer] = np.zeros((len(queries), len(view.keys_of(layer))), np.bool_)
            np.put_along_axis(masks[layer], ids, values=True, axis=1)
        return masks

    def wanted(self, goal: str) -> ByLayer:
        """The queries that the adversary wants to win: of the victim's traffic, or all."""
        if goal == "flood":
            return self.honest.queries
        return {
            layer: queries[np.isin((queries @ keys.T).argmax(axis=1), self.goals[goal][layer].banished)]
            for (layer, queries), keys in zip(self.honest.queries.items(), self.anchors.values(), strict=True)
        }


def build_world(arguments: argparse.Namespace) -> World:
    model = open_base(arguments).transformer
    folder = open_blocks({"some": arguments.blocks}, model.config.hidden_size)["some"]
    windows = windows_by_domain(arguments)
    known, traffic = (np.concatenate([each.tokens[part::2] for each in windows.values()]) for part in (0, 1))
    anchors = {layer: block.get_parameter("anchors").numpy() for layer, block in folder.blocks.items()}
    at_home = AnchorKeys(anchors)
    own = Serving(model, folder, known).read(at_home).queries
    serving = Serving(model, folder, traffic)
    k = folder.config.num_experts_per_tok
    goals = {
        "takeover": {layer: takeover(own[layer], keys) for layer, keys in anchors.items()},
        "flood": {layer: flood(own[layer], keys, k) for layer, keys in anchors.items()},
    }
    return World(anchors, k, goals, serving, serving.read(at_home))


def look_at_geometry(world: World) -> list[Geometry]:
    found: list[Geometry] = []
    for layer, goal in world.goals["takeover"].items():
        traffic, anchors = world.honest.queries[layer], world.anchors[layer]
        mine = world.wanted("takeover")[layer]
        common, energy = common_direction(traffic)
        found.append(
            Geometry(
                layer=layer,
                victim=int(goal.banished[0]),
                own_expert=int(goal.favoured[0]),
                victim_share=len(mine) / len(traffic),
                common_energy=energy,
                safe_radius=safe_radius(mine, anchors, goal),
                safe_radius_without_common=safe_radius(mine, anchors, goal, spared=common),
            )
        )
    return found


def overlap(selected: Masks, others: Masks) -> float:
    """Share of selected experts that the others selected too, mean over layers and tokens."""
    return float(np.mean([(mask & others[n]).sum() / mask.sum() for n, mask in selected.items()]))
