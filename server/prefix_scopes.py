"""Which prompts share what was read of a common beginning. Knows requests and keys; the engine keeps the rows."""

from keystore.snapshot import KeySnapshot
from model.keys import KeyView
from server.engine.prefix_cache import PrefixUse
from server.generation import GenerationRequest, KeyUse


def prefix_use(
    endpoint: str,
    request: GenerationRequest,
    use: KeyUse,
    keys: KeyView | None,
    *,
    teaches: bool,
    credits_whole_prompts: bool,
) -> PrefixUse | None:
    """Under what a prompt's rows are kept and found: whose they are, and all that they hang on beside its tokens.

    None for rows of no one version, or with routes or offsets of their own. A prompt of which every row is wanted takes
    none: to report them, or because credit goes through the whole prompt.
    """
    if request.within_request or request.value_offsets or request.routed_experts is not None:
        return None
    reports = request.report.scores_prompt or request.report.routed_experts
    # The anchors teach nobody, so all of a tenant's sessions share what was read with them.
    scope = None if use.plasticity == "off" else use.scope
    return PrefixUse(
        (endpoint, request.tenant, scope, _version(keys), request.flow_steps),
        takes=not reports and not (teaches and credits_whole_prompts),
        teaches=teaches,
    )


def _version(keys: KeyView | None) -> tuple[int, str, int] | None:
    """Of keys that may move; None: they never do.

    The checksum tells sessions of one name apart, the number what was taught before a reset from what is taught after.
    """
    return (keys.version, keys.checksum, keys.generation) if isinstance(keys, KeySnapshot) else None
