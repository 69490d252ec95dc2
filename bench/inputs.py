"""What the measurements of trained blocks start from: command line, base model, blocks, a few held-out windows."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from platformdirs import user_data_path

from model.checkpoints.blocks import BlockFolder, load_blocks, shipped_folder
from model.checkpoints.load import BaseModel, find_base_file, load_base
from model.training.data import WindowSet, load
from model.training.sources import DOMAINS

# People's languages first, then programs: neighbours in a picture are alike.
ORDER = (
    "english", "rust-books", "chat", "german", "french", "spanish",
    "c", "javascript", "python", "perl",
)  # fmt: skip
UNTRAINED = {domain.name for domain in DOMAINS if not domain.trained}


def parser(doc: str | None, windows: int) -> argparse.ArgumentParser:
    """The arguments that every one of these measurements takes."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True, help="folder with NAME-heldout.npz files")
    made.add_argument("--split", default="heldout")
    made.add_argument("--windows", type=int, default=windows, help="at most so many of a domain; 0: all")
    made.add_argument("--out", type=Path, default=Path("docs/figures"))
    made.add_argument("--threads", type=int, default=1)
    made.add_argument(
        "--data-dir", type=Path, default=user_data_path("libration"), help="converted base weights"
    )
    return made


def open_base(arguments: argparse.Namespace) -> BaseModel:
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    return load_base(find_base_file(), torch.bfloat16, arguments.data_dir / "cache")


def open_blocks(named: Mapping[str, Path | None], hidden_size: int) -> dict[str, BlockFolder]:
    """Blocks by name; without a folder, those that come with Libration."""
    return {name: load_blocks(folder or shipped_folder(name), hidden_size) for name, folder in named.items()}


def windows_by_domain(arguments: argparse.Namespace) -> dict[str, WindowSet]:
    """Windows of the split, spread over the files, domains in the order of pictures."""
    found = load(arguments.data, arguments.split)
    assert found, f"{arguments.data} has no windows of the split {arguments.split!r}"
    names = sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
    return {name: _spread(found[name], arguments.windows) for name in names}


def label(domain: str) -> str:
    """A domain's name in tables and pictures."""
    return f"{domain}*" if domain in UNTRAINED else domain


def _spread(windows: WindowSet, count: int) -> WindowSet:
    if not 0 < count < len(windows):
        return windows
    picks = np.linspace(0, len(windows) - 1, count).round().astype(int)
    return WindowSet(windows.domain, windows.tokens[picks], windows.file_index[picks])
