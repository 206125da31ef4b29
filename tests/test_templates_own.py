"""The templates that a model has of its own: wherever they stand, one or several, they are the ones that transformers takes."""

import json
from pathlib import Path

import pytest
from merging import make_plan, run_merge
from planning import LORA
from publish import files_of, is_loaded
from tiny import make_adapter, make_model
from tokenizers_for_tests import (
    ASKED,
    CHATML,
    PLAIN,
    SHIPPED,
    TOOLS,
    assistant,
    call,
    decode,
    make_tokenizer,
    server_ids,
    turns,
    user,
)

from moult.data.labels import sequences_of
from moult.errors import MoultError
from moult.files import canonical, read_json, sha256_text, write_json
from moult.model.chat import Chat, Unrenderable, choose_template, template_sha256
from moult.model.export import copy_tokenizer
from moult.model.tokenizer import load_tokenizer
from moult.serving.launch import adapter_arguments

TOOL_USE = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + PLAIN.replace(
    "m.content +", "m.content + (m.tool_calls | default([]) | map(attribute='function') | list | tojson) +"
)
SEVERAL = {"default": PLAIN, "tool_use": TOOL_USE}
LOOK = [user("Where are my keys?"), assistant("", tool_calls=[call("look_up", what="keys")])]


def in_config(folder: Path, templates: dict) -> Path:
    """As transformers 4 wrote several templates: a list in tokenizer_config.json."""
    config = read_json(folder / "tokenizer_config.json")
    listed = [{"name": name, "template": text} for name, text in templates.items()]
    write_json(folder / "tokenizer_config.json", {**config, "chat_template": listed})
    return folder


def in_files(folder: Path, templates: dict) -> Path:
    """As transformers 5 writes them: chat_template.jinja, and the others in additional_chat_templates/."""
    (folder / "additional_chat_templates").mkdir()
    for name, text in templates.items():
        path = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        (folder / path).write_text(text)
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    return make_tokenizer(tmp_path / "base")


def trained_text(chat: Chat, messages: list[dict], tools: list[dict] | None) -> str:
    [sequence] = sequences_of(chat, {"messages": messages, **({"tools": tools} if tools else {})})
    turns(chat, messages, tools, [sequence])
    return decode(chat, sequence.input_ids)


# --- named templates --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("put", [in_config, in_files])
def test_rows_with_tools_are_shown_by_tool_use_and_others_by_the_default(put, base):
    template, origin = choose_template(str(put(base, SEVERAL)), None, SHIPPED)
    assert (template, origin) == (SEVERAL, "the model's own")
    chat = Chat(str(base), template)
    theirs = load_tokenizer(str(base))  # which chooses by itself
    for messages, tools in ((ASKED, None), (ASKED, TOOLS), (LOOK, TOOLS)):
        text = trained_text(chat, messages, tools)
        assert text == theirs.apply_chat_template(messages, tools=tools, tokenize=False).removesuffix("\n")
        assert ('"look_up"' in text) == bool(tools)


def test_a_tool_template_that_leaves_out_the_tools_is_refused(base):
    template, _ = choose_template(str(in_files(base, {"default": PLAIN, "tool_use": PLAIN + " "})), None, SHIPPED)
    with pytest.raises(Unrenderable, match="the template leaves out the tools"):
        sequences_of(Chat(str(base), template), {"messages": ASKED, "tools": TOOLS})


def test_several_templates_have_a_hash_together():
    """One alone is hashed as its text, as before."""
    assert template_sha256(PLAIN) == sha256_text(PLAIN) and template_sha256(None) == sha256_text("")
    assert template_sha256(SEVERAL) == sha256_text(canonical(SEVERAL))
    assert template_sha256({**SEVERAL, "tool_use": TOOL_USE + " "}) != template_sha256(SEVERAL)


def test_one_of_the_models_own_can_be_named(base):
    in_config(base, SEVERAL)
    assert choose_template(str(base), "tool_use", SHIPPED) == (TOOL_USE, "the model's own: tool_use")
    assert choose_template(str(base), "chatml", SHIPPED) == (CHATML, "shipped: chatml")
    with pytest.raises(MoultError, match="rag: no such file") as error:
        choose_template(str(base), "rag", SHIPPED)
    assert error.value.fix.endswith("one of the model's own: default, tool_use")


def test_several_templates_without_a_default_are_no_choice(base):
    in_config(base, {"rag": PLAIN, "tool_use": TOOL_USE})
    with pytest.raises(MoultError, match="chat templates named rag, tool_use, and none is the default") as error:
        choose_template(str(base), None, SHIPPED)
    assert "model.chat_template" in error.value.fix


def test_a_syntax_error_in_a_named_template_is_told_with_its_name(base):
    in_files(base, {"default": PLAIN, "tool_use": "{% if %}"})
    with pytest.raises(MoultError, match=r"chat template \(the model's own: tool_use\), line 1: "):
        choose_template(str(base), None, SHIPPED)


def test_a_template_s_name_cannot_lead_out_of_the_folder(base):
    in_config(base, {"default": PLAIN, "../../tool_use": TOOL_USE})
    with pytest.raises(MoultError, match=r"'\.\./\.\./tool_use' is not a text with a plain name"):
        choose_template(str(base), None, SHIPPED)


# --- other files ------------------------------------------------------------------------------------------------------


