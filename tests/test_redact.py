"""Secrets: in neither console nor log, however they are written."""

import json
import shlex
from functools import partial
from urllib.parse import quote

import pytest
from running import run_stage

from moult.run.redact import redact


@pytest.fixture
def run(tmp_path):
    return partial(run_stage, folder=tmp_path)


SECRETS = {
    "HF_TOKEN": "hf_AbCdEfGhIjKlMnOpQrStUvWx",
    "WANDB_API_KEY": "0123456789abcdef0123",
    "MY_PASSWORD": "correct horse battery",
}


def test_secrets_are_in_neither_console_nor_log(run, tmp_path):
    result = run(
        """
        log.info("token %s", os.environ["HF_TOKEN"])
        logging.getLogger("library").debug("key %s", os.environ["WANDB_API_KEY"])
        print("printed", os.environ["MY_PASSWORD"])
        os.system('echo "$HF_TOKEN by a child"')
        api_token = "only in a variable"
        headers = {"authorization": "Bearer abcdefghijklmnop"}
        url = "https://me:swordfish@proxy.example:3128/x"
        raise MoultError(f"cannot reach {url} with hf_ZzZzZzZzZzZzZzZzZzZzZzZz", "use https://ghp_0123456789@host/")
        """,
        ', {"remote": "https://user:hunter2@example.org", "given": os.environ["HF_TOKEN"]}',
        **SECRETS,
    )
    assert result.code == 1
    everything = result.console + "".join(path.read_text() for path in tmp_path.rglob("*.log"))
    for secret in (
        *SECRETS.values(),
        *("only in a variable", "abcdefghijklmnop", "swordfish", "hf_Zz", "ghp_", "hunter2"),
    ):
        assert secret not in everything
    assert "cannot reach https://***@proxy.example:3128/x with ***" in result.stderr
    assert "*** by a child" in result.log
    assert "api_token = ***" in result.log


AWKWARD = "pä\"ss\\wörd 'of' many/characters@host"


@pytest.mark.parametrize(
    "written",
    [str, json.dumps, lambda text: json.dumps(text, ensure_ascii=False), repr, ascii, quote, shlex.quote],
    ids=["text", "JSON", "JSON with letters", "Python", "ASCII", "address", "shell"],
)
@pytest.mark.parametrize("name", ["DB_PASSWORD", "SIGNING_KEY", "GITHUB_PAT", "HF_TOKEN"])
def test_a_secret_is_masked_however_it_is_written(monkeypatch, name, written):
    monkeypatch.setenv(name, f"{AWKWARD}\n")
    shown = redact(f"it is {written(AWKWARD)}.")
    assert "***" in shown and "rd" not in shown and "many" not in shown


def test_each_line_of_a_secret_is_masked(monkeypatch):
    monkeypatch.setenv("TLS_PRIVATE_KEY", "first line of it\nsecond line of it\nend")
    assert redact("second line of it") == "***"


def test_a_secret_is_masked_before_a_long_value_is_cut(run):
    """In the values of variables: half of it would no longer be found."""
    result = run(
        """
        key = "0123456789abcdef0123"
        line = "x" * 85 + key + "x" * 300
        data = ("x" * 85 + key + "x" * 300).encode()
        class Odd:
            def __repr__(self):
                return line
        odd, headers = Odd(), {"authorization": "Basic dXNlcjpwYXNzd29yZA=="}
        1 / 0
        """,
        WANDB_API_KEY="0123456789abcdef0123",
    )
    assert "xxx***xxx" in result.log and "dXNlcjpw" not in result.log
    variables = result.log.partition("variables, outermost frame first")[2]
    assert "0123456" not in variables and "cdef0123" not in variables


def test_a_password_with_an_at_sign_in_an_address():
    assert redact("http://me:sword@fish@proxy:3128/x and https://a@b") == "http://***@proxy:3128/x and https://***@b"


@pytest.mark.parametrize(
    "text",
    [
        *("https://example.org/a?b=c", "https://example.org?to=me@x", "mail me@example.org", "git@host:me/x"),
        *("hf_hub 1.2", "pad_token_id 0", "Bearer of news", '{"url":"https://x","mail":"a@b"}'),
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text
