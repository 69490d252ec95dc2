"""Prequential evaluation: every window is first predicted, then learned. No server, no key store files."""
