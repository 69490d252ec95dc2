"""Scores of given tokens against a plain log-softmax."""

import pytest
import torch

from model.logprobs import score_hidden, score_tokens


def test_scores_equal_a_log_softmax():
    logits = torch.randn(6, 50) * 8
    tokens = torch.randint(50, (6,))
    expected = logits.log_softmax(-1)
    for i, score in enumerate(score_tokens(logits, tokens, 5)):
        assert score.token_id == tokens[i]
        assert score.logprob == pytest.approx(float(expected[i, tokens[i]]), abs=1e-5)
        likeliest = expected[i].topk(5)
        assert [token for token, _ in score.top] == likeliest.indices.tolist()
        assert [value for _, value in score.top] == pytest.approx(likeliest.values.tolist(), abs=1e-5)


def test_the_likeliest_token_has_the_same_number_twice():
    logits = torch.randn(40, 500) * 20
    for score in score_tokens(logits, logits.argmax(1), 3):
        assert score.logprob == score.top[0][1] <= 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value):
    logits = torch.zeros(2, 9)
    logits[1, 4] = value
    with pytest.raises(ValueError, match="finite"):
        score_tokens(logits, torch.tensor([0, 0]), 2)


def test_more_alternatives_than_tokens_are_all_of_them():
    (score,) = score_tokens(torch.zeros(1, 3), torch.tensor([1]), 20)
    assert len(score.top) == 3


def test_long_prompts_are_scored_a_few_rows_at_a_time(tiny, monkeypatch):
    rows = []
    logits = tiny.model.logits
    monkeypatch.setattr(
        tiny.model, "logits", lambda hidden, wanted: rows.append(len(hidden)) or logits(hidden)
    )
    hidden = torch.randn(300, 32)
    tokens = torch.randint(97, (299,)).tolist()
    scores = list(score_hidden(tiny.model, hidden, tokens, 1))
    assert rows == [128, 128, 43]
    expected = logits(hidden).log_softmax(-1)
    found = torch.tensor([score.logprob for score in scores])
    torch.testing.assert_close(found, expected[range(299), tokens], atol=1e-5, rtol=1e-5)


def test_an_unlikely_token_is_scored_in_float32_by_a_bfloat16_model(make_tiny):
    model = make_tiny(torch.bfloat16, vocab_size=500).model
    hidden = torch.randn(21, 32) * 3
    tokens = model.logits(hidden).argmin(1)
    normed = torch.nn.functional.rms_norm(hidden, (32,), eps=model.config.rms_norm_eps)
    exact = (model.embedding[tokens].float() * normed).sum(-1)
    normalizer = model.logits(hidden, tokens).logsumexp(-1)
    scores = score_hidden(model, hidden, tokens.tolist(), 0)
    found = torch.tensor([score.logprob for score in scores])
    torch.testing.assert_close(found, exact - normalizer, atol=1e-5, rtol=1e-5)
    assert (model.logits(hidden).gather(1, tokens.unsqueeze(1)).squeeze(1) - exact).abs().max() > 1e-2
