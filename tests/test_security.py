"""What SECURITY.md promises, by trying to break it. Other tests that it names stand with what they test."""

import ipaddress
import json
import re
from html.parser import HTMLParser
from urllib.parse import quote

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny import make_model
from tokenizers_for_tests import CHATML, DEMO, assistant, make_tokenizer, user
from workflow import ROOT, SECRETS

import encode
import plan
from moult.data import preview
from moult.data.labels import sequences_of
from moult.errors import MoultError
from moult.model.chat import Chat, Unrenderable
from moult.model.manifest import describe
from moult.model.safetensors import weight_files
from moult.model.tokenizer import load_tokenizer
from moult.pages.page import render
from moult.run.redact import redact
from moult.workflow.config import ConfigError, load_schema, resolve, slug

SECURITY = (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_every_test_that_the_text_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", SECURITY)
    assert len(named) > 15 and len(named) == SECURITY.count("::")
    for file, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), f"{file}::{name}"


# --- code of others ---------------------------------------------------------------------------------------------------

BEACON = "from pathlib import Path\nPath(__file__).with_name('code has run').touch()\n"


@pytest.fixture
def with_code(tmp_path):
    """A model folder whose config and tokenizer bring code that would leave a mark."""
    folder = make_tokenizer(make_model(tmp_path / "model"))
    for name, classes in {
        "config.json": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
        "tokenizer_config.json": {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]},
    }.items():
        content = json.loads((folder / name).read_text())
        content |= {"auto_map": classes, "model_type": "evil", "tokenizer_class": "EvilTokenizer"}
        (folder / name).write_text(json.dumps(content))
    (folder / "evil.py").write_text(BEACON)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(BEACON)
    return folder


def test_code_of_a_model_never_runs_unasked(with_code, monkeypatch):
    """Not when it is looked at, and neither if a stage is given the folder by hand, past that check."""
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asks whether to trust it"))
    with pytest.raises(MoultError, match=r"brings its own Python code \(evil\.Config, evil\.Model, evil\.Tokenizer\)"):
        describe(with_code, "evil", trust_remote_code=False)
    for load in (lambda: plan.empty_model(with_code, False), lambda: load_tokenizer(str(with_code), False)):
        with pytest.raises(MoultError):
            load()
    assert not list(with_code.rglob("code has run"))


def test_every_call_that_could_run_code_takes_the_setting():
    """transformers' own default is not to; a literal True would not be the user's word."""
    for path in (ROOT / "scripts").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text or path.name == "manifest.py"  # open_model only hashes files
        assert not re.search(r"\bpickle\.|torch\.load\(|weights_only=False", text), path


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_refused(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"\x80\x04")
    with pytest.raises(MoultError, match="weights only as pickle"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "escape",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{% include '/etc/passwd' %}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ '%s'.__class__.format.__globals__ }}",
    ],
)
def test_a_template_reaches_nothing_of_python(escape):
    """It is refused, or shows nothing (Jinja's answer to a name that must not be read)."""
    row = {"messages": [user("Hi"), assistant("Hello.")]}
    try:
        shown = sequences_of(Chat(str(DEMO), escape + CHATML), row)
    except (Unrenderable, MoultError):
        return
    assert shown == sequences_of(Chat(str(DEMO), CHATML), row)


# --- the demo, watched ------------------------------------------------------------------------------------------------

OWN = ("results", "logs", "benchmarks", ".snakemake", ".cache")  # the last is where the tests put Snakemake's cache


def audited(beside) -> list[list]:
    return [json.loads(line) for line in (beside / "audit.jsonl").read_text().splitlines()]


def test_nothing_is_changed_outside_of_the_results(watched_demo):
    demo, beside = watched_demo
    for path in demo.rglob("*"):
        place = path.relative_to(demo)
        if path.is_file() and place.parts[0] not in OWN and "__pycache__" not in place.parts:
            assert path.read_bytes() == (ROOT / place).read_bytes(), place
    assert list((beside / "HOME").iterdir()) == []
    written = {what for event, what, _ in audited(beside) if event == "open"}
    assert any(path.startswith(f"{demo}/results") for path in written)
    own = (*(f"{demo}/{name}/" for name in OWN), f"{beside}/TMPDIR/", "/dev/")
    assert [path for path in written if not path.startswith(own) and "/__pycache__/" not in path] == []


