"""encode: every row and every token accounted for, the same bytes each time, and nothing written where something is wrong."""

import json
import re
from argparse import Namespace
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tokenizers_for_tests import (
    CHATML,
    DEMO,
    PLAIN,
    ROOT,
    adds_bos,
    assistant,
    make_tokenizer,
    poor,
    server_ids,
    spans,
    user,
)

import encode
from moult.data import portions, token_file
from moult.data.preview import pieces
from moult.data.sequence import IGNORE
from moult.errors import MoultError
from moult.files import read_json, sha256_text, write_json, write_jsonl
from moult.model.chat import Chat

SETTINGS = {
    "chat_template": "chatml",
    "chat_template_kwargs": {},
    "trust_remote_code": False,
    "max_length": 256,
    "overlength": "drop",
    "max_token_loss": 0.1,
    "unrenderable": "error",
}
SHORT = [user("Where is it?"), assistant("Here.")]
LONG = [user("Where is it?"), assistant("Here. " * 60)]  # about 200 tokens


def row(content: list[dict] | str, id: str = "row:1", **more) -> dict:
    return {"id": id, "group": f"group of {id}", "source": 0, **more} | (
        {"text": content} if isinstance(content, str) else {"messages": content}
    )


def rows(*contents) -> list[dict]:
    return [row(content, f"row:{number}") for number, content in enumerate(contents)]


class Log:
    def __init__(self):
        self.warnings: list[str] = []

    def info(self, *words):
        pass

    def warning(self, text, *words):
        self.warnings.append(text % words)


@pytest.fixture
def run(tmp_path):
    """Encode rows: run([...], max_length=32) -> the folder, report, {part: sequences}, warnings."""

    def run(
        train: list[dict], val: list[dict] | None = None, model: Path = DEMO, threads: int = 1, **settings
    ) -> Namespace:
        write_json(tmp_path / "model.json", {"folder": str(model)})
        write_jsonl(tmp_path / "train.jsonl", train)
        for part in ("val", "test"):
            write_jsonl(tmp_path / f"{part}.jsonl", rows(SHORT) if val is None else val)
        paths = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "val", "test")}
        out, log = tmp_path / "tokens", Log()
        args = Namespace(
            model=str(tmp_path / "model.json"),
            templates=str(ROOT / "config" / "chat_templates"),
            out=str(out),
            threads=threads,
            without=[],
            **paths,
        )
        encode.encode({**SETTINGS, **settings}, args, log)
        sequences = {part: pq.read_table(out / f"{part}.parquet").to_pylist() for part in ("train", "val", "test")}
        return Namespace(out=out, report=read_json(out / "report.json"), warnings=log.warnings, **sequences)

    return run


def trained(sequences: list[dict]) -> int:
    return sum(label != IGNORE for sequence in sequences for label in sequence["labels"])


# --- the command ------------------------------------------------------------------------------------------------------

SUMS = [[user(f"What is {n} and {n + 1}?"), assistant(f"{n} and {n + 1} is {2 * n + 1}, I say.")] for n in range(300)]
SURE = [user("Sure?"), assistant("Yes.")]
MANY = rows(*(messages + SURE * (number % 2) for number, messages in enumerate(SUMS)))  # more than one portion of work


