# Moult: a base model and a dataset in, a tuned, merged, measured model out. README.md says how to run it.
#
#
# rules/<stage>.smk       a stage, its script is scripts/<stage>.py    scripts/moult/workflow/stages.py   every path in results/
# rules/lock, code, config, inputs, failures, console, containers, cluster      what the stages share
from snakemake.utils import min_version

min_version("9.19")


configfile: "config/config.yaml"


include: "rules/lock.smk"
include: "rules/code.smk"
include: "rules/config.smk"
include: "rules/inputs.smk"
include: "rules/failures.smk"
include: "rules/console.smk"
include: "rules/containers.smk"
include: "rules/cluster.smk"
include: "rules/questions.smk"
include: "rules/pages.smk"
include: "rules/exports.smk"


container: image


report: "rules/captions/workflow.rst"


wildcard_constraints:
    run="|".join(map(re.escape, config["runs"])) or "(?!)",
    ds="|".join(map(re.escape, config["datasets"])) or "(?!)",
    format="|".join(FORMATS),


include: "rules/fetch.smk"
include: "rules/check_connectivity.smk"
include: "rules/prepare.smk"
include: "rules/contamination.smk"
include: "rules/encode.smk"
include: "rules/plan.smk"
include: "rules/plans.smk"
include: "rules/finetune.smk"
include: "rules/merge.smk"
include: "rules/evaluate.smk"
include: "rules/benchmark.smk"
include: "rules/score.smk"
include: "rules/report.smk"
include: "rules/summary.smk"
include: "rules/compare.smk"
include: "rules/smoke_test.smk"
include: "rules/export.smk"
include: "rules/model_card.smk"
include: "rules/export_card.smk"
include: "rules/rung.smk"
include: "rules/sweep.smk"


rule all:
    """The metrics of every run in the config, its page, its exports, and the cards of its models. Not of the runs of sweeps."""
    default_target: True
    input:
        expand(at.metrics, run=asked_for(config)),
        expand(at.run_report, run=asked_for(config)),
        expand(at.merged_card, run=asked_for(config)),
        [path for run in asked_for(config) for path in exports_of(run, at.export_metrics) + export_cards_of(run)],


onstart:
    look_after_slurm()


onsuccess:
    tell_results()


onerror:
    tell_failures()
    tell_refusals()
