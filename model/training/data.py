"""Token windows of every domain and split, built once from `sources` and recorded in a manifest."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from model.tokenizer import TextTokenizer
from model.training.sources import DOMAINS, Domain, documents

WINDOW = 512  # tokens per training or evaluation window; each is one independent sequence
SEED = 2026
# Measuring wants many files, not long ones. What is taken of a file is spread over it: many begin with a licence.
WINDOWS_PER_FILE = {"train": 12, "validation": 2, "heldout": 2}


@dataclass(frozen=True, slots=True)
class WindowSet:
    """Windows of one domain and split: tokens (windows, WINDOW + 1) int32, the file that each came from."""

    domain: str
    tokens: NDArray[np.int32]
    file_index: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.tokens)


def build(
    folder: Path,
    tokenizer: TextTokenizer,
    tokens_per_domain: dict[str, int],
    domains: Iterable[Domain] = DOMAINS,
) -> None:
    """Write `<domain>-<split>.npz` for every domain and a manifest of every file used. Existing ones are kept.

    tokens_per_domain: split -> tokens wanted. Untrained domains get no train split.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest_path = folder / "manifest.json"
    files_used: dict[str, list[dict[str, object]]] = {}
    if manifest_path.is_file():
        files_used = json.loads(manifest_path.read_text())["files"]
    work = [
        (domain, split)
        for domain in domains
        for split in tokens_per_domain
        if domain.trained or split != "train"
        if not (folder / f"{domain.name}-{split}.npz").is_file()
    ]
    for domain, split in work:
        windows, index, files = _collect(domain, split, tokenizer, tokens_per_domain[split])
        np.savez(folder / f"{domain.name}-{split}.npz", tokens=windows, file_index=index)
        files_used[f"{domain.name}-{split}"] = files
        manifest_path.write_text(json.dumps({"seed": SEED, "files": files_used}, indent=1))


def save(folder: Path, split: str, windows: WindowSet) -> None:
    """Write windows that were not cut from files."""
    np.savez(folder / f"{windows.domain}-{split}.npz", tokens=windows.tokens, file_index=windows.file_index)


def load(folder: Path, split: str) -> dict[str, WindowSet]:
    """Every window set of a split that the folder holds, by domain."""
    sets: dict[str, WindowSet] = {}
    for path in sorted(folder.glob(f"*-{split}.npz")):
        domain = path.name.removesuffix(f"-{split}.npz")
        with np.load(path, allow_pickle=False) as arrays:
            sets[domain] = WindowSet(domain, arrays["tokens"], arrays["file_index"])
    return sets


def _collect(
    domain: Domain, split: str, tokenizer: TextTokenizer, tokens_wanted: int
) -> tuple[NDArray[np.int32], NDArray[np.int32], list[dict[str, object]]]:
    """Cut files into windows until there are enough; a file's last, shorter window is left out."""
    wanted = tokens_wanted // WINDOW
    windows: list[NDArray[np.int32]] = []
    index: list[int] = []
    files: list[dict[str, object]] = []
    bar = tqdm(total=tokens_wanted, desc=f"{domain.name} {split}", unit="tok", unit_scale=True)
    for document in documents(domain, split, SEED):
        ids = np.array(tokenizer.encode(document.text), dtype=np.int32)
        available = (len(ids) - 1) // WINDOW
        count = min(available, WINDOWS_PER_FILE[split], wanted - len(windows))
        if count == 0:
            continue
        picks = np.linspace(0, available - 1, count).round().astype(int).tolist()
        windows += [ids[i * WINDOW : (i + 1) * WINDOW + 1] for i in picks]
        index += [len(files)] * count
        files.append({"path": str(document.path), "sha256": document.sha256, "windows": count})
        bar.update(count * WINDOW)
        if len(windows) == wanted:
            break
    bar.close()
    return np.stack(windows), np.array(index, dtype=np.int32), files
