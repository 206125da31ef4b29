"""The page of a run: what it says of samples and rows, and that it stays small and harmless whatever the rows hold."""

import json
import re
import shutil
from html import unescape
from types import SimpleNamespace

import pytest
import yaml
from exporting import judge, make_export
from workflow import ROOT, snakemake

import report
from moult.files import read_json, read_jsonl, write_json, write_jsonl
from moult.pages.run_charts import forests
from moult.workflow.config import load_schema, resolve
from moult.workflow.stages import STAGES, stage_settings

PASS, FAIL = {"exact": True}, {"exact": False}
ATTACK = "</pre><script>alert(1)</script>\u202e\x00\u0007<img src=x onerror=alert(1)> אבג"


def sample(number: int, base: tuple[str, dict], tuned: tuple[str, dict], prompt: str = "how?") -> dict:
    answers = {
        name: {"answer": answer, "checks": checks, "stopped": True}
        for name, (answer, checks) in (("base", base), ("tuned", tuned))
    }
    return {"id": f"r:{number}", "group": str(number), "kind": "row", "prompt": prompt, "reference": "ref", **answers}


@pytest.mark.parametrize(
    ("base", "tuned", "outcome"),
    [
        (("a", PASS), ("b", FAIL), "worse"),
        (("a", FAIL), ("b", PASS), "better"),
        (("a", FAIL), ("b", FAIL), "changed"),
        (("a", PASS), ("b", PASS), "changed"),
        (("a", PASS), ("a", PASS), "same"),
        (("a", {}), ("b", {}), "changed"),
    ],
)
def test_what_became_of_an_answer(base, tuned, outcome):
    assert report.outcome_of(sample(0, base, tuned)) == outcome


def test_those_that_got_worse_come_first_and_all_are_counted(tmp_path):
    kinds = [("a", PASS), ("b", PASS)], [("a", FAIL), ("b", PASS)], [("a", PASS), ("b", FAIL)]
    write_jsonl(tmp_path / "s.jsonl", [sample(n, *kinds[n % 3]) for n in range(900)])
    samples, counts = report.samples_of(tmp_path / "s.jsonl")
    assert counts == {"worse": 300, "better": 300, "changed": 300, "same": 0}
    assert len(samples) == report.SAMPLES and {one["outcome"] for one in samples} == {"worse"}


def test_only_what_differs_is_marked():
    before, after = report.marked("The capital is Oslo.", "The city is Oslo!")
    assert before == [(False, "The "), (True, "capital"), (False, " is Oslo"), (True, ".")]
    assert after == [(False, "The "), (True, "city"), (False, " is Oslo"), (True, "!")]
    assert report.marked("", "") == ([], [])


def ledger(**changes) -> dict:
    part = {"rows": 10, "written": 10, "left_out_by_weight": 0, "repeated": 0}
    return {
        "ledger": {"read": 120, "dropped": {"empty": 15, "duplicate": 5}, "kept": 100},
        "train": {**part, "rows": 80, "written": 80},
        "val": part,
        "test": part,
        "val_ledger": None,
        "test_ledger": None,
        **changes,
    }


def tokens(sequences: int, dropped: int = 0, contaminated: int = 0, unrenderable: int = 0) -> dict:
    train = {"length": {"dropped": dropped}, "sequences": sequences, "unrenderable": {"why": unrenderable}}
    return {"train": train, "contaminated_rows": {"count": contaminated}}


@pytest.mark.parametrize(
    ("rows", "encoded", "losses"),
    [
        (ledger(), tokens(80), {}),
        (
            ledger(),
            tokens(70, 4, 5, 1),
            {"over max_length": -4, "in a test question (contamination)": -5, "template refuses": -1},
        ),
        (ledger(), tokens(95), {"sequences of rows with several": 15}),
        (
            ledger(train={"rows": 80, "written": 50, "left_out_by_weight": 30, "repeated": 0}),
            tokens(50),
            {"weights of sources": -30},
        ),
        (
            ledger(val_ledger={"read": 10}, train={"rows": 90, "written": 90, "left_out_by_weight": 0, "repeated": 0}),
            tokens(90),
            {},
        ),
    ],
)
def test_every_row_is_accounted_for(rows, encoded, losses):
    fates = report.fates_of(rows, encoded)
    assert sum(fate["count"] for fate in fates[:-1]) == fates[-1]["count"] == encoded["train"]["sequences"]
    found = {fate["what"]: fate["count"] for fate in fates[1:-1]}
    own = {"empty": -15, "duplicate": -5, "validation rows": -10, "test rows": -10}
    if rows["val_ledger"] is not None:
        del own["validation rows"]
    assert found == own | losses


