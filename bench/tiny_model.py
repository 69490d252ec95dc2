"""A language model small enough to train in minutes, with SOME blocks in place of its feed-forward layers.

Pre-norm attention and SOME in every layer, learned positions, head tied to the embedding, float32 throughout. Routing
keys are an argument of the forward pass, one set per rule under test, so that many rules read a text side by side.
R rules, B sequences (a multiple of R, one rule's beside each other), T tokens, H hidden, M experts, K of them per
token, D key size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from model.blocks.experts import SiluExperts
from model.blocks.routing import BALANCE_LOSS_COEF


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyConfig:
    """The model of table A, and how it is trained."""

    layers: int = 3
    hidden_size: int = 96
    heads: int = 4
    num_experts: int = 64
    num_experts_per_tok: int = 4
    expert_size: int = 32
    key_size: int = 64
    context: int = 128
    vocabulary: int = 1024
    steps: int = 2000
    sequences_per_step: int = 12
    learning_rate: float = 3e-3
    warmup_steps: int = 50


@dataclass(frozen=True, slots=True)
class Routed:
    """What one SOME layer did with R x N tokens (N of each rule)."""

    expert_ids: Tensor  # (R, N, K)
    gates: Tensor  # (R, N, K)
    queries: Tensor  # (R, N, D)
    deviations: Tensor  # (R, N, K, H): output of the expert minus output of the layer
    auxiliary: Tensor  # (): keeps experts evenly loaded while training


class TinyLayer(nn.Module):
    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.attention_norm = nn.RMSNorm(hidden)
        self.qkv_proj = nn.Linear(hidden, 3 * hidden, bias=False)
        self.o_proj = nn.Linear(hidden, hidden, bias=False)
        self.norm = nn.RMSNorm(hidden)
        self.query_proj = nn.Linear(hidden, config.key_size, bias=False)
        self.anchors = nn.Parameter(torch.randn(config.num_experts, config.key_size) * config.key_size**-0.5)
        self.experts = SiluExperts(config.num_experts, hidden, config.expert_size)

    def attend(self, hidden: Tensor) -> Tensor:
        qkv = self.qkv_proj(self.attention_norm(hidden)).unflatten(-1, (3, self.config.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, head size)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def route(self, hidden: Tensor, keys: Tensor, nudge: Tensor | float) -> tuple[Tensor, Routed]:
        """hidden (B, T, H), keys (R, M, D), nudge added to the selected scores (R, N, K) -> output (B, T, H)."""
        rules, k = len(keys), self.config.num_experts_per_tok
        normed = self.norm(hidden)
        queries = self.query_proj(normed).view(rules, -1, self.config.key_size)
        all_scores = queries @ keys.transpose(1, 2)  # (R, N, M)
        scores, expert_ids = all_scores.topk(k, dim=-1)
        gates = (scores + nudge).softmax(-1)
        outputs = self.experts(normed.flatten(0, 1), expert_ids.flatten(0, 1)).view(*expert_ids.shape, -1)
        combined = (outputs * gates.unsqueeze(-1)).sum(2)
        auxiliary = balance_loss(all_scores.flatten(0, 1), expert_ids)
        deviations = outputs - combined.unsqueeze(2)
        return combined.view_as(hidden), Routed(expert_ids, gates, queries, deviations, auxiliary)


def balance_loss(scores: Tensor, expert_ids: Tensor) -> Tensor:
    """The project's load balancing (Switch Transformers section 2.2) without the z loss.

    That one lowers all scores together, so all queries come to share one large part pointing away from all keys, and
    whatever pulls a key is then mostly about that part: literal pull ruins the model at any rate.
    """
    experts = scores.shape[-1]
    share = torch.bincount(expert_ids.flatten(), minlength=experts).float() / expert_ids.numel()
    return BALANCE_LOSS_COEF * experts * (share * scores.softmax(-1).mean(0)).sum()


class TinyModel(nn.Module):
    def __init__(self, config: TinyConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Parameter(torch.randn(config.vocabulary, config.hidden_size) * 0.02)
        self.positions = nn.Parameter(torch.randn(config.context, config.hidden_size) * 0.02)
        self.layers = nn.ModuleList(TinyLayer(config) for _ in range(config.layers))
        self.final_norm = nn.RMSNorm(config.hidden_size)

    def anchors(self) -> list[Tensor]:
        """Trained keys of every layer, each (1, M, D)."""
        return [layer.anchors.unsqueeze(0) for layer in self.layers]

    def forward(
        self, tokens: Tensor, keys: Sequence[Tensor], nudges: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Routed]]:
        """tokens (B, T), keys (R, M, D) per layer -> hidden states before the final norm (B, T, H)."""
        hidden = self.embedding[tokens] + self.positions[: tokens.shape[1]]
        routed: list[Routed] = []
        for number, layer in enumerate(self.layers):
            hidden = hidden + layer.attend(hidden)
            output, each = layer.route(hidden, keys[number], nudges[number] if nudges else 0.0)
            hidden = hidden + output
            routed.append(each)
        return hidden, routed

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(self.final_norm(hidden), self.embedding)


def train(config: TinyConfig, sequences: Tensor, seed: int, bar_position: int = 0) -> TinyModel:
    """A model trained on random rows of sequences (W, T + 1); frozen afterwards."""
    torch.manual_seed(seed)
    model = TinyModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    bar = tqdm(range(config.steps), desc=f"seed {seed}: train", unit="step", position=bar_position)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(step, config)
        batch = sequences[torch.randint(len(sequences), (config.sequences_per_step,))]
        hidden, routed = model(batch[:, :-1], model.anchors())
        loss = F.cross_entropy(model.logits(hidden).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + sum(each.auxiliary for each in routed)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    return model.requires_grad_(requires_grad=False).eval()


def _learning_rate(step: int, config: TinyConfig) -> float:
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    return config.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
