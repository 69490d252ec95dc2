"""Routing keys that learn: versions, scopes, the consolidation law, durability. Knows no torch, no HTTP, no settings."""