def test_nothing_listens_and_nothing_connects_by_default(watched_demo):
    """A bind to loopback is urllib3's, which tries whether the machine has IPv6."""
    seen = [(event, what, program) for event, what, program in audited(watched_demo[1]) if event.startswith("socket.")]
    for event, address, program in seen:
        assert event == "socket.bind" and ipaddress.ip_address(address[0]).is_loopback, (event, address, program)


def test_no_pickle_is_opened(watched_demo):
    assert [entry for entry in audited(watched_demo[1]) if entry[0] == "pickle.find_class"] == []


def test_no_secret_is_in_any_file(watched_demo):
    """Logs, Snakemake's records with the commands and params, metadata, reports."""
    spellings = {spelling.encode() for value in SECRETS.values() for spelling in (value, json.dumps(value)[1:-1])}
    looked_at = set()
    for folder in watched_demo:
        for path in folder.rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                looked_at.add(path.suffix)
                assert not any(spelling in data for spelling in spellings), path
    assert {".log", ".json", ".jsonl", ".html"} <= looked_at


@given(secret=st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=8, max_size=40))
def test_any_secret_is_masked(monkeypatch, secret):
    secret = secret.strip()
    assume(len(secret) >= 8)
    monkeypatch.setenv("SOME_TOKEN", secret)
    for written in (secret, json.dumps(secret), json.dumps(secret, ensure_ascii=False), repr(secret), quote(secret)):
        shown = redact(f"before {written} after")
        assert written.strip("\"'") not in shown and shown.startswith("before ") and shown.endswith(" after")


# --- text that wants to be more ---------------------------------------------------------------------------------------


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.text, self.scripts = set(), "", 0

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.scripts += tag == "script"

    def handle_data(self, data):
        self.text += data


def test_preview_shows_markup_as_text():
    encode.set_chat(str(DEMO), CHATML, {}, False)
    attack = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>{origin}&lt;"
    row = {"id": f"{attack}.jsonl:1", "group": "0", "source": 0, "messages": [user(attack), assistant(attack)]}
    page = Tags()
    examples = preview.examples(encode.encode_batch([row])[0]["sequences"], encode._chat)
    page.feed(render("preview.html", examples=examples, origin=f"file: {attack}"))
    page.feed(render("preview.html", examples=[], origin=""))  # the script that is seen is ours
    assert "img" not in page.seen and page.scripts == 2
    assert page.text.count(attack) == 4  # the template's name, the row's, and both turns


# --- names ------------------------------------------------------------------------------------------------------------

SCHEMA = load_schema(str(ROOT / "config"))


@pytest.mark.parametrize(
    "name", ["..", ".", "../x", "a/b", "/etc", ".hidden", "a\\b", "a b", "$(id)", "a;b", "-rf", "a\n", ""]
)
@pytest.mark.parametrize("section", ["datasets", "runs"])
def test_names_cannot_lead_elsewhere(name, section):
    entry = {"source": "x.jsonl"} if section == "datasets" else {"dataset": "d"}
    config = {"model": {"name": "m"}, "datasets": {"d": {"source": "x.jsonl"}}}
    config[section] = {**config.get(section, {}), name: entry}
    with pytest.raises(ConfigError) as error:
        resolve(config, SCHEMA)
    assert any("not a name" in problem for problem in error.value.problems)


@given(name=st.text(min_size=1), revision=st.none() | st.text(min_size=1))
def test_a_model_has_one_folder(name, revision):
    found = slug(name, revision)
    assert "/" not in found and "\0" not in found and found not in ("", ".", "..")


# --- supply chain -----------------------------------------------------------------------------------------------------


def test_every_package_is_pinned():
    def lines(name: str) -> list[str]:
        rows = (ROOT / "envs" / name).read_text(encoding="utf-8").splitlines()
        return [row.partition("#")[0].strip() for row in rows if row.partition("#")[0].strip()]

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name.partition("[")[0]).lower()

    for constraints, sets in (
        ("constraints.txt", ("workflow.txt", "train.txt", "dev.txt")),
        ("serve-constraints.txt", ("serve.txt",)),
    ):
        pins = {normal(name): version for name, version in (row.split("==") for row in lines(constraints))}
        for name, version in (row.split("==") for file in sets for row in lines(file)):
            assert pins.get(normal(name)) == version, name


def test_certificates_are_checked_by_default():
    assert resolve({"model": {"name": "m"}}, SCHEMA)["network"] == {"tls": "verify"}
    shipped = yaml.safe_load((ROOT / "config" / "config.yaml").read_text())
    assert shipped.get("network", {}).get("tls", "verify") == "verify"
