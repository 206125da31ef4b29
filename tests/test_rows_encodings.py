"""Text in UTF-16 and UTF-32, as PowerShell and spreadsheets write it, is read as what it is."""

import gzip
import json

import pytest

from moult.data.readers import read_rows
from moult.errors import MoultError
from moult.workflow.runtime import read_config

ROWS = [{"prompt": "Wie heißt das?", "completion": "日本 🇳🇴"}, {"prompt": "two\u2028lines", "completion": "b"}]
FILES = {
    "a.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS),
    "a.json": json.dumps(ROWS, ensure_ascii=False, indent=1),
    "a.csv": "prompt,completion\r\n" + "".join(f"{row['prompt']},{row['completion']}\r\n" for row in ROWS),
    "a.tsv": "prompt\tcompletion\n" + "".join(f"{row['prompt']}\t{row['completion']}\n" for row in ROWS),
}


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", FILES)
def test_text_in_any_unicode(tmp_path, name, encoding, gz):
    data = FILES[name].encode(encoding)
    file = tmp_path / (f"{name}.gz" if gz else name)
    file.write_bytes(gzip.compress(data) if gz else data)
    assert [row for _, row in read_rows(file, "a")] == ROWS


@pytest.mark.parametrize(
    ("name", "data", "message", "advice"),
    [
        (
            "a.jsonl",
            '{"a": 1}\n{"a": 2}'.encode("utf-16")[:-1],
            "a.jsonl:2: not UTF-16 (byte 0x7d)",
            "save it again, as UTF-8",
        ),
        ("a.csv", "a,b\n1,2\n".encode("utf-32")[:-2], "a.csv:2: not UTF-32 (byte 0x0a)", "save it again, as UTF-8"),
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": "\xe9"}\n',
            "a.jsonl:2: not UTF-8 (byte 0xe9)",
            "iconv -f latin1 -t utf-8 a.jsonl",
        ),
    ],
)
def test_text_that_is_cut_or_in_no_unicode(tmp_path, name, data, message, advice):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(MoultError) as error:
        list(read_rows(tmp_path / name, name))
    assert error.value.what == message and advice in error.value.fix


def test_json_lines_are_not_held_in_memory(tmp_path):
    """What is behind the rows that are asked for is not even read: max_rows of a large file is cheap."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n' + " " * 100_000 + "\n{not JSON\n")
    rows = read_rows(file, "a.jsonl")
    assert next(rows) == ("a.jsonl:1", {"a": 1})
    with pytest.raises(MoultError, match=r"a\.jsonl:3: not JSON"):
        next(rows)


def test_a_config_in_utf_16_is_called_that(tmp_path, monkeypatch):
    """Snakemake stops at such a file before it reads ours; this is what the commands for people say."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config").mkdir()
    (tmp_path / "config/config.yaml").write_text("model: {name: m}\n")
    (tmp_path / "mine.yaml").write_text("seed: 1\n", encoding="utf-16")
    with pytest.raises(MoultError) as error:
        read_config(["mine.yaml"])
    assert error.value.what == "mine.yaml: not UTF-8 (byte 0xff)"
    assert "iconv -f utf-16 -t utf-8 mine.yaml" in error.value.fix
