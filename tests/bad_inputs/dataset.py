"""The rows: read, normalised and split by prepare; too long for encode."""

import gzip

from bad_inputs.case import ROWS, SECRET, Case, write

GOOD = '{"prompt": "How many?", "completion": "Two."}\n'


def data(**settings) -> dict:
    return {"datasets": {"d": settings}}


def named(file: str, content: str | bytes, **settings) -> dict:
    """A dataset of one file of another name."""
    return {"config": data(**{"source": file, **settings}), "make": write(file, content)}


def of(*messages: dict) -> list:
    return [*ROWS[:3], {"messages": list(messages)}]


CASES = [
    Case(
        "no such file",
        (
            "datasets.d.source: nowhere.jsonl: no such file or folder\n"
            "  -> check datasets.<name>.source, val_source or test_source: a path is relative to the working directory"
        ),
        data(source="nowhere.jsonl"),
    ),
    Case(
        "no such file of test rows",
        (
            "datasets.d.test_source: nowhere.jsonl: no such file or folder\n"
            "  -> check datasets.<name>.source, val_source or test_source: a path is relative to the working directory"
        ),
        data(test_source="nowhere.jsonl"),
    ),
    Case(
        "a pattern that matches nothing",
        (
            "datasets.d.source: parts/*.jsonl: no file matches\n"
            "  -> check the pattern; it is relative to the working directory"
        ),
        data(source="parts/*.jsonl"),
    ),
    Case(
        "a folder without data",
        (
            "datasets.d.source: folder: holds no data files\n"
            "  -> supported: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, each also with .gz"
        ),
        **named("folder/notes.txt", "no rows", source="folder"),
    ),
    Case(
        "a suffix that is not known",
        (
            "prepare failed: rows.xlsx: unknown kind of file\n"
            "what to do: supported: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, each also with .gz"
        ),
        **named("rows.xlsx", b"PK"),
    ),
    Case(
        "an empty file",
        (
            "prepare failed: rows.jsonl: no rows\n"
            "what to do: the files are empty; check datasets.<name>.source, val_source or test_source"
        ),
        rows="",
    ),
    Case(
        "a line that is not JSON",
        (
            "prepare failed: rows.jsonl:2: not JSON: Expecting property name enclosed in double quotes (column "
            "17)\n"
            "what to do: fix that line"
        ),
        rows=GOOD + '{"prompt": "a", \n' + GOOD,
    ),
    Case(
        "a line that is no object",
        ("prepare failed: rows.jsonl:2: list, where an object with columns belongs\nwhat to do: fix that row"),
        rows=GOOD + "[1, 2]\n",
    ),
    Case(
        "NaN in a row",
        ("prepare failed: rows.jsonl:1: NaN is not JSON\nwhat to do: write null instead"),
        rows='{"prompt": NaN, "completion": "b"}\n',
    ),
    Case(
        "a row nested too deeply",
        ("prepare failed: rows.jsonl:1: nested too deeply to read\nwhat to do: remove or flatten that row"),
        rows='{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
    ),
    Case(
        "not UTF-8",
        (
            "prepare failed: rows.jsonl:2: not UTF-8 (byte 0xe9)\n"
            "what to do: convert it, for example: iconv -f latin1 -t utf-8 rows.jsonl > fixed.jsonl"
        ),
        rows=GOOD.encode() + b'{"prompt": "caf\xe9", "completion": "b"}\n',
    ),
    Case(
        "half a character",
        (
            "prepare failed: 1 of 2 rows cannot be training rows:\n"
            "    rows.jsonl:2: prompt holds half of a surrogate pair, which is no character\n"
            "what to do: fix them, map the columns (datasets.<name>.columns), or set datasets.<name>.broken: "
            "drop"
        ),
        rows=GOOD + '{"prompt": "a\\ud800", "completion": "b"}\n',
    ),
    Case(
        "a gzip file cut short",
        (
            "prepare failed: rows.jsonl.gz: not a whole gzip file (Compressed file ended before the "
            "end-of-stream marker was reached)\n"
            "what to do: download or compress it again"
        ),
        **named("rows.jsonl.gz", gzip.compress((GOOD * 99).encode(), mtime=0)[:-20]),
    ),
    Case(
        "a Parquet file cut short",
        (
            "prepare failed: rows.parquet: not a whole Parquet file (Parquet magic bytes not found in footer. "
            "Either the file is corrupted or this is not a parquet file.)\n"
            "what to do: write or download it again"
        ),
        **named("rows.parquet", b"PAR1 and nothing more"),
    ),
    Case(
        "a CSV with semicolons",
        (
            "prepare failed: rows.csv:1: the header is one column, 'prompt;completion': the delimiter is not ','\n"
            "what to do: save it with commas as .csv, or with tabs as .tsv"
        ),
        **named("rows.csv", "prompt;completion\nHow many, all in all?;Two.\n"),
    ),
    Case(
        "a CSV with tabs",
        (
            "prepare failed: rows.csv:1: the header is one column, 'prompt\\tcompletion': the delimiter is not "
            "','\n"
            "what to do: save it with commas as .csv, or with tabs as .tsv"
        ),
        **named("rows.csv", "prompt\tcompletion\nHow many?\tTwo.\n"),
    ),
    Case(
        "a CSV with a cell too many",
        (
            "prepare failed: rows.csv:2: 3 cells, the header has 2\n"
            "what to do: quote cells that hold the delimiter; use .tsv for tabs"
        ),
        **named("rows.csv", "prompt,completion\nHow many, all in all?,Two.\n"),
    ),
    Case(
        "a CSV with a quote that does not end",
        ("prepare failed: rows.csv:2: not CSV: unexpected end of data\nwhat to do: fix that line's quotes"),
        **named("rows.csv", 'prompt,completion\na,"b\n'),
    ),
    Case(
        "a CSV with a column twice",
        ("prepare failed: rows.csv:1: the header has prompt twice\nwhat to do: give each column a name of its own"),
        **named("rows.csv", "prompt,prompt\na,b\n"),
    ),
    Case(
        "columns of no format",
        (
            "prepare failed: 1 of 1 rows cannot be training rows:\n"
            "    rows.jsonl:1: has the columns antwort, frage, and needs messages; conversations; instruction + "
            "output; prompt + completion; text\n"
            "what to do: fix them, map the columns (datasets.<name>.columns), or set datasets.<name>.broken: "
            "drop"
        ),
        rows=[{"frage": "a", "antwort": "b"}],
    ),
    Case(
        "a mapped column that is not there",
        (
            "prepare failed: 40 of 40 rows cannot be training rows:\n"
            "    rows.jsonl:1: has the columns completion, prompt, and needs prompt + completion; mapped columns "
            "that are not there: question\n"
            "    rows.jsonl:2: has the columns completion, prompt, and needs prompt + completion; mapped columns "
            "that are not there: question\n"
            "    rows.jsonl:3: has the columns completion, prompt, and needs prompt + completion; mapped columns "
            "that are not there: question\n"
            "    rows.jsonl:4: has the columns completion, prompt, and needs prompt + completion; mapped columns "
            "that are not there: question\n"
            "    rows.jsonl:5: has the columns completion, prompt, and needs prompt + completion; mapped columns "
            "that are not there: question\n"
            "what to do: fix them, map the columns (datasets.<name>.columns), or set datasets.<name>.broken: "
            "drop"
        ),
        data(columns={"prompt": "question"}),
    ),
    Case(
        "a group column that is not there",
        (
            "prepare failed: no row has the mapped columns {group: topic}; the columns are completion, prompt\n"
            "what to do: fix datasets.<name>.columns"
        ),
        data(columns={"group": "topic"}),
    ),
    Case(
        "a number for an answer",
        (
            "prepare failed: 1 of 4 rows cannot be training rows:\n"
            "    rows.jsonl:4: completion is int '3', and must be text\n"
            "what to do: fix them, map the columns (datasets.<name>.columns), or set datasets.<name>.broken: "
            "drop"
        ),
        rows=[*ROWS[:3], {"prompt": "a", "completion": 3}],
    ),
    Case(
        "an answer that is null",
        (
            "prepare failed: 1 of 4 rows cannot be training rows:\n"
            "    rows.jsonl:4: has the columns prompt, and needs prompt + completion\n"
            "what to do: fix them, map the columns (datasets.<name>.columns), or set datasets.<name>.broken: "
            "drop"
        ),
        rows=[*ROWS[:3], {"prompt": "a", "completion": None}],
    ),
    Case(
        "an unknown role",
        (
            "prepare failed: 1 of 4 rows cannot be training rows:\n"
            "    rows.jsonl:4: messages[1] has the role 'narrator'; known: system, developer, user, human, "
            "prompter, assistant, gpt, chatgpt, model, bot, function_call, tool_call, tool, observation, function, "
            "function_response, tool_response, ipython\n"
            "what to do: fix them, map the columns (datasets.<name>.columns), or set datasets.<name>.broken: "
            "drop"
        ),
        rows=of({"role": "user", "content": "a"}, {"role": "narrator", "content": "b"}),
    ),
    Case(
        "no answer",
        (
            "prepare failed: 1 of 4 rows cannot be training rows:\n"
            "    rows.jsonl:4: has no assistant turn (roles: user)\n"
            "what to do: fix them, map the columns (datasets.<name>.columns), or set datasets.<name>.broken: "
            "drop"
        ),
        rows=of({"role": "user", "content": "a"}),
    ),
    Case(
        "messages that are text",
        (
            "prepare failed: 1 of 1 rows cannot be training rows:\n"
            "    rows.jsonl:1: messages is not JSON: Expecting value (column 1)\n"
            "what to do: fix them, map the columns (datasets.<name>.columns), or set datasets.<name>.broken: "
            "drop"
        ),
        rows=[{"messages": "Hello"}],
    ),
    Case(
        "all rows in another language",
        (
            "prepare failed: no training row is left of 40 (dropped: 40 language_en)\n"
            "what to do: loosen the filter that took them: datasets.<name>.languages, sample_size, val_size, "
            "test_size, broken"
        ),
        data(languages=["ja"]),
    ),
    Case(
        "one row",
        (
            "prepare failed: 1 rows in 1 group cannot be split into train and val\n"
            "what to do: set datasets.<name>.val_size, test_size, val_source, test_source, or columns.group (rows with "
            "the same prompt are one group)"
        ),
        rows=ROWS[:1],
    ),
    Case(
        "all rows with one prompt",
        (
            "prepare failed: 9 rows in 1 group cannot be split into train and val\n"
            "what to do: set datasets.<name>.val_size, test_size, val_source, test_source, or columns.group (rows with "
            "the same prompt are one group)"
        ),
        rows=[{"prompt": "a", "completion": str(n)} for n in range(9)],
    ),
    Case(
        "validation rows that are the training rows",
        (
            "prepare failed: no training row is left of 40 (dropped: 40 in_val)\n"
            "what to do: give datasets.<name>.val_source other rows than the rest"
        ),
        data(val_source="rows.jsonl"),
    ),
    Case(
        "weights that leave nothing",
        ("prepare failed: the weights leave none of 38 training rows\nwhat to do: raise datasets.<name>.source weight"),
        data(source=[{"path": "rows.jsonl", "weight": 1e-9}]),
    ),
    Case(
        "1 MB in one row",
        (
            "encode failed: max_length 1,024 removes 99.9% of the trained train tokens (1 sequences, 2.6%, are "
            "longer), more than max_token_loss 10.0%\n"
            "what to do: raise datasets.<name>.max_length (95% fit into 30, 99% fit into 250,016, "
            "100% fit into 250,016), or max_token_loss"
        ),
        rows=[*ROWS, {"prompt": "How many are there?", "completion": "two " * 250_000}],
    ),
    Case(
        "every row too long",
        (
            "encode failed: all 38 train sequences are longer than max_length 8\n"
            "what to do: raise datasets.<name>.max_length (95% fit into 30, 99% fit into 30, "
            "100% fit into 30)"
        ),
        data(max_length=8),
    ),
    Case(
        "a row too long, which is an error",
        (
            "encode failed: 28 of 38 train sequences are longer than max_length 29\n"
            "what to do: raise datasets.<name>.max_length (95% fit into 30, 99% fit into 30, "
            "100% fit into 30), or set overlength: drop or truncate"
        ),
        data(max_length=29, overlength="error"),
    ),
    Case(
        "a folder with a brace in its name",
        (
            "datasets.d.source: {x}/rows.jsonl: Snakemake takes { and } in a name for a wildcard\n"
            "  -> rename the file or folder"
        ),
        **named("{x}/rows.jsonl", GOOD),
    ),
    Case(
        "a secret in the data",
        "prepare failed: 1 of 1 rows cannot be training rows:\n"
        "    rows.jsonl:1: has the columns ***, and needs messages; conversations; instruction + output; "
        "prompt + completion; text\n"
        "what to do: fix them, map the columns (datasets.<name>.columns), or set datasets.<name>.broken: drop",
        rows=[{SECRET: "a"}],
    ),
]
