"""Checkpoints of one's own as endpoints: their experts as blocks, and the keys of those whose keys never move."""

import numpy as np

from keystore.index import KeyIndex
from keystore.records import ScopeId
from keystore.snapshot import KeySnapshot, checksum_of
from model.blocks.routed_ffn import RoutedFfnConfig
from model.blocks.some import SomeBlock
from model.checkpoints.assemble import BaseModel
from model.checkpoints.blocks import BlockFolder
from server.settings_endpoint import EndpointSettings


def own_blocks(endpoint: EndpointSettings, base: BaseModel) -> BlockFolder | None:
    """A checkpoint's routed FFNs for one endpoint, the weights shared; None where it is dense.

    Raises ValueError when routing is to move that is not there.
    """
    if base.blocks:
        config = next(iter(base.blocks.values())).config
        blocks = {layer: block.sharing() for layer, block in base.blocks.items()}
        return BlockFolder(config, dict(blocks), base.fingerprint)
    if endpoint.plastic:
        raise ValueError(
            f"{endpoint.model} has no experts whose routing could move: leave out plastic, or give it blocks first"
            " (libration adapt)"
        )
    return None


def kind_of(endpoint: EndpointSettings, folder: BlockFolder | None) -> str:
    """What the endpoint is in a client's eyes: the variant whose abilities it has."""
    if endpoint.variant != "checkpoint":
        return endpoint.variant
    if folder is None:
        return "dense"
    return "some" if endpoint.plastic else "moe"


def anchor_keys(folder: BlockFolder) -> KeySnapshot:
    """The keys that blocks were trained with, never to move: scores have the bits of a key store's version 0."""
    keys = {
        layer: np.ascontiguousarray(block.anchors.detach().float().numpy(force=True))
        for layer, block in folder.blocks.items()
        if isinstance(block, SomeBlock)
    }
    assert isinstance(folder.config, RoutedFfnConfig), folder.config.kind
    return KeySnapshot(
        model_id=folder.fingerprint,
        scope=ScopeId("anchor"),
        version=0,
        parent=None,
        reason="anchors",
        created_at=0.0,
        tokens=0,
        indexes={layer: KeyIndex(rows) for layer, rows in keys.items()},
        usage={},
        checksum=checksum_of(keys, {}),
    )
