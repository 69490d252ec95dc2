"""The server: HTTP, processes, configuration and metrics around a model and a key store."""
