"""Continuous batching: sequences in, tokens out. One thread owns it; asyncio talks to it through mailboxes."""
