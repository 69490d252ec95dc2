"""A tiny random base model, and the real one for the few tests that are about it."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor

from model.blocks import build_block
from model.blocks.base import BlockConfig, ExpertBlock, ExpertUsage
from model.blocks.fm_moe import FmMoeConfig
from model.blocks.moe import MoeConfig
from model.blocks.mom import MomConfig
from model.blocks.some import SomeConfig
from model.checkpoints.load import BaseModel, assemble, find_base_file, load_base
from model.config import ModelConfig
from model.keys import AnchorKeys
from model.kv_cache import CacheBudget, SequenceCache
from model.tokenizer import TextTokenizer, TokenizerSpec
from model.transformer import Segment, Transformer, Variant

sys.path.append(str(Path(__file__).parents[1] / "bench"))

from redis_server import RedisServer, running

TINY = ModelConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
)
SPECIAL_TOKENS = ["<|end|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}{{ raise_exception('user first') }}"
    "{% endif %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"
)
SIZES = {"layers": (1, 2), "hidden_size": 32}
TINY_BLOCKS = SomeConfig(
    kind="some", **SIZES, num_experts=8, num_experts_per_tok=2, expert_size=8, key_size=16
)
TINY_VARIANTS: dict[str, BlockConfig] = {
    "some": TINY_BLOCKS,
    "moe": MoeConfig(kind="moe", **SIZES, num_experts=8, num_experts_per_tok=2, expert_size=8),
    "mom": MomConfig(kind="mom", **SIZES, num_experts=4, num_experts_per_tok=2, expert_size=24),
    "mom-flow-attention": MomConfig(
        kind="mom", **SIZES, num_experts=4, num_experts_per_tok=2, expert_size=24, attention="flow"
    ),
    "fm-moe": FmMoeConfig(
        kind="fm-moe", **SIZES, num_experts=4, num_experts_per_tok=2, expert_size=16, time_embed_size=8
    ),
    "ffn": BlockConfig(kind="ffn", **SIZES, num_experts=1, num_experts_per_tok=1, expert_size=16),
}


def random_weights(config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    hidden, inner = config.hidden_size, config.intermediate_size
    weights = {
        "embedding": normal(config.vocab_size, hidden) * 3,
        "final_norm": torch.ones(hidden, dtype=dtype),
    }
    for layer in range(config.num_hidden_layers):
        weights |= {
            f"layers.{layer}.input_norm": torch.ones(hidden, dtype=dtype),
            f"layers.{layer}.qkv_proj": normal(config.query_size + 2 * config.key_value_size, hidden),
            f"layers.{layer}.o_proj": normal(hidden, config.query_size),
            f"layers.{layer}.post_attention_norm": torch.ones(hidden, dtype=dtype),
            f"layers.{layer}.gate_up_proj": normal(2 * inner, hidden),
            f"layers.{layer}.down_proj": normal(hidden, inner),
        }
    return weights


def trained_blocks(config: BlockConfig = TINY_BLOCKS) -> dict[int, ExpertBlock]:
    """Blocks that contribute something, as if they had been trained."""
    torch.manual_seed(1)
    blocks = {layer: build_block(config).requires_grad_(requires_grad=False) for layer in config.layers}
    for block in blocks.values():
        for parameter in block.parameters():
            if not parameter.any():  # what makes a fresh block contribute nothing
                torch.nn.init.normal_(parameter, std=0.3)
    return blocks


@dataclass(frozen=True)
class Tiny:
    """A tiny model with one variant, and short ways to run text through it."""

    model: Transformer
    blocks: dict[int, ExpertBlock]
    variant: Variant
    keys: AnchorKeys | None  # None where the variant has no routing keys

    def cache(self, capacity: int = 128) -> SequenceCache:
        return CacheBudget(self.model.config, capacity, self.model.dtype, self.model.device).reserve(capacity)

    def segment(self, tokens: list[int], start: int = 0, *, plain: bool = False) -> Segment:
        blocks = (None, None) if plain else (self.variant, self.keys)
        return Segment(tokens, start, self.cache(), *blocks)

    def logits(self, tokens: list[int], chunk: int | None = None, *, plain: bool = False) -> Tensor:
        """Logits of every position, the prompt read in chunks."""
        first = self.segment(tokens, plain=plain)
        size = chunk or len(tokens)
        rows = [
            self.model.step([replace(first, token_ids=tokens[at : at + size], start=at)])
            for at in range(0, len(tokens), size)
        ]
        return self.model.logits(torch.cat(rows))


def make_tiny(dtype: torch.dtype, variant: str = "some", **sizes: int) -> Tiny:
    config = replace(TINY, **sizes)
    model = assemble(config, random_weights(config, dtype))
    block_config = TINY_VARIANTS[variant]
    blocks = trained_blocks(block_config)
    anchors = {
        layer: block.get_parameter("anchors").numpy()
        for layer, block in blocks.items()
        if block_config.kind == "some"
    }
    served = Variant(blocks, ExpertUsage.of(block_config))
    return Tiny(model, blocks, served, AnchorKeys(anchors) if anchors else None)


@pytest.fixture(name="make_tiny", scope="session")
def make_tiny_fixture() -> Callable[..., Tiny]:
    return make_tiny


@pytest.fixture(params=TINY_VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """Every variant in turn."""
    return request.param


@pytest.fixture
def block_config(variant: str) -> BlockConfig:
    return TINY_VARIANTS[variant]


@pytest.fixture
def every_tiny(variant: str) -> Tiny:
    return make_tiny(torch.float32, variant)


@pytest.fixture(scope="session")
def tiny_variants() -> dict[str, BlockConfig]:
    return TINY_VARIANTS


@pytest.fixture(name="random_weights", scope="session")
def random_weights_fixture() -> Callable[..., dict[str, Tensor]]:
    return random_weights


@pytest.fixture
def tiny() -> Tiny:
    return make_tiny(torch.float32)


@pytest.fixture(scope="session")
def base_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="session")
def load_real(base_cache: Path) -> Callable[[torch.dtype], BaseModel]:
    return lambda dtype: load_base(find_base_file(), dtype, base_cache)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis of the test's own, empty, that forgets nothing."""
    with running(tmp_path / "redis") as server:
        yield server


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    """One token for each byte, and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    ids = [256 + i for i in range(len(SPECIAL_TOKENS))]
    return TextTokenizer(
        TokenizerSpec(backend.to_str(), ids, CHAT_TEMPLATE, SPECIAL_TOKENS[1], SPECIAL_TOKENS[0])
    )


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, torch.nn.Module]]:
    """checkpoint(family, **changes): a tiny Hugging Face folder, each written once, and transformers' model of it."""
    made: dict[str, tuple[Path, torch.nn.Module]] = {}

    def checkpoint_of(family: str, **changes: object) -> tuple[Path, torch.nn.Module]:
        from tiny_checkpoint import write  # transformers takes seconds to import

        name = f"{family} {sorted(changes.items())}"
        if name not in made:
            folder = tmp_path_factory.mktemp(family)
            made[name] = folder, write(family, folder, **changes)
        return made[name]

    return checkpoint_of
