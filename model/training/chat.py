"""Conversations that the frozen base itself writes, so that expert blocks learn to leave its manners alone.

Technical text alone pulls a chat model towards going on with text: after such training "What is the capital of
France?" was answered in endless French. Training on the base's own samples (temperature 1) is distillation: its
minimum is the base's distribution. Questions are templates over topics; held-out questions use other topics.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from model.kv_cache import CacheBudget, SequenceCache
from model.sampling import SamplingParams, sample
from model.tokenizer import TextTokenizer
from model.training.data import SEED, WINDOW, WindowSet
from model.transformer import Segment, Transformer

TEMPLATES = (
    "What is {}?",
    "Explain {} in one sentence.",
    "Explain {} to a child.",
    "Why is {} important?",
    "Write a short poem about {}.",
    "Write two sentences about {}.",
    "Give me three facts about {}.",
    "Tell me something interesting about {}.",
    "Write a short story about {}.",
    "How would you describe {} to a friend?",
    "What should a beginner know about {}?",
    "List five words that go with {}.",
    "Give me some advice about {}.",
    "What are common mistakes about {}?",
)
TOPICS = (
    "gravity", "the ocean", "a good breakfast", "the number seven", "friendship", "the moon", "time management",
    "photosynthesis", "the capital of Italy", "the capital of Japan", "the capital of Spain", "the city of London",
    "a lost key", "volcanoes", "learning to swim", "the colour blue", "bread", "winter", "music", "a job interview",
    "the Roman Empire", "electricity", "dogs", "cats", "healthy food", "a birthday party", "the human heart", "trees",
    "the internet", "democracy", "a long journey", "rain", "chess", "saving money", "sleep", "planets", "bees",
    "the French Revolution", "the river Nile", "painting", "mathematics", "a Python list", "a for loop", "recycling",
    "the capital of Egypt", "the capital of Canada", "mountains", "a library", "coffee", "robots", "dinosaurs",
)  # fmt: skip
HELDOUT_TOPICS = (
    "the capital of Germany",
    "the sun",
    "tea",
    "kindness",
    "bicycles",
    "the Amazon river",
    "history",
)
MAX_ANSWER_TOKENS = 160
STREAMS = 24


def conversations(model: Transformer, tokenizer: TextTokenizer, split: str, tokens_wanted: int) -> WindowSet:
    """Windows of whole conversations laid end to end; "train" and "heldout" have different topics."""
    topics = HELDOUT_TOPICS if split == "heldout" else TOPICS
    questions = [template.format(topic) for template, topic in itertools.product(TEMPLATES, topics)]
    random.Random(SEED).shuffle(questions)  # noqa: S311 - an order, not a secret
    wanted = -(-tokens_wanted // WINDOW) * WINDOW + 1
    stream: list[int] = []
    with tqdm(total=wanted, desc=f"chat {split}", unit="tok", unit_scale=True) as bar:
        for conversation in _answers(model, tokenizer, itertools.cycle(questions)):
            stream += conversation
            bar.update(len(conversation))
            if len(stream) >= wanted:
                break
    ids = np.array(stream, dtype=np.int32)
    windows = np.stack([ids[at : at + WINDOW + 1] for at in range(0, wanted - 1, WINDOW)])
    return WindowSet("chat", windows, np.arange(len(windows), dtype=np.int32))


@dataclass(slots=True, eq=False)
class Conversation:
    """Token ids of a question and the answer so far."""

    token_ids: list[int]
    limit: int
    cache: SequenceCache
    read: int = 0


def _answers(model: Transformer, tokenizer: TextTokenizer, questions: Iterator[str]) -> Iterator[list[int]]:
    """Endless conversations, token ids of question and sampled answer; as one ends the next takes its place."""
    budget = CacheBudget(model.config, 1 << 20, model.dtype, model.device)
    generator = torch.Generator().manual_seed(SEED)
    params = SamplingParams(max_tokens=MAX_ANSWER_TOKENS)
    running: list[Conversation] = []
    while True:
        while len(running) < STREAMS:
            text = tokenizer.encode_chat([{"role": "user", "content": next(questions)}])
            limit = len(text) + MAX_ANSWER_TOKENS
            running.append(Conversation(text, limit, budget.reserve(limit)))
        segments = [Segment(each.token_ids[each.read :], each.read, each.cache) for each in running]
        hidden = model.step(segments)
        last = torch.tensor([len(segment.token_ids) for segment in segments]).cumsum(0) - 1
        for each, logits in zip(tuple(running), model.logits(hidden[last]), strict=True):
            each.read = len(each.token_ids)
            each.token_ids.append(sample(logits, params, generator))
            if each.token_ids[-1] == model.config.eos_token_id or len(each.token_ids) == each.limit:
                running.remove(each)
                budget.release(each.cache)
                yield each.token_ids + tokenizer.encode("\n")
