"""Routing keys that learn: versions, scopes, the consolidation law, durability. No torch, no HTTP."""
