"""Serving a model: starting an engine, Moult's own small one, and the checks of a server."""
