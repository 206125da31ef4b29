"""Compare the runs of a sweep at one of their steps, and say which of them go on.

    python scripts/rung.py --settings '{...}' --runs lr-r8 lr-r32 --ranking results/sweeps/lr-rung100.json \\
        --likelihoods results/lr-r8-rung100/tuned/likelihood.jsonl results/lr-r32-rung100/tuned/likelihood.jsonl

After evaluate_tuned of all runs that stop there. `--likelihoods` in the order of the runs, of each with all its seeds. Dropped is
what is clearly worse than the best (scripts/moult/measuring/ranking.py), with the error of the configured confidence spread over
the rungs: a run that is as good as the best is dropped at any of them in at most 5 of 100 sweeps.
"""

from moult.files import read_jsonl, write_json
from moult.measuring.ranking import of_runs, rank
from moult.run.cli import stage_parser
from moult.run.stage import stage


def main() -> None:
    parser = stage_parser(__doc__, "rung", reads="what the sweep sets")
    parser.add_argument("--runs", nargs="+", required=True, help="the runs of the sweep that are still there")
    parser.add_argument("--likelihoods", nargs="+", required=True, help="likelihood.jsonl of each of them at this step")
    parser.add_argument("--ranking", required=True, help="output: the ranking as JSON")
    args = parser.parse_args()

    with stage("rung", args.log_file, args.settings) as log:
        runs = of_runs(args.runs, [list(read_jsonl(path)) for path in args.likelihoods])
        settings = args.settings
        confidence = 1 - (1 - settings["confidence"]) / len(settings["rungs"])
        found = rank(runs, confidence, settings["resamples"], settings["seed"])
        write_json(args.ranking, found)
        log.info("%d of %d runs go on", len(found["level"]), len(runs))


if __name__ == "__main__":
    main()
