"""Configs laid over a small one, resolved; and the stages of the demo's."""

from functools import reduce

import yaml
from workflow import ROOT

from moult.workflow.config import load_schema, merged, resolve
from moult.workflow.stages import STAGES

# What the metrics of the demo need.
MEASURED = set(STAGES) - {"fetch_model", "fetch_dataset", "smoke_test", "model_card", "report", "summary", "compare"}
MEASURED -= {"export_gguf", "export_compressed", "evaluate_export", "score_export", "export_card"}
MEASURED -= {"fetch_benchmark", "benchmark_base", "benchmark_tuned"}

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
