"""Where versions are kept: the Backend protocol and its implementations."""
