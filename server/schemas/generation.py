"""The fields that completions and chat completions share, and what they become inside the server."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field, model_validator

from model.sampling import SamplingParams
from server.engine.sequence import Report
from server.generation import PlasticityMode
from server.refusals import InvalidRequest
from server.schemas import neutral
from server.schemas.base import Body, KeyVersion, Name, SessionId
from server.schemas.logit_bias import LogitBias
from server.schemas.response_format import ResponseFormat
from server.schemas.routed_experts import RoutedExperts

MAX_CHOICES = 8
MAX_STOP_STRINGS = 4
COLDEST_TEMPERATURE = 1e-3  # below, dividing logits overflows and the likeliest token is certain anyway
MOST_TOKENS = 1_000_000
MOST_FLOW_STEPS = 64
MOST_TOP_LOGPROBS = 20
SMALLEST_REPETITION_PENALTY = 1e-6  # below, dividing by it overflows


def _listed(value: Any) -> Any:  # Any: JSON
    return [value] if isinstance(value, str) else value


StopString = Annotated[str, Field(min_length=1, max_length=1024)]
FewStrings = Annotated[list[StopString], Field(max_length=MAX_STOP_STRINGS)]
StopStrings = Annotated[FewStrings, BeforeValidator(_listed, json_schema_input_type=StopString | FewStrings)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
TopLogprobs = Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)]
MaxTokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]


class StreamOptions(Body):
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = neutral.STREAM_OPTIONS  # Any: JSON values

    include_usage: bool = False
    continuous_usage_stats: bool = False  # with include_usage: what the answer has come to, in every chunk


class GenerationBody(Body):
    """How to generate, and with which keys."""

    model: Name | None = None  # required unless the path names the endpoint
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1, le=MOST_TOKENS)] = 0  # 0, and -1 as in vLLM: all tokens
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopStrings = Field(default_factory=list[str])
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128, fail_fast=True)] = Field(
        default_factory=list[int]
    )
    max_tokens: MaxTokens | None = None
    ignore_eos: bool = False
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] = 1.0
    logit_bias: LogitBias = Field(default_factory=dict[int, float])
    min_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 0
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    response_format: ResponseFormat | None = None
    user: Annotated[str, Field(max_length=1024)] | None = (
        None  # accepted for OpenAI's sake; says nothing here
    )
    session_id: SessionId | None = None
    plasticity: PlasticityMode | None = None
    key_version: KeyVersion | None = None
    value_offsets: bool = False  # the session's, where the endpoint has them
    within_request: bool = False  # a long prompt is read on with what its earlier windows have taught
    flow_steps: Annotated[int, Field(ge=1, le=MOST_FLOW_STEPS)] | None = None  # flow-matching experts only
    return_routed_experts: bool = False
    routed_experts: RoutedExperts = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "GenerationBody":
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("'stream_options' is only allowed with 'stream': true", "stream_options")
        return self

    @model_validator(mode="after")
    def _a_format_ends_the_answer(self) -> "GenerationBody":
        for name, given in (("ignore_eos", self.ignore_eos), ("min_tokens", self.min_tokens)):
            if given and self.schema_of_answer is not None:
                raise InvalidRequest(
                    f"{name!r} would go on where 'response_format' ends the answer; allowed: one of them",
                    name,
                )
        return self

    @property
    def schema_of_answer(self) -> dict[str, Any] | None:  # Any: JSON
        """The JSON schema that the answer must fit; None: it is free."""
        return None if self.response_format is None else self.response_format.schema_of_answer

    @property
    def wants_usage_chunk(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_continuous_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    @property
    @abstractmethod
    def report(self) -> Report:
        """What the answer tells besides its text."""

    def sampling_params(self, max_tokens: int, choice: int) -> SamplingParams:
        """For one of the n choices of a prompt; with a seed each choice has a seed of its own."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature if self.temperature >= COLDEST_TEMPERATURE else 0.0,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
            stop_token_ids=frozenset(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=max(self.repetition_penalty, SMALLEST_REPETITION_PENALTY),
            logit_bias=self.logit_bias,
            min_tokens=self.min_tokens,
        )
