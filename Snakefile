# Moult: a base model and a dataset in, a tuned, merged, measured model out. README.md says how to run it.
#
# results/prepared/<dataset>/     rows and their ledger         results/models/, results/datasets/   what was fetched
# results/<run>/tokens/           token ids and labels          results/<run>/plan.json              what will happen
# results/<run>/adapter/          the LoRA adapter              results/<run>/trainer_state/         checkpoints
# results/<run>/merged/           the model                     results/<run>/base/, tuned/          measurements
# results/<run>/metrics.json      base against tuned, verdict   results/<run>/cards/                 model cards
# results/<run>/smoke_test.json   is it served as measured?     logs/<run>/, benchmarks/<run>/       logs, timings
from snakemake.utils import min_version

min_version("9.19")


configfile: "config/config.yaml"


include: "rules/common.smk"
include: "rules/containers.smk"
include: "rules/cluster.smk"


container: image


wildcard_constraints:
    run="|".join(map(re.escape, config["runs"])) or "(?!)",
    ds="|".join(map(re.escape, config["datasets"])) or "(?!)",


include: "rules/fetch.smk"
include: "rules/prepare.smk"
include: "rules/encode.smk"
include: "rules/plan.smk"
include: "rules/finetune.smk"
include: "rules/merge.smk"
include: "rules/evaluate.smk"
include: "rules/score.smk"
include: "rules/serve.smk"
include: "rules/model_card.smk"


rule all:
    """The metrics of every run in the config, and the cards of its models."""
    default_target: True
    input:
        expand("<results>/{run}/metrics.json", run=config["runs"]),
        expand("<results>/{run}/cards/merged.md", run=config["runs"]),


onstart:
    look_after_slurm()


onerror:
    tell_failures()
    tell_refusals()
