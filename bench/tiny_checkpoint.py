"""Write a tiny checkpoint of any family that `libration serve --model` takes, as transformers itself saves it.

    python bench/tiny_checkpoint.py mixtral runs/tiny-mixtral --steps 60

It learns from Python's own documentation for half a minute: enough to have routers that tell texts apart, not to be clever.
"""

import argparse
import json
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}<|assistant|>"
)
VOCABULARY, CONTEXT = 512, 512
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, object]]] = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": 256}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
    "mixtral": (MixtralConfig, {"num_local_experts": 8}),
    "olmoe": (OlmoeConfig, {"num_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": (Qwen2MoeConfig, EXPERTS | {"shared_expert_intermediate_size": 48}),
    "qwen3_moe": (Qwen3MoeConfig, EXPERTS | {"head_dim": 32}),
}
BATCH, WINDOW, LEARNING_RATE = 8, 128, 3e-3


def write(
    family: str, folder: Path, steps: int = 0, shard_size: str = "1GB", **changes: object
) -> torch.nn.Module:
    """A checkpoint with random weights, trained for some steps; returns transformers' model of it."""
    config_type, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_type(**(SIZES | sizes | changes))).float()
    tokenizer = trained_tokenizer()
    if steps:
        train(model, tokenizer, steps)
    else:  # as uneven as trained weights are, norms and biases too
        for name, parameter in model.named_parameters():
            around = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.data = around + 0.15 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return model.eval()


def trained_tokenizer() -> Tokenizer:
    """Byte-level BPE on the same text, which begins a text with `<s>`."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def texts() -> list[str]:
    """Python's documentation, which comes with every interpreter."""
    return [text for _, text in sorted(topics.topics.items())]


def train(model: torch.nn.Module, tokenizer: Tokenizer, steps: int) -> None:
    tokens = torch.tensor(tokenizer.encode("\n\n".join(texts()), add_special_tokens=False).ids)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    bar = tqdm(range(steps), desc="training", unit="step")
    for _ in bar:
        starts = torch.randint(len(tokens) - WINDOW - 1, (BATCH,))
        rows = tokens[starts[:, None] + torch.arange(WINDOW + 1)]
        loss = torch.nn.functional.cross_entropy(
            model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=0, help="of training; 0: random weights")
    arguments = parser.parse_args()
    write(arguments.family, arguments.folder, arguments.steps)


if __name__ == "__main__":
    main()
