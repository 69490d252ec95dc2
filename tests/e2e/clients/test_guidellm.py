"""guidellm: a short benchmark of both routes on synthetic prompts, counted with the model's own tokenizer."""

import json
from pathlib import Path

import pytest

from model.checkpoints.gguf import GGUFFile
from model.checkpoints.load import find_base_file
from model.tokenizer import spec_from_gguf

pytestmark = pytest.mark.slow

REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 6, 48, 8


@pytest.fixture
def tokenizer_folder(tmp_path) -> Path:
    """The model's tokenizer as transformers reads one."""
    spec, folder = spec_from_gguf(GGUFFile(find_base_file())), tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(spec.backend)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": spec.bos_token,
        "eos_token": spec.eos_token,
        "chat_template": spec.chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_a_benchmark_completes_without_an_error(server, run, tmp_path, tokenizer_folder, route):
    backend = f"kind=openai_http,target={server.url},model=some,request_format={route},api_key=user-key"
    run(
        "guidellm",
        "run",
        f"--backend={backend}",
        "--profile=kind=concurrent,streams=2",
        f"--constraint=kind=max_requests,count={REQUESTS}",
        f"--tokenizer=kind=hf_auto,model={tokenizer_folder}",
        f"--data=kind=synthetic_text,prompt_tokens={PROMPT_TOKENS},output_tokens={OUTPUT_TOKENS}",
        "--output=kind=json,path=report.json",
        "--disable-console-interactive",
    )
    (benchmark,) = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["errored"] == 0
    assert totals["successful"] >= REQUESTS
    answers = benchmark["requests"]["successful"]
    assert {each["output_tokens"] for each in answers} == {OUTPUT_TOKENS}
    assert all(each["prompt_tokens"] >= PROMPT_TOKENS for each in answers)
