"""The config: read and refused by Snakemake's own process, before anything runs."""

from bad_inputs.case import Case, problems


def with_prompt(**prompt) -> dict:
    return {"eval": {"prompts": [{"id": "p", **prompt}]}}


def bomb(levels: int = 12) -> str:
    lines = ["model:", "  name: base", "  chat_template_kwargs:", "    a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefghijkl", "bcdefghijklm", strict=True):
        lines.append(f"    {name}: &{name} [{', '.join(['*' + before] * 9)}]")
    return "\n".join(lines[: levels + 4])


def link_out(folder):
    (folder / "elsewhere").mkdir()
    (folder / "results" / "d").mkdir(parents=True)
    (folder / "results" / "d" / "merged").symlink_to(folder / "elsewhere")


def link_run_out(folder):
    (folder / "elsewhere").mkdir()
    (folder / "results").mkdir()
    (folder / "results" / "d").symlink_to(folder / "elsewhere")


CASES = [
    Case(
        "an unknown key",
        problems("train.learning_rat: unknown key; did you mean learning_rate?"),
        {"train": {"learning_rat": 1e-4}},
    ),
    Case(
        "a key in the wrong section",
        problems("lora.learning_rate: unknown key here; it belongs in train"),
        {"lora": {"learning_rate": 1e-4}},
    ),
    Case(
        "a key that a stage controls itself",
        problems("train.output_dir: not yours to set: checkpoints go to results/<run>/trainer_state"),
        {"train": {"output_dir": "x"}},
    ),
    Case(
        "a quantized base that is to be split",
        problems("train.shard: a quantized base cannot be split; set model.quantization: null, or leave shard out"),
        {"model": {"quantization": "nf4"}, "train": {"gpu": 2, "shard": True}},
    ),
    Case("a float where an integer belongs", problems("lora.r: expected integer, got 8.5"), {"lora": {"r": 8.5}}),
    Case(
        "text where a number belongs",
        problems("train.learning_rate: expected number, got 'high'"),
        {"train": {"learning_rate": "high"}},
    ),
    Case(
        "a number out of its limits",
        problems("datasets.d.val_size: must be > 0, got -1"),
        {"datasets": {"d": {"val_size": -1}}},
    ),
    Case("NaN", problems("train.learning_rate: nan is not a finite number"), "train: {learning_rate: .nan}"),
    Case("infinity", problems("train.max_grad_norm: inf is not a finite number"), "train: {max_grad_norm: .inf}"),
    Case("a date", problems("model.revision: 2024-01-01 is a date to YAML; quote it"), "model: {revision: 2024-01-01}"),
    Case(
        "no instead of 'no'",
        problems(
            "datasets.d.languages.1: expected string, got False (quote it: YAML takes `no` for false)",
            "datasets.d.languages.2: expected string, got False (quote it: YAML takes `no` for false)",
            "datasets.d.languages.3: expected string, got 1 (quote it)",
        ),
        "datasets: {d: {languages: [en, no, false, 1]}}",
    ),
    Case(
        "none of the choices",
        problems("model.dtype: 'bflaot16' is none of bfloat16, float16, float32; did you mean bfloat16?"),
        {"model": {"dtype": "bflaot16"}},
    ),
    Case(
        "a pattern that is none",
        problems(
            "eval.prompts.0.expect.regex: '(' is no regular expression: missing ), unterminated subpattern at "
            "position 0"
        ),
        with_prompt(prompt="Hi", expect={"regex": "("}),
    ),
    Case(
        "a section that is empty",
        problems("lora: expected object, got None (an empty section; leave it out)"),
        "lora:\n",
    ),
    Case("a dataset without a source", problems("datasets.e.source: missing"), {"datasets": {"e": {"max_length": 8}}}),
    Case(
        "a run of no dataset",
        problems("runs.v.dataset: no dataset is named dd; did you mean d?"),
        {"runs": {"v": {"dataset": "dd"}}},
    ),
    Case(
        "a run without a model",
        problems("model.name: missing (run d needs it); a hub id or a local folder"),
        {"model": {"name": None}},
    ),
    Case(
        "several at once",
        problems(
            "lora.rank: unknown key; did you mean r?",
            "lora.r: must be >= 1, got 0",
            "runs.v.datset: unknown key; did you mean dataset?",
            "seed: must be >= 0, got -1",
        ),
        {"seed": -1, "lora": {"r": 0, "rank": 8}, "runs": {"v": {"datset": "d"}}},
    ),
    Case(
        "a name that leaves the folder",
        problems(
            "runs.../../etc/cron.d/x: not a name; use letters, digits, '.', '_' and '-' (at most 64), a letter "
            "or digit first"
        ),
        {"runs": {"../../etc/cron.d/x": {"dataset": "d"}}},
    ),
    Case(
        "a name that is hidden",
        problems(
            "datasets..ssh: not a name; use letters, digits, '.', '_' and '-' (at most 64), a letter or digit first"
        ),
        {"datasets": {".ssh": {"source": "rows.jsonl"}}},
    ),
    Case(
        "a reserved name",
        problems("runs.Models: reserved name (results/models holds something else)"),
        {"runs": {"Models": {"dataset": "d"}}},
    ),
    Case(
        "two names that differ in case",
        problems("runs.D: there is also d; some file systems take the two for one folder"),
        {"runs": {"D": {"dataset": "d"}}},
    ),
    Case(
        "the same key twice",
        problems(
            "lora: there twice, in lines 1 and 3 of case.yaml",
            "datasets.d.source: there twice, in lines 6 and 7 of case.yaml",
        ),
        "lora: {r: 4}\ntrain: {max_steps: 3}\nlora: {r: 8}\ndatasets:\n  d:\n    source: a\n    source: b\n",
    ),
    Case(
        "a prompt's id twice",
        problems("eval.prompts: the id p is there twice"),
        {"eval": {"prompts": [{"id": "p", "prompt": "a"}, {"id": "p", "prompt": "b"}]}},
    ),
    Case(
        "a prompt with two questions",
        problems("eval.prompts.p: give either prompt or messages"),
        with_prompt(prompt="a", messages=[{"role": "user", "content": "b"}]),
    ),
    Case(
        "a prompt checked against a row",
        problems(
            "eval.prompts.p.expect: true and match compare with a row's own answer, and a prompt has none; give "
            "the text"
        ),
        with_prompt(prompt="a", expect={"exact": True}),
    ),
    Case(
        "best without validation",
        problems("train.eval_strategy: 'no' leaves no best by validation loss; set load_best_model_at_end: false"),
        {"train": {"eval_strategy": "no"}},
    ),
    Case(
        "anchors that multiply",
        problems("more than 500,000 values; look for YAML anchors (&) that repeat or hold each other"),
        bomb(),
    ),
    Case(
        "an anchor in itself",
        problems("more than 500,000 values; look for YAML anchors (&) that repeat or hold each other"),
        "model: {chat_template_kwargs: {a: &a [*a]}}",
    ),
    Case(
        "YAML that is none",
        (
            "Config file is not valid JSON or YAML. In case of YAML, make sure to not mix whitespace and tab "
            "indentation."
        ),
        "model: {name: [\n",
    ),
    Case("a list", "Config file must be given as JSON or YAML with keys at top level.", "- model\n"),
    Case(
        "an output that is a link to elsewhere",
        problems(
            "results/d/merged: a link to {folder}/elsewhere, outside of results; remove it, and move all with "
            "paths.results"
        ),
        make=link_out,
    ),
    Case(
        "a run's folder that is a link to elsewhere",
        problems(
            "results/d: a link to {folder}/elsewhere, outside of results; remove it, and move all with paths.results"
        ),
        make=link_run_out,
    ),
]
