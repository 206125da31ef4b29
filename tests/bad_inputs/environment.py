"""The machine: disk, folders, network, and what is installed."""

from bad_inputs.case import Case, problems, write

HUB = {"model": {"name": "org/model"}}

CASES = [
    Case(
        "a disk that is full",
        (
            "prepare failed: results/prepared/d/train.jsonl: the file system takes no larger file (<...> bytes "
            "are free)\n"
            "what to do: free space or fix the permissions, and run the same command again: what was finished "
            "stays"
        ),
        largest_file=2000,
    ),
    Case(
        "a file where the results belong",
        problems("paths.results: results is a file, and must be a folder"),
        make=write("results", ""),
    ),
    Case(
        "a file where the logs belong",
        (
            "inspect_model failed: logs/models/base.log: the log cannot be written (Not a directory)\n"
            "what to do: fix the folder's permissions, or free space"
        ),
        make=write("logs", ""),
    ),
    Case(
        "a CA file that is not there",
        (
            "fetch_model failed: network.tls: nowhere.pem does not exist\n"
            "what to do: set network.tls to a file with CA certificates (PEM)"
        ),
        {**HUB, "network": {"tls": "nowhere.pem"}},
        target="fetch_model",
    ),
    Case(
        "a hub that is switched off",
        (
            "fetch_model failed: org/model must be downloaded from the hub, but HF_HUB_OFFLINE is set\n"
            "what to do: unset HF_HUB_OFFLINE for this step, or put a copy into the folder paths.models"
        ),
        HUB,
        target="fetch_model",
    ),
]
