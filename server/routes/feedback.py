"""Judging a past answer: its tokens teach the scope that wrote it, as much as the reward says."""

from fastapi import APIRouter, Request, Response

from server.exchange import caller_of, exchange_of
from server.feedback import PastAnswer, UnknownAnswer, start_teaching
from server.refusals import Conflict, InvalidRequest, OverBudget
from server.registry import Plasticity
from server.routes.lookup import PinnedEndpoint
from server.routes.wire import StrictJsonRoute, json_response
from server.schemas.answers import Judgement, answers
from server.schemas.feedback import FeedbackBody
from server.state import state_of

router = APIRouter(route_class=StrictJsonRoute)


@router.post("/v1/feedback", responses=answers(Judgement))
@router.post("/{endpoint}/v1/feedback", responses=answers(Judgement))
async def judge_answer(request: Request, body: FeedbackBody, endpoint: PinnedEndpoint) -> Response:
    """Each answer can be judged once, by its own tenant. Taught when this has been answered; keys move by windows."""
    state, caller = state_of(request), caller_of(request)
    answer = state.answers.find(body.id, caller.tenant)
    if endpoint is not None and state.registry.get(endpoint).name != answer.endpoint:
        raise UnknownAnswer(f"the endpoint {endpoint!r} wrote no answer {body.id!r} that is remembered")
    target = state.registry.get(answer.endpoint)
    assert target.plasticity is not None, target.name
    _check_can_teach(answer, target.plasticity)
    tokens = answer.answer_tokens
    if caller.budget is not None and not caller.budget.allows(tokens):
        state.metrics.count_refused(target.name, "budget", tokens)
        raise OverBudget(
            f"this API key has used up the tokens that it may teach in an hour; the answer has {tokens}",
            caller.budget.wait_s(tokens),
        )
    judgement = start_teaching(target, answer, body.reward, exchange_of(request).request_id)
    state.answers.note_judged(body.id)
    if caller.budget is not None:
        caller.budget.spend(tokens)
    state.metrics.count_learned(target.name, tokens)
    await judgement.taught()
    exchange_of(request).facts |= {"model": target.name, "learned_tokens": tokens}
    return json_response(
        {"id": body.id, "reward": body.reward, "scope": str(answer.scope), "learned_tokens": tokens}
    )


def _check_can_teach(answer: PastAnswer, plasticity: Plasticity) -> None:
    """Raises Conflict, InvalidRequest."""
    if answer.judged:
        raise Conflict("this answer has been judged already; allowed: once", "id")
    if plasticity.store.gravity.rule == "literal":
        raise InvalidRequest(
            f"the endpoint {answer.endpoint!r} learns by the rule 'literal', which knows no credit to scale",
            "id",
        )
    if plasticity.store.is_frozen(answer.scope):
        raise Conflict(f"{answer.scope} is frozen: it learns nothing", "id")