def test_what_each_language_lost_and_won(tmp_path):
    rows = [{"id": f"a:{number}", "language": "en" if number else "de"} for number in range(3)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    for side, nlls in (("base", (2.0, 4.0, 6.0)), ("tuned", (1.0, 1.0, 2.0))):
        write_jsonl(
            tmp_path / f"{side}.jsonl",
            [{"id": row["id"], "nll": nll, "tokens": 2} for row, nll in zip(rows, nlls, strict=True)],
        )
    counts = {"train": {"en": 5, "fr": 9}, "val": {"fr": 1}, "test": {"en": 2, "de": 1}}
    found = report.languages_of(
        {part: {"by_language": of} for part, of in counts.items()},
        *(tmp_path / f"{name}.jsonl" for name in ("rows", "base", "tuned")),
    )
    assert found == [
        {"name": "fr", "train": 9, "val": 1, "test": 0, "measured": None},
        {"name": "en", "train": 5, "val": 0, "test": 2, "measured": {"base": 2.5, "tuned": 0.75}},
        {"name": "de", "train": 0, "val": 0, "test": 1, "measured": {"base": 1.0, "tuned": 0.5}},
    ]


def figures(base: float, tuned: float) -> dict:
    sides = {name: {"value": value, "interval": [value, value]} for name, value in (("base", base), ("tuned", tuned))}
    return {**sides, "difference": {"value": tuned - base, "interval": [tuned - base, tuned - base], "p": 0.01}}


def test_each_plot_says_in_which_direction_it_is_better(demo):
    """A benchmark's metric that is no rate is better if it is more, as a rate is."""
    metrics = read_json(demo / "results/demo/metrics.json")
    mean = {"is_rate": False, "n": 9, **figures(2.0, 3.0)}
    metrics["benchmarks"] = {"bleu": {"metric": "bleu", "metrics": {"bleu": mean}, "questions": 9}}
    plots = forests(report.measures_of(metrics), "95 %")
    told = {
        re.search(r"the difference in (.*?), with", plot)[1]: re.search(r"(More|Less) is better", plot)[1]
        for plot in plots
    }
    assert told == {
        "nats per token, loss": "Less",
        "points": "More",
        "nats per token, general text": "Less",
        "on average, benchmark bleu": "More",
    }


SWEEP = {
    "dataset": "demo",
    "over": {"train.learning_rate": [1e-4, 1e-3]},
    "rungs": [10],
    "train": {"max_steps": 20, "lr_scheduler_type": "constant", "eval_steps": 10},
}


@pytest.mark.parametrize(
    ("config", "run"),
    [
        ({"seed": 5}, "demo"),
        ({"runs": {"demo": {"seeds": [3, 4]}}}, "demo"),
        ({"runs": {"other": {"dataset": "demo", "lora": {"r": 4}}}, "override": {"train": {"max_steps": 7}}}, "other"),
        ({"sweeps": {"lr": SWEEP}}, "lr-learning_rate1e-4"),
    ],
    ids=["seed", "seeds", "override", "sweep"],
)
def test_the_config_on_the_page_is_that_of_the_run(config, run):
    """All that any stage reads of the config is the same. What a run goes on from changes none of its bytes."""
    schema = load_schema(str(ROOT / "config"))
    given = {"model": {"name": "./m", "dtype": "float32"}, "datasets": {"demo": {"source": "x.jsonl"}}, **config}
    before = resolve(given, schema)
    shown = report.config_of(run, stage_settings(before, "report", run))
    after = resolve(yaml.safe_load(shown), schema)
    for stage in set(STAGES) - {"contamination"}:  # the questions of all runs of the dataset
        assert stage_settings(after, stage, run) == stage_settings(before, stage, run), stage


# --- the whole page ---------------------------------------------------------------------------------------------------


def make(folder, out, exports=()) -> str:
    config = {"model": {"name": str(ROOT / "config/demo/base")}, "datasets": {"demo": {"source": "x.jsonl"}}}
    config = resolve(config, load_schema(str(ROOT / "config")))
    results = folder / "results"
    arguments = SimpleNamespace(
        run="demo",
        results=str(results / "demo"),
        ledger=str(results / "prepared/demo/metadata.json"),
        tokens=str(results / "demo/tokens"),
        rows=str(results / "prepared/demo/test.jsonl"),
        base_likelihood=str(results / "demo/base/likelihood.jsonl"),
        tuned_likelihood=str(results / "demo/tuned/likelihood.jsonl"),
        settings=stage_settings(config, "report", "demo"),
        exports=list(map(str, exports)),
        out=str(out),
    )
    report.write_report(arguments, SimpleNamespace(info=lambda *_: None))
    return out.read_text(encoding="utf-8")


@pytest.fixture
def measured(demo, tmp_path):
    """A copy of what the page is made of."""
    for name in ("metrics.json", "plan.json", "adapter.json", "samples.jsonl", "training_log.jsonl"):
        (tmp_path / "results/demo/tokens").mkdir(parents=True, exist_ok=True)
        shutil.copy(demo / "results/demo" / name, tmp_path / "results/demo")
    for name in ("report.json", "preview.json"):
        shutil.copy(demo / "results/demo/tokens" / name, tmp_path / "results/demo/tokens")
    for side in ("base", "tuned"):
        (tmp_path / "results/demo" / side).mkdir()
        shutil.copy(demo / "results/demo" / side / "likelihood.jsonl", tmp_path / "results/demo" / side)
    (tmp_path / "results/prepared/demo").mkdir(parents=True)
    for name in ("metadata.json", "test.jsonl"):
        shutil.copy(demo / "results/prepared/demo" / name, tmp_path / "results/prepared/demo")
    return tmp_path


def test_the_page_says_what_the_files_say(measured):
    page = make(measured, measured / "report.html")
    metrics = read_json(measured / "results/demo/metrics.json")
    text = unescape(re.sub(r"<[^>]*>", "", page))
    for reason in metrics["verdict"]["reasons"]:
        assert reason in text
    assert metrics["provenance"]["adapter_sha256"] in text
    assert f"measured on {metrics['data']['sequences']} test\nrows" in text.replace(" test rows", " test\nrows")
    samples = list(read_jsonl(measured / "results/demo/samples.jsonl"))
    assert page.count("<article ") == len(samples) and all(one["id"] in text for one in samples)


def test_a_run_that_was_asked_nothing_has_a_page(measured):
    metrics = read_json(measured / "results/demo/metrics.json")
    write_json(measured / "results/demo/metrics.json", {**metrics, "answers": {}, "general_text": None})
    write_jsonl(measured / "results/demo/samples.jsonl", [])
    assert "No questions were asked" in make(measured, measured / "report.html")


def test_five_thousand_rows_of_any_text_make_a_small_and_harmless_page(measured):
    long = [sample(n, (ATTACK * 40, PASS), (f"{n} {ATTACK}" * 40, FAIL), ATTACK * 1_000) for n in range(5_000)]
    write_jsonl(measured / "results/demo/samples.jsonl", long)
    example = [{"id": ATTACK, "trained": 1, "tokens": [[1, ATTACK * 1_500, True]] * 3}] * 10
    write_json(measured / "results/demo/tokens/preview.json", example)
    page = make(measured, measured / "report.html")
    assert len(page.encode()) < 3_000_000
    assert page.count("<script>") == 1 and "<img" not in page and "\u202e" not in page and "\x00" not in page
    assert "All 5,000 are in samples.jsonl" in page and "⟨U+202E⟩" in page and "more characters)" in page


def test_the_exports_are_in_a_table_of_their_own(measured):
    assert 'id="exports"' not in make(measured, measured / "report.html")
    paths = []
    for format, wrong in (("gguf-q8_0", 0), ("gguf-q4_k_m", 12)):
        out = make_export(measured / "made" / "demo", format, wrong=wrong)
        judge(out)
        paths.append(out / "export.json")
    page = make(measured, measured / "report.html", paths)
    assert page.count('href="#exports"') == 1
    text = unescape(re.sub(r"<[^>]*>", " ", page))
    for path in paths:
        export = read_json(path)
        assert export["shown"] in text and export["against_merged"]["sentence"] in text


def test_an_interrupted_training_is_marked(measured):
    path = measured / "results/demo/training_log.jsonl"
    steps = list(read_jsonl(path))
    steps[8]["resumed_from"] = 40
    write_jsonl(path, steps)
    assert "was interrupted, and resumed from step 40." in make(measured, measured / "report.html")


@pytest.mark.slow
def test_the_rule_makes_it_and_a_new_look_makes_only_pages_again(again):
    target = "results/demo/report.html"
    snakemake(again, target)
    assert (again / target).is_file()
    with (again / "scripts/moult/pages/look/style.css").open("a") as style:
        style.write("/* another look */\n")
    table = snakemake(again, "-n", target, "results/demo/metrics.json")
    assert re.findall(r"^(?!total)(\w+) +1$", table, re.MULTILINE) == ["report"]


@pytest.mark.slow
def test_the_config_on_the_page_makes_the_run_again(again):
    """Nothing is left to do: the config that the page shows is that of the run."""
    snakemake(again, "results/demo/report.html")
    page = (again / "results/demo/report.html").read_text(encoding="utf-8")
    config = unescape(re.search(r'aria-label="Config">(.*?)</pre>', page, re.DOTALL)[1])
    (again / "config/config.yaml").write_text(config)
    assert "Nothing to be done" in snakemake(again, "-n", "results/demo/metrics.json")


def test_runs_of_tokens_are_cut_and_say_so():
    example = {"id": "a", "trained": 1, "tokens": [[1, "x" * 3_000, False], [2, "y" * 3_000, True], [3, "z", True]]}
    runs = report.example_of(example)["runs"]
    assert [(trained, text[0], len(text)) for trained, text in runs[:2]] == [(False, "x", 3_000), (True, "y", 3_000)]
    assert runs[2] == [False, " … (1 more tokens)"]
    assert json.dumps(report.example_of({**example, "tokens": example["tokens"][2:]})["runs"]) == '[[true, "z"]]'
