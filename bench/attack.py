"""What somebody with one API key, who knows the routing keys, can do to himself, to others and to everybody's keys.

    python bench/attack.py --data DIR [--windows 2] [--attack-windows 20] [--out docs/figures] [--threads N]

Two goals. `takeover`: in every layer the expert that comes second wins the queries of the busiest one. `flood`: the
four idlest experts win everybody's traffic. The adversary sends crafted windows (attack_adversary.py) through the
real key store, to a tenant scope and, as if nobody else taught there, to the global one; another tenant, who has
learned something before, is compared bit for bit after every window. `guarded` cases teach the global scope behind
the guard, whose canary is the traffic itself; refused, the adversary tries again with half the step. Every second
held-out window is text that the adversary knows, the others are the traffic that is taken over and measured, through
the blocks as they are served: loss, routing overlap with the anchors (what the guard reads), load, drift, the closest
pair of keys. What it finds is a lower bound: a better adversary may take more. Prints markdown tables, writes
attack.json and attack.png. About 10 minutes on one core.
"""

import argparse
import json
import logging
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import NoReturn

import numpy as np
from attack_adversary import Adversary, share_taken
from attack_report import NO_RADIUS, Case, Moment, Outcome, draw, geometry_table, outcome_heading, outcome_row
from attack_world import ByLayer, Masks, World, build_world, look_at_geometry, overlap
from inputs import parser
from tqdm import tqdm

from keystore.backends.embedded import EmbeddedBackend
from keystore.canary import Guard, GuardConfig, routing_overlap
from keystore.projection import drift_of_layers, load_balance, min_pairwise_distance
from keystore.records import GravityConfig, ScopeId
from keystore.snapshot import KeySnapshot
from keystore.statistics import RoutingStats
from keystore.store import KeyStore

ATTACKER, EVERYBODY, OTHER = ScopeId("tenant", "mallory"), ScopeId("global"), ScopeId("tenant", "alice")
RADII = (0.05, 0.2, 0.25, NO_RADIUS)
PEERS = 0.05  # beta of the cases with peer pull
RULES = {
    "takeover": ("literal", "literal + peers", "direct", "gradient", "direct + peers"),
    "flood": ("literal", "direct"),
}
GUARDED = [
    Case(goal, rule, GravityConfig().global_trust_radius, guarded=True)
    for goal, rule in product(RULES, ("literal", "direct"))
]


def gravity_of(case: Case) -> GravityConfig:
    rule, _, peers = case.rule.partition(" + ")
    config = GravityConfig(trust_radius=case.radius, global_trust_radius=case.radius)
    return replace(config, rule=rule, bonding_rate=PEERS if peers else 0.0)


@contextmanager
def open_store(world: World, gravity: GravityConfig, *, guarded: bool) -> Generator[KeyStore]:
    with tempfile.TemporaryDirectory() as folder:
        store = KeyStore(
            "some",
            world.anchors,
            gravity,
            EmbeddedBackend(Path(folder) / "keys.sqlite3"),
            num_experts_per_tok=world.num_experts_per_tok,
            plastic_layers=world.anchors.keys(),
            guard=Guard(world, GuardConfig()) if guarded else None,
        )
        try:
            yield store
        finally:
            store.close()


def run_case(world: World, case: Case, attack_windows: int, bar: "tqdm[NoReturn]") -> Outcome:
    gravity = gravity_of(case)
    adversaries = {
        layer: Adversary(layer, anchors, world.goals[case.goal][layer], gravity, world.num_experts_per_tok)
        for layer, anchors in world.anchors.items()
    }
    scopes = [EVERYBODY] if case.guarded else [ATTACKER, EVERYBODY]
    with open_store(world, gravity, guarded=case.guarded) as store:
        teach(store, adversaries, gravity, [OTHER])
        other, home = store.view(OTHER), world.selected(store.view(scopes[0]))
        wanted = world.wanted(case.goal)
        moments = [measure(world, case, store.view(scopes[0]), wanted, home, events=0)]
        identical, refused = True, 0
        for number in range(1, attack_windows + 1):
            if not teach(store, adversaries, gravity, scopes) and case.guarded:
                refused += 1
                adversaries = {n: replace(each, effort=each.effort / 2) for n, each in adversaries.items()}
            events = number * gravity.window_tokens
            moments.append(measure(world, case, store.view(scopes[0]), wanted, home, events))
            identical &= same_bits(store.view(OTHER), other)
            bar.update()
        reading, now = world.read(store.view(scopes[0])), store.view(OTHER)
        return Outcome(
            case=case,
            moments=moments,
            loss_change=reading.loss / world.honest.loss - 1,
            served_overlap=routing_overlap(reading.expert_ids, world.honest.expert_ids),
            others_identical=identical,
            others_overlap=overlap(world.selected(now), world.selected(other)),
            scopes_identical=None if case.guarded else same_bits(store.view(ATTACKER), store.view(EVERYBODY)),
            windows_refused=refused,
        )


