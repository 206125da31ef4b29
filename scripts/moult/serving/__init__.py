"""Serving a model: starting an engine, and Moult's own small one."""
