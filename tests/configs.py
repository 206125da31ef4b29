"""Configs laid over a small one, resolved."""

from functools import reduce

import yaml
from workflow import ROOT

from moult.workflow.config import load_schema, merged, resolve

SCHEMA = load_schema(str(ROOT / "config"))
BASE = """
model: {name: org/base, chat_template: chatml}
datasets:
  a: {source: a.jsonl}
  b: {source: [b.jsonl, {path: c.jsonl, weight: 2}]}
"""


def config(*texts: str) -> dict:
    """BASE with the texts laid over it as --configfile does, resolved."""
    return resolve(reduce(merged, map(yaml.safe_load, texts), yaml.safe_load(BASE)), SCHEMA)
