"""transformers' `generate` on the same GGUF file, bfloat16. As a script: spoken to as peer_process.py says."""

import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from peer_process import Missing, PeerProcess


def start(model: Path, threads: int) -> PeerProcess:
    """Raises Missing."""
    try:
        name = f"transformers {version('transformers')} generate, bf16"
    except PackageNotFoundError as error:
        raise Missing("transformers is not installed") from error
    return PeerProcess(name, [sys.executable, __file__, str(model), str(threads)])


def serve(model_file: Path, threads: int) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.utils.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_file.parent, gguf_file=model_file.name, dtype=torch.bfloat16
    ).eval()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        ids = torch.tensor(asked["prompts"])
        lengths = {"min_new_tokens": asked["tokens"], "max_new_tokens": asked["tokens"]}
        started = time.monotonic()
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=2, **lengths)
        print(json.dumps({"seconds": time.monotonic() - started}), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
