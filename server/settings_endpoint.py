"""The `[endpoints.NAME]` tables of the configuration: which model, which variant, and how its keys move."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from keystore.records import GravityConfig
from server.settings_section import Section


class GravitySettings(Section):
    """Defaults of `keystore.records.GravityConfig`, which also checks the ranges."""

    rule: Literal["literal", "direct", "gradient"] = GravityConfig().rule
    plasticity_rate: float = GravityConfig().plasticity_rate
    bonding_rate: float = GravityConfig().bonding_rate
    usage_threshold: float = GravityConfig().usage_threshold
    decay_rate: float = GravityConfig().decay_rate
    decay_window_tokens: int = GravityConfig().decay_window_tokens
    inertia: Literal["ema", "count", "none"] = GravityConfig().inertia
    usage_halflife_tokens: int = GravityConfig().usage_halflife_tokens
    warmup_tokens: int = GravityConfig().warmup_tokens
    dark_energy: Literal["decay", "decay_to_zero", "repulsion", "none"] = GravityConfig().dark_energy
    repulsion_rate: float = GravityConfig().repulsion_rate
    trust_radius: float = GravityConfig().trust_radius
    global_trust_radius: float = GravityConfig().global_trust_radius
    window_tokens: int = GravityConfig().window_tokens
    credit_clamp: float = GravityConfig().credit_clamp
    credit_candidates: int = GravityConfig().credit_candidates
    settling_warmup_tokens: int = GravityConfig().settling_warmup_tokens
    settling_ridge: float = GravityConfig().settling_ridge
    settling_halflife_tokens: int = GravityConfig().settling_halflife_tokens

    @model_validator(mode="after")
    def _in_range(self) -> "GravitySettings":
        self.config()
        return self

    def config(self) -> GravityConfig:
        return GravityConfig(**self.model_dump())


class ValueOffsetsSettings(Section):
    """What a session may add to the experts' outputs, for requests that ask for it. Kept as long as sessions are."""

    enabled: bool = False
    rate: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.04  # eta, of a Gauss-Newton step
    bound: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = (
        0.1  # longest offset, of the residual stream's length
    )


class EndpointSettings(Section):
    """One served model: which variant, and how its keys move."""

    variant: Literal["checkpoint", "dense", "some", "moe", "mom", "fm-moe", "ffn"]
    model: Path | None = (
        None  # a Hugging Face folder or a GGUF file; None: the base that comes with Libration
    )
    plastic: bool = (
        False  # the router rows of a checkpoint with experts are keys that move, as those of `some`
    )
    weights: Path | None = None  # a folder of expert blocks; None: those shipped with Libration
    device: str | None = None  # None: the engine's; endpoints of one device share its base and its batches
    plasticity: Literal["off", "read", "learn"] = "learn"  # what a request gets that does not say
    learn_scope: Literal["tenant", "global"] = (
        "tenant"  # whose keys a request without session_id reads and teaches
    )
    plastic_layers: tuple[int, ...] | None = None  # None: the upper half of the layers that have blocks
    gravity: GravitySettings = GravitySettings()
    value_offsets: ValueOffsetsSettings = ValueOffsetsSettings()

    @property
    def has_keys(self) -> bool:
        """Whether there are routing keys that may move."""
        return self.variant == "some" or self.plastic

    @model_validator(mode="before")
    @classmethod
    def _a_model_is_served_as_it_is(cls, given: Any) -> Any:  # Any: not validated yet
        if isinstance(given, dict) and "model" in given and "variant" not in given:
            return {**given, "variant": "checkpoint"}
        return given

    @field_validator("model")
    @classmethod
    def _expand(cls, path: Path | None) -> Path | None:
        return path and path.expanduser().absolute()

    @model_validator(mode="after")
    def _fits_the_variant(self) -> "EndpointSettings":
        plastic_only = {
            "plasticity",
            "learn_scope",
            "plastic_layers",
            "gravity",
            "value_offsets",
        } & self.model_fields_set
        if plastic_only and not self.has_keys:
            raise ValueError(
                f"variant {self.variant!r} has no routing keys: leave out {', '.join(sorted(plastic_only))}"
            )
        if self.variant == "dense" and self.weights is not None:
            raise ValueError("variant 'dense' is the base without blocks: leave out weights")
        if self.variant == "ffn" and self.weights is None:
            raise ValueError("variant 'ffn' is a control of the training: name its folder in weights")
        self._check_model()
        return self

    def _check_model(self) -> None:
        if self.variant == "checkpoint":
            if self.model is None:
                raise ValueError("variant 'checkpoint' is a model of your own: name it in model")
            if self.weights is not None:
                raise ValueError("a checkpoint is served as it is: leave out weights, or name a variant")
            return
        if self.plastic:
            raise ValueError(f"plastic is for a checkpoint's own experts, not for variant {self.variant!r}")
        if self.model is not None and self.weights is None:
            raise ValueError(
                f"the blocks that come with Libration are for its own base: leave out variant {self.variant!r},"
                " or name blocks for this model in weights"
            )