def test_the_template_of_a_processor_is_read_where_there_is_no_other(base):
    write_json(base / "chat_template.json", {"chat_template": PLAIN})
    assert choose_template(str(base), None, SHIPPED)[0] == PLAIN
    in_files(base, {"default": CHATML})
    assert choose_template(str(base), None, SHIPPED)[0] == CHATML


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"chat_template": ["x"]}'])
def test_a_broken_template_of_a_processor_is_told(text, base):
    (base / "chat_template.json").write_text(text)
    with pytest.raises(MoultError, match=r"chat_template\.json: not of the form|'default' is not a text"):
        choose_template(str(base), None, SHIPPED)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
def test_a_byte_order_mark_is_no_part_of_a_template(encoding, base, tmp_path):
    """Windows PowerShell 5: `Set-Content -Encoding utf8` and `>`."""
    text = PLAIN.replace("{% for", "{# ö #}\n{% for", 1)
    written = ("\ufeff" + text if encoding == "utf-16-be" else text).replace("\n", "\r\n")
    (tmp_path / "mine.jinja").write_bytes(written.encode(encoding))
    template, _ = choose_template(str(base), str(tmp_path / "mine.jinja"), SHIPPED)
    assert template == text
    assert trained_text(Chat(str(base), template), ASKED, None).startswith("<|im_start|>")


def test_a_byte_order_mark_in_the_models_own_files(base):
    in_files(base, {name: "\ufeff" + text for name, text in SEVERAL.items()})
    assert choose_template(str(base), None, SHIPPED)[0] == SEVERAL
    (base / "chat_template.jinja").unlink()
    (base / "chat_template.json").write_bytes(json.dumps({"chat_template": CHATML}).encode("utf-8-sig"))
    assert choose_template(str(base), None, SHIPPED)[0] == {**SEVERAL, "default": CHATML}


def test_a_template_in_another_encoding_is_told(base, tmp_path):
    (tmp_path / "mine.jinja").write_bytes("{# ö #}".encode("latin-1"))
    with pytest.raises(MoultError, match=r"mine\.jinja: not UTF-8 \(byte 3\)"):
        choose_template(str(base), str(tmp_path / "mine.jinja"), SHIPPED)


# --- where they go ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("put", [in_config, in_files])
def test_named_templates_go_with_the_tokenizer(put, base, tmp_path):
    """And transformers finds them there, whatever tokenizer_config.json says."""
    (tmp_path / "out").mkdir()
    copy_tokenizer(put(base, {"default": "old", "tool_use": "old"}), tmp_path / "out", PLAIN, {"tool_use": TOOL_USE})
    assert load_tokenizer(str(tmp_path / "out")).chat_template == SEVERAL
    assert choose_template(str(tmp_path / "out"), None, "")[0] == SEVERAL
    assert (base / "tokenizer_config.json").read_bytes() == (tmp_path / "out/tokenizer_config.json").read_bytes()


def test_a_named_template_for_all_is_alone(base, tmp_path):
    """model.chat_template names one: the base's others are not those of the tuned model."""
    (tmp_path / "out").mkdir()
    copy_tokenizer(in_config(base, SEVERAL), tmp_path / "out", CHATML, {})
    assert load_tokenizer(str(tmp_path / "out")).chat_template == CHATML


def test_a_merged_model_has_the_templates_of_its_training(tmp_path):
    """The processor's old chat_template.json, which processors would take instead, stays behind."""
    base = make_model(tmp_path / "base")
    make_tokenizer(tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((tmp_path / "tokenizer" / name).read_bytes())
    write_json(base / "chat_template.json", {"chat_template": "old"})
    adapter = make_adapter(base, tmp_path / "adapter", LORA)
    make_plan(base, tmp_path, LORA)
    report = read_json(tmp_path / "tokens/report.json")
    report["template"] = {"sha256": template_sha256(SEVERAL), "named": {"tool_use": TOOL_USE}}
    write_json(tmp_path / "tokens/report.json", report)
    (tmp_path / "tokens/chat_template.jinja").write_text(PLAIN)
    merged, _ = run_merge(base, adapter, tmp_path)
    assert load_tokenizer(str(merged)).chat_template == SEVERAL
    assert not (merged / "chat_template.json").exists()
    summary = read_json(tmp_path / "merge.json")
    assert summary["template_sha256"] == template_sha256(SEVERAL)
    assert summary["files"]["additional_chat_templates/tool_use.jinja"] == sha256_text(TOOL_USE)
    # What is published is what was merged, and what a former model has left there of such templates is not loaded with it.
    assert set(files_of(merged, summary["files"])) == {*summary["files"], "metadata.json"}
    assert is_loaded("additional_chat_templates/rag.jinja") and not is_loaded("gguf/model.gguf")


def test_vllm_is_not_told_of_one_template_where_there_are_two(tmp_path):
    """Told of a template, it takes that with tools, too; the base, which it loads, has both."""
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    assert adapter_arguments(str(tmp_path), "x") == ["--chat-template", "x/chat_template.jinja"]
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text(TOOL_USE)
    assert adapter_arguments(str(tmp_path), "x") == []


def test_prompts_of_the_evaluation_are_shown_by_the_default(base):
    chat = Chat(str(in_files(base, SEVERAL)), SEVERAL)
    assert chat.prompt_ids(ASKED[:1]) == server_ids(Chat(str(base), PLAIN), ASKED[:1], None)