def same_bits(mine: KeySnapshot, theirs: KeySnapshot) -> bool:
    return all(keys.tobytes() == theirs.keys_of(layer).tobytes() for layer, keys in mine.keys.items())


def teach(
    store: KeyStore, adversaries: Mapping[int, Adversary], gravity: GravityConfig, scopes: Sequence[ScopeId]
) -> bool:
    """One crafted window, the same for all these scopes; whether anything was published."""
    view = store.view(scopes[0])
    traces = {layer: each.window(view) for layer, each in adversaries.items()}
    stats = RoutingStats.from_tokens(scopes[0], traces, coactivation=gravity.bonding_rate > 0)
    for scope in scopes:
        assert store.submit(replace(stats, scope=scope)), store.counters()
    return bool(store.consolidate_once())


def measure(world: World, case: Case, view: KeySnapshot, wanted: ByLayer, home: Masks, events: int) -> Moment:
    selected = world.selected(view)
    balances = [load_balance(mask.sum(axis=0).astype(np.float32)) for mask in selected.values()]
    drift = drift_of_layers(world.anchors, view.keys, case.radius)[0]
    won = [share_taken(wanted[n], view.keys_of(n), world.goals[case.goal][n]) for n in world.anchors]
    closest = [
        min_pairwise_distance(view.keys_of(n)) / min_pairwise_distance(keys)
        for n, keys in world.anchors.items()
    ]
    return Moment(
        events=events,
        taken=float(np.concatenate(won).mean()),
        overlap=overlap(selected, home),
        entropy_ratio=float(np.mean([each.entropy_ratio for each in balances])),
        imbalance=max(each.imbalance for each in balances),
        drift=drift,
        drift_of_anchor=drift * case.radius,
        closest_pair=min(closest),
    )


def parse() -> argparse.Namespace:
    made = parser(__doc__, windows=2)
    made.add_argument("--blocks", type=Path, help="folder of trained some blocks instead of the shipped")
    made.add_argument("--attack-windows", type=int, default=20, help="of 256 tokens")
    return made.parse_args()


def main() -> None:
    arguments = parse()
    logging.getLogger("keystore.canary").setLevel(logging.ERROR)  # what the guard refuses is in the table
    world = build_world(arguments)
    cases = [
        Case(goal, rule, radius) for goal, rules in RULES.items() for rule, radius in product(rules, RADII)
    ] + GUARDED
    geometry = look_at_geometry(world)
    print(f"{geometry_table(geometry)}\n", flush=True)
    outcomes: list[Outcome] = []
    with tqdm(total=len(cases) * arguments.attack_windows, unit="window") as bar:
        for case in cases:
            outcomes.append(run_case(world, case, arguments.attack_windows, bar))
            if len(outcomes) == 1:
                bar.write(outcome_heading(outcomes[0].moments[0]))
            bar.write(outcome_row(outcomes[-1]))
    described = {
        "traffic_tokens": len(next(iter(world.honest.queries.values()))),
        "window_tokens": GravityConfig().window_tokens,
        "loss": world.honest.loss,
        "geometry": [asdict(each) for each in geometry],
        "outcomes": [asdict(each) for each in outcomes],
    }
    (arguments.out / "attack.json").write_text(json.dumps(described, indent=1) + "\n")
    draw(outcomes, arguments.out / "attack.png")


if __name__ == "__main__":
    main()