def test_same_input_same_bytes(tmp_path, run_script):
    """Whatever the number of processes. The labels are those of the conversations, token for token."""
    write_jsonl(tmp_path / "train.jsonl", MANY)
    write_jsonl(tmp_path / "val.jsonl", MANY[:7])
    write_jsonl(tmp_path / "test.jsonl", MANY[7:11])
    written = []
    for threads in (1, 2):
        out = tmp_path / f"tokens{threads}"
        done = run_script(
            "encode",
            *("--settings", json.dumps(SETTINGS), "--model", DEMO, "--templates", ROOT / "config" / "chat_templates"),
            *("--train", tmp_path / "train.jsonl", "--val", tmp_path / "val.jsonl"),
            *("--test", tmp_path / "test.jsonl", "--out", out),
            *("--threads", threads, "--log-file", tmp_path / "encode.log"),
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        written.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert sorted(written[0]) == [
        *("chat_template.jinja", "preview.html", "preview.json", "report.json"),
        *("test.parquet", "train.parquet", "val.parquet"),
    ]
    assert written[0] == written[1]
    assert written[0]["chat_template.jinja"].decode() == CHATML

    chat = Chat(str(DEMO), CHATML)
    for sequence, source in zip(pq.read_table(out / "train.parquet").to_pylist(), MANY, strict=True):
        assert (sequence["id"], sequence["group"], sequence["source"]) == (source["id"], source["group"], 0)
        answers = [message["content"] for message in source["messages"] if message["role"] == "assistant"]
        labels = [sequence["labels"][start:end] for start, end in spans(sequence["labels"])]
        assert [chat.decode(span) for span in labels] == [f"{answer}<|im_end|>" for answer in answers]
        assert sequence["trained_bytes"] == sum(len(answer.encode()) for answer in answers)
        asked = server_ids(chat, source["messages"][:-1], None)
        assert sequence["input_ids"][: sequence["answer_start"]] == asked


@pytest.mark.parametrize(("portion", "threads"), [(1, 1), (7, 3), (1000, 2)])
def test_bytes_do_not_depend_on_how_the_rows_are_handed_out(portion, threads, run, monkeypatch):
    """Nor do the counts. Row groups are made small, so that there are some."""
    monkeypatch.setattr(token_file, "ROW_GROUP", 500)
    contents = [*(row["messages"] for row in MANY[:100]), [user("x"), assistant("<|im_end|>")], LONG, [*SHORT, *LONG]]
    settings = {"unrenderable": "drop", "max_length": 100, "overlength": "truncate", "max_token_loss": 1}

    def written(portion: int, threads: int) -> dict[str, bytes]:
        monkeypatch.setattr(portions, "PORTION_ROWS", portion)
        return {
            path.name: path.read_bytes() for path in run(rows(*contents), threads=threads, **settings).out.iterdir()
        }

    first, other = written(50, 1), written(portion, threads)
    assert first == other
    file = pq.ParquetFile(run(rows(*contents), **settings).out / "train.parquet")
    groups = [file.read_row_group(number, ["length"]).column(0).to_pylist() for number in range(file.num_row_groups)]
    assert len(groups) > 5
    assert all(sum(group) >= 500 > sum(group[:-1]) for group in groups[:-1])


def test_lengths_have_a_column_of_their_own(run):
    done = run(rows(SHORT, LONG), max_length=100, overlength="truncate", max_token_loss=1)
    for part in (done.train, done.val):
        assert [sequence["length"] for sequence in part] == [len(sequence["input_ids"]) for sequence in part]


def test_progress_is_told_while_rows_are_encoded(run, monkeypatch):
    """After each portion, which is small where rows are long."""
    told = []
    monkeypatch.setattr(encode.progress, "update", lambda bar, count: told.append((bar.what, bar.total, count)))
    monkeypatch.setattr(portions, "PORTION_BYTES", 1000)
    run(rows(*[SHORT] * 40, LONG, LONG))
    train = [count for what, total, count in told if (what, total) == ("train rows: tokens", 42)]
    assert sum(train) == 42 and len(train) > 5


@pytest.mark.parametrize(("asks", "sequences"), [("{{ A }}", 6), ("{{- A -}}", 1)])
def test_turns_that_stand_otherwise_later_on_cost_many_tokens_and_that_is_said(asks, sequences, run, tmp_path):
    """A template that asks for an answer with a line more than it shows it with: each turn needs a sequence of its own.

    Written so that it shows no line breaks of the file, it makes one sequence of a conversation.
    """
    opening = "{{ '<|im_start|>assistant\n' }}"
    template = PLAIN.replace(opening, f"\n    {asks}\n".replace("A", "'<|im_start|>assistant\n'"))
    (tmp_path / "spread.jinja").write_text(template)
    messages = [message for number in range(6) for message in (user(f"And {number}?"), assistant(f"It is {number}."))]
    done = run(rows(messages), chat_template=str(tmp_path / "spread.jinja"))
    assert done.report["train"]["sequences"] == sequences
    warned = [text for text in done.warnings if "times as many tokens" in text]
    assert len(warned) == (sequences > 1)
    for text in warned:
        assert text.startswith("train: 1 rows make 6 sequences, 3.") and "{{- ... -}}" in text


def test_wrong_input_is_one_message_and_no_output(tmp_path, run_script):
    write_jsonl(tmp_path / "rows.jsonl", rows(SHORT))
    model = make_tokenizer(tmp_path / "model")  # a base model, without a template
    write_json(tmp_path / "model.json", {"folder": str(model)})
    done = run_script(
        "encode",
        *("--settings", json.dumps({**SETTINGS, "chat_template": None}), "--model", tmp_path / "model.json"),
        *(
            "--train",
            tmp_path / "rows.jsonl",
            "--val",
            tmp_path / "rows.jsonl",
            "--test",
            tmp_path / "rows.jsonl",
            "--out",
            tmp_path / "tokens",
        ),
        *("--log-file", tmp_path / "encode.log"),
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "has no chat template, but the rows are conversations" in done.stderr
    assert "chatml (a template that is part of Moult)" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "tokens").exists()


# --- the account ------------------------------------------------------------------------------------------------------


def test_report_adds_up(run, tmp_path):
    """A row refused, one in two sequences, one too long, one of several turns: everything is somewhere."""
    split = [user("Think."), assistant("So."), user("More."), assistant("\n\nSo it is.")]
    contents = [SHORT, split, [user("x"), assistant("<|im_end|>")], LONG, [*SHORT, *SHORT]]
    template = "{{ '' if messages | length > 2 else ' ' }}" + CHATML  # a longer conversation begins otherwise
    path = tmp_path / "split.jinja"
    path.write_text(template)
    done = run(rows(*contents * 4), chat_template=str(path), max_length=100, unrenderable="drop", max_token_loss=1)
    part, length = done.report["train"], done.report["train"]["length"]
    assert part["rows"] == 20 and part["unrenderable"] == {"control_token": 4}
    kept = {sequence["id"] for sequence in done.train}
    assert len(kept) == 20 - 4 - 4  # neither the refused nor the long ones
    assert part["rows_in_several_sequences"] == 8
    assert part["sequences"] == len(done.train) == 4 * (1 + 2 + 2)
    assert (length["over_max_length"], length["dropped"], length["truncated"]) == (4, 4, 0)
    assert length["trained_tokens_made"] == part["trained_tokens"] + length["trained_tokens_lost"]
    assert part["trained_tokens"] == trained(done.train)
    assert part["tokens"] == sum(len(sequence["input_ids"]) for sequence in done.train)
    assert part["trained_share"] == part["trained_tokens"] / part["tokens"]
    assert length["longest_kept"] == max(len(sequence["input_ids"]) for sequence in done.train) <= 100
    assert length["longest"] == length["quantiles"]["1"] > 100
    assert done.report["stop"]["trained_ends"] == done.report["stop"]["with_stop_token"] == 4 * (1 + 2 + 2)
    assert done.report["template"] == {"origin": "file: split.jinja", "sha256": sha256_text(template), "date": None}
    for sequence in done.train:
        assert len(sequence["input_ids"]) == len(sequence["labels"])
        assert all(label in (IGNORE, id) for id, label in zip(sequence["input_ids"], sequence["labels"], strict=True))


@pytest.mark.parametrize("overlength", ["drop", "truncate", "error"])
def test_too_long(overlength, run):
    """Five of twenty are too long. Of those, one has its answer behind the limit."""
    late = [user("Well, " * 60), assistant("Here.")]
    contents = [SHORT] * 15 + [LONG] * 4 + [late]
    if overlength == "error":
        with pytest.raises(MoultError, match=r"5 of 20 train sequences are longer than max_length 100") as error:
            run(rows(*contents), max_length=100, overlength=overlength)
        assert "datasets.<name>.max_length" in error.value.fix
        return
    done = run(rows(*contents), max_length=100, overlength=overlength, max_token_loss=1)
    whole = run(rows(*contents))
    length = done.report["train"]["length"]
    assert length["over_max_length"] == 5
    assert length["trained_tokens_made"] == whole.report["train"]["trained_tokens"]
    assert length["trained_tokens_lost"] == length["trained_tokens_made"] - trained(done.train) > 0
    if overlength == "drop":
        assert (length["dropped"], length["truncated"], len(done.train)) == (5, 0, 15)
        assert done.train == whole.train[:15]
        return
    assert (length["dropped"], length["truncated"], length["truncated_before_the_answer"]) == (0, 5, 1)
    assert len(done.train) == 19
    for cut, full in zip(done.train[15:], whole.train[15:], strict=False):
        assert (cut["input_ids"], cut["labels"]) == (full["input_ids"][:100], full["labels"][:100])
        assert cut["answer_start"] == -1  # its end is gone: nothing to compare an answer with
        said = [label for label in cut["labels"] if label != IGNORE]
        assert cut["trained_bytes"] == pytest.approx(len(Chat(str(DEMO), CHATML).decode(said).encode()), abs=3)
    assert done.report["stop"]["trained_ends"] == 19 and done.report["stop"]["with_stop_token"] == 15


def test_a_cut_at_a_special_token_makes_no_stop_token(run, tmp_path):
    """Where an answer is cut is not where it ends, though the last token that is left may be a special one."""
    template = CHATML.replace("{{- message.content or '' }}", "{{- '<|call|>' + message.content }}")
    model = make_tokenizer(tmp_path / "model", specials=("<|call|>",), template=template)
    late = [user("Well, where is it? " * 9), assistant("Here.")]
    limit = len(Chat(str(model), template).prompt_ids(late[:1])) + 1
    contents = [*[SHORT] * 9, late]
    cutting = {"overlength": "truncate", "max_length": limit, "max_token_loss": 1}
    done = run(rows(*contents), model=model, chat_template=None, **cutting)
    assert done.train[-1]["labels"][-1] == 768  # <|call|>
    assert done.report["stop"]["token_ids"] == done.report["stop"]["generation_stop_ids"] == [2]
    assert done.report["stop"]["added"] == []


def test_stop_token_that_generation_does_not_know(run, tmp_path):
    """A base model with a chat template: its turns end with a token that generation_config does not name."""
    template = CHATML.replace("eos_token", "'<|turn_end|>'")
    model = make_tokenizer(tmp_path / "model", eos="<|endoftext|>", specials=("<|turn_end|>",), template=template)
    stop = run(rows(SHORT), model=model, chat_template=None).report["stop"]
    assert stop["tokens"] == ["<|turn_end|>"]
    assert stop["added"] == stop["token_ids"] == [768]
    assert stop["generation_stop_ids"] == [0, 768]


def test_pad_is_no_stop_token(run, tmp_path):
    template = CHATML.replace("eos_token", "'<|turn_end|>'")
    specials = ("<|turn_end|>",)
    model = make_tokenizer(tmp_path / "model", eos="<|pad|>", pad="<|pad|>", specials=specials, template=template)
    report = run(rows(SHORT), model=model, chat_template=None).report
    assert report["pad_token_id"] not in report["stop"]["generation_stop_ids"] == [3, 768]


def test_unrenderable_rows_are_counted(run):
    broken = [[user("<|im_end|>"), assistant("Oh.")], [user("Hi"), assistant("<|im_start|>")], [assistant("Hello.")]]
    contents = [SHORT, *broken, SHORT]
    with pytest.raises(MoultError) as error:
        run(rows(*contents))
    assert error.value.what.splitlines() == [
        "the chat template cannot show 3 of 5 train rows unchanged:",
        "    2 control_token, for example row:1: messages[0] says '<|im_end|>', which this tokenizer takes for a control token",
        "    1 no_prompt, for example row:3: it begins with an assistant turn, which nothing asks for "
        "(give that turn weight 0)",
    ]
    assert "unrenderable: drop" in error.value.fix
    done = run(rows(*contents), unrenderable="drop")
    assert done.report["train"]["unrenderable"] == {"control_token": 2, "no_prompt": 1}
    assert [sequence["id"] for sequence in done.train] == ["row:0", "row:4"]


def test_characters_that_the_tokenizer_lacks_are_counted(run, tmp_path):
    model = make_tokenizer(tmp_path / "model", eos="<end>", change=poor)
    contents = [
        [user("a = b?"), assistant("yes, as b = c")],
        [user("sure"), assistant("very", reasoning_content="c == d")],
        [user("so"), assistant("no")],
    ]
    done = run(rows(*contents), model=model)
    assert done.report["train"]["lost_characters"] == {"count": 6, "rows": 2, "which": {"=": 4, "?": 1, ",": 1}}
    [warning] = [text for text in done.warnings if text.startswith("train:")]
    assert "6 characters in 2 rows" in warning and "=" in warning


def test_what_tinystories_cannot_write_of_gsm8k(run, shared):
    """The model of the examples has no tokens for = / #, and says how much that costs."""
    with (shared / "datasets" / "gsm8k" / "train.jsonl").open(encoding="utf-8") as file:
        raw = [json.loads(next(file)) for _ in range(120)]
    contents = [[user(line["question"]), assistant(line["answer"])] for line in raw]
    model = shared / "models" / "TinyStories-656K"
    done = run(rows(*contents), model=model, max_length=1024)
    lost = done.report["train"]["lost_characters"]
    known = set("".join(Chat(str(model), None).tokenizer.get_vocab()))
    text = "".join(line["question"] + line["answer"] for line in raw)
    assert {"=", "/", "#"} <= set(lost["which"]) and not known & set(lost["which"])
    assert lost["count"] == sum(char not in known and not char.isspace() for char in text)
    assert len(done.train) == 120
    answer = "".join(char for char in raw[0]["answer"] if char in known or char.isspace())
    first, chat = done.train[0], Chat(str(model), CHATML)
    assert chat.decode(first["input_ids"]).endswith(f"assistant\n{answer}<|end_story|>")


def test_text_rows(run, tmp_path):
    """Pre-training text: each row once between BOS and EOS, all of it trained, and no template needed."""
    model = make_tokenizer(tmp_path / "model", bos="<s>", change=adds_bos)
    done = run(rows("Once upon a time.", "<s>Twice."), rows("Thrice é."), model=model, chat_template=None)
    chat = Chat(str(model), None)
    assert [chat.decode(sequence["input_ids"]) for sequence in done.train + done.val] == [
        "<s>Once upon a time.<|im_end|>",
        "<s>Twice.<|im_end|>",
        "<s>Thrice é.<|im_end|>",
    ]
    assert [sequence["trained_bytes"] for sequence in done.val] == [len("Thrice é.".encode())]
    assert done.report["train"]["trained_tokens"] == done.report["train"]["tokens"] - 2  # all but the BOS
    assert (done.out / "chat_template.jinja").read_text() == ""
    assert done.report["template"]["sha256"] == sha256_text("")


CUTTING = {"overlength": "truncate", "max_length": 32, "max_token_loss": 1}


def test_plain_text_may_be_cut(run):
    """It is no turn, and need not end."""
    long = "Once upon a time. " * 20
    done = run(rows(long, long, long), rows("Twice."), chat_template=None, **CUTTING)
    assert done.report["train"]["length"]["truncated"] == 3
    assert (done.report["stop"]["trained_ends"], done.report["stop"]["with_stop_token"]) == (3, 0)


@pytest.mark.parametrize(
    ("what", "contents", "settings"),
    [
        ("line 2: Encountered unknown tag", [SHORT], {"chat_template": "bad.jinja"}),
        ("no such file", [SHORT], {"chat_template": "missing.jinja"}),
        ("all 2 train sequences are longer than max_length 16", [SHORT, LONG], {"max_length": 16}),
        # The prompt alone is longer than what is left.
        ("all 2 train sequences are", [SHORT, LONG], {"max_length": 8, "overlength": "truncate", "max_token_loss": 1}),
        ("max_length 100 removes 9.* of the trained train tokens", [SHORT, LONG], {"max_length": 100}),
        ("max_length 100 removes", [SHORT, LONG], {"max_length": 100, "overlength": "truncate"}),
        (
            "only 1 of 4 trained turns end with a stop token",
            [SHORT, LONG, LONG, LONG],
            {"max_length": 100, "overlength": "truncate", "max_token_loss": 1},
        ),
        (
            "the chat template cannot show 1 of 1 train rows",
            [[user("x"), assistant("<|im_end|>")]],
            {"unrenderable": "drop"},
        ),
        ("control_token, for example row:0", [[user("x"), assistant("<|im_end|>")], SHORT], {}),
    ],
)
def test_gates(what, contents, settings, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bad.jinja").write_text("{% for m in messages %}\n{% nonsense %}")
    with pytest.raises(MoultError, match=what) as error:
        run(rows(*contents), **settings)
    assert error.value.fix
    assert not (tmp_path / "tokens").exists()


def test_token_outside_the_vocabulary(run, tmp_path):
    """Tokens were added to the tokenizer, and the model was not resized."""
    template = CHATML.replace("eos_token", "'<|turn_end|>'")
    model = make_tokenizer(tmp_path / "model", specials=("<|turn_end|>",), template=template)
    write_json(model / "config.json", {"vocab_size": 768})
    with pytest.raises(MoultError, match=r"train row row:0: token 768 is outside the model's vocabulary of 768"):
        run(rows(SHORT), model=model, chat_template=None)
    write_json(model / "config.json", {"text_config": {"vocab_size": 769}})
    assert run(rows(SHORT), model=model, chat_template=None).report["vocabulary"] == 769


# --- the preview ------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The sequences on the page: titles, and of each token its class, its id and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.titles: list[str] = []
        self.sequences: list[list[list]] = []
        self.tags: list[str] = [""]
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "h2":
            self.titles.append("")
        elif tag == "pre":
            self.sequences.append([])
        elif tag == "span":
            self.sequences[-1].append([dict(attributes)["class"], int(dict(attributes)["title"]), ""])

    def handle_endtag(self, tag):
        self.tags.append(f"/{tag}")

    def handle_data(self, text):
        if self.tags[-1] == "span":
            self.sequences[-1][-1][2] += text
        elif self.tags[-1] == "h2":
            self.titles[-1] += text


@pytest.mark.parametrize("tokenizer", [None, "models/TinyStories-656K"])
def test_preview_shows_what_is_trained(tokenizer, run, request):
    nasty = [user("<script>alert('x')</script> & <b>you</b>"), assistant("Yes,  <i>I</i>\n\n👩‍🚀 &amp; 한 {x} </pre>")]
    contents = [nasty, [*SHORT, *SHORT], *[SHORT] * 31]
    model = DEMO if tokenizer is None else request.getfixturevalue("shared") / tokenizer
    data = rows(*contents)
    data[0]["id"] = "<b>row</b>:0"
    done = run(data, model=model)
    text = (done.out / "preview.html").read_text(encoding="utf-8")
    page, chat = Page(text), Chat(str(model), CHATML)
    for shown in re.findall('<pre dir="auto">(.*?)</pre>', text, re.DOTALL):
        assert "<" not in re.sub(r'<span class="(trained|context)" title="\d+">|</span>', "", shown)
    assert len(page.sequences) == encode.PREVIEWED and page.tags.count("/pre") == encode.PREVIEWED
    assert page.titles[0].startswith("<b>row</b>:0: ")
    picked = [
        sequence for sequence in done.train if any(title.startswith(f"{sequence['id']}: ") for title in page.titles)
    ]
    for sequence, shown, title in zip(picked, page.sequences, page.titles, strict=True):
        assert [token for _, token, _ in shown] == sequence["input_ids"]
        assert [kind == "trained" for kind, _, _ in shown] == [label != IGNORE for label in sequence["labels"]]
        assert "".join(text for _, _, text in shown).replace("↵\n", "\n") == chat.decode(sequence["input_ids"])
        count = sum(label != IGNORE for label in sequence["labels"])
        assert title == f"{sequence['id']}: {count} of {len(shown)} tokens trained"


def test_preview_shows_spaces_and_whole_characters(shared):
    """A token alone would lack its space (SentencePiece), or be a part of a character."""
    for name, text in (("models/TinyStories-656K", "Once upon a time"), ("tokenizers/minimind", "Ein 👩‍🚀 zu 한")):
        chat = Chat(str(shared / name), None)
        parts = pieces(chat.ids(text), chat)
        assert "".join(parts) == text and "\ufffd" not in "".join(parts) and len(parts) > 4
