"""When does live plastic routing lower the loss, by how much, and at what harm to anyone else?

    python bench/plasticity.py discovery --split tuning|confirmation [--targets german ...] [--tokens N] [--rules ...]
    python bench/plasticity.py sessions  --split tuning|confirmation [--domains ...] [--contexts 2048 256] [--rules ...]

Experiments 1 and 2 of docs/gravity.md; the third, a tiny model from scratch, is bench/tiny.py. Texts are installed
files (docs/training.md says which packages), fixed in bench/plasticity_protocol.json with the thresholds, before the
confirmation run. Prints markdown tables; writes OUT/discovery-SPLIT.json, sessions-SPLIT.json, a manifest of every
file with its checksum, and plots. Interrupted runs go on where they were: what is in the JSON is not computed again.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from plasticity_discovery import Discovery, DiscoveryRun
from plasticity_report import discovery_plot, discovery_table, sessions_plot, sessions_table
from plasticity_sessions import interval, run_sessions
from plasticity_texts import Texts
from platformdirs import user_data_path

from keystore.records import GravityConfig
from model.blocks.some import SomeBlock
from model.checkpoints.blocks import load_blocks, shipped_folder
from model.checkpoints.load import find_base_file, load_base
from server.stream.rules import FROZEN, StreamRule, by_name

PROTOCOL = json.loads((Path(__file__).parent / "plasticity_protocol.json").read_text())

PULL = GravityConfig(decay_rate=0.0, inertia="none", credit_candidates=0)
DISCOVERIES = {
    rule.name: rule
    for rule in (
        Discovery("literal", replace(PULL, rule="literal", plasticity_rate=0.01)),
        Discovery("gradient, pull", replace(PULL, rule="gradient", plasticity_rate=0.3)),
        Discovery("direct, regression", replace(PULL, rule="direct"), regression=True),
        Discovery("gradient, regression", replace(PULL, rule="gradient"), regression=True),
        Discovery("retrained router", replace(PULL, rule="gradient"), adam_rate=0.01),
    )
}

# Sessions move the two upper layers only: direct credit is poor further below, and what lies below runs once.
TOP = frozenset({25, 29})
DIRECT = GravityConfig(rule="direct", plasticity_rate=0.1, trust_radius=0.2)
LITERAL = GravityConfig(rule="literal", trust_radius=0.2)
OFFSETS, BIAS = 0.04, 20.0
SESSION_RULES = by_name(
    [
        FROZEN,
        StreamRule("literal .001", replace(LITERAL, plasticity_rate=0.001)),
        StreamRule("literal .01", replace(LITERAL, plasticity_rate=0.01)),
        StreamRule("literal .1", replace(LITERAL, plasticity_rate=0.1)),
        StreamRule("direct", DIRECT),
        StreamRule("gradient", replace(DIRECT, rule="gradient")),
        StreamRule("value offsets", value_rate=OFFSETS),
        StreamRule("output bias", bias_rate=BIAS),
        StreamRule("offsets + bias", value_rate=OFFSETS, bias_rate=BIAS / 2),
    ]
)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    base = load_base(find_base_file(), torch.bfloat16, arguments.data_dir / "cache")
    folder = load_blocks(arguments.blocks or shipped_folder("some"), base.transformer.config.hidden_size)
    blocks: dict[int, SomeBlock] = {}
    for layer, block in folder.blocks.items():
        assert isinstance(block, SomeBlock), f"layer {layer} has no routing keys"
        blocks[layer] = block.requires_grad_(False)
    first = min(blocks) if arguments.experiment == "discovery" else min(TOP)
    texts = Texts(base.transformer, base.tokenizer, blocks, first, arguments.cache)
    blocks = {layer: block for layer, block in blocks.items() if layer >= first}
    path = arguments.out / f"{arguments.experiment}-{arguments.split}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if arguments.experiment == "discovery":
        discovery(arguments, base.transformer, blocks, texts, known, path)
    else:
        sessions(arguments, base.transformer, blocks, texts, known, path)
    digest = texts.write_manifest(arguments.out / f"{arguments.experiment}-{arguments.split}-files.json")
    print(f"\nfiles: {digest}; seed {PROTOCOL['splits']['seed']}")


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("experiment", choices=["discovery", "sessions"])
    made.add_argument("--split", choices=["tuning", "confirmation"], default="tuning")
    made.add_argument("--targets", nargs="+", default=PROTOCOL["discovery"]["targets"])
    made.add_argument("--tokens", nargs="+", type=int, default=PROTOCOL["discovery"]["tokens"])
    made.add_argument("--domains", nargs="+", default=PROTOCOL["sessions"]["domains"])
    made.add_argument("--contexts", nargs="+", type=int, choices=[2048, 256], default=[2048, 256])
    made.add_argument("--sessions", type=int, default=PROTOCOL["sessions"]["sessions a domain"])
    made.add_argument("--batch", type=int, default=4, help="sessions computed beside each other")
    made.add_argument("--rules", nargs="+", help="only these")
    made.add_argument("--blocks", type=Path, help="a folder of `some` blocks (default: the shipped ones)")
    made.add_argument("--out", type=Path, default=Path("docs/figures"))
    made.add_argument("--cache", type=Path, default=Path("data/plasticity"), help="lower layers' outputs")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument(
        "--data-dir", type=Path, default=user_data_path("libration"), help="converted base weights"
    )
    return made.parse_args()


def discovery(arguments, model, blocks, texts, known, path: Path) -> None:
    chosen = [DISCOVERIES[name] for name in arguments.rules or DISCOVERIES]
    for target in arguments.targets:
        run = DiscoveryRun(model, blocks, texts, target, arguments.split, max(arguments.tokens))
        mine = known.setdefault(target, {})
        if "anchors" not in mine:
            mine |= {"anchors": run.evaluate(run.anchors), "random": run.evaluate(run.start), "rules": {}}
        for rule in chosen:
            done = mine["rules"].setdefault(rule.name, {})
            if all(str(tokens) in done for tokens in arguments.tokens):
                continue
            for reading in run.run(rule, arguments.tokens):
                done[str(reading.tokens)] = reading.losses
                path.write_text(json.dumps(known, indent=1) + "\n")
    print(discovery_table(known, arguments.tokens))
    discovery_plot(known, path.with_suffix(".png"))


def sessions(arguments, model, blocks, texts, known, path: Path) -> None:
    chosen = [FROZEN, *(SESSION_RULES[name] for name in arguments.rules or SESSION_RULES if name != "frozen")]
    for context in arguments.contexts:
        for domain in arguments.domains:
            mine = known.setdefault(str(context), {}).setdefault(domain, {"losses": {}, "drift": {}})
            missing = [rule for rule in chosen if rule.name not in mine["losses"]]
            if not missing:
                continue
            result = run_sessions(
                model,
                blocks,
                texts,
                domain,
                arguments.split,
                context,
                missing,
                arguments.sessions,
                arguments.batch,
            )
            mine["file_index"] = result.file_index.tolist()
            mine["losses"] |= {name: losses.tolist() for name, losses in result.losses.items()}
            mine["drift"] |= result.drift
            path.write_text(json.dumps(known, indent=1) + "\n")
    print(sessions_table(known, interval))
    sessions_plot(known, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
