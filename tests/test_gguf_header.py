"""The header of a GGUF file is held against the run; names by which llama.cpp and Ollama know things are not guessed."""

import dataclasses

import pytest
from exporting import ROOT
from gguf_files import BYTES, FIELDS, GPT_2, TEMPLATE, TOKENS, split, steps_of, tokenizer_json, write_gguf
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_for_tests import CHATML, DEMO

from moult.errors import MoultError
from moult.exporting.gguf import gguf_name
from moult.exporting.header import Expected, check_header, ends_generation, problems, read_header
from moult.exporting.ollama import least_distance, template_check, write_modelfile
from moult.exporting.pretokenizer import NAMES, name_of
from moult.files import read_json

EXPECTED = Expected(name="mine", template=TEMPLATE, stops=[2], padding=0, context=512)


def header(tmp_path, changes=None, **more):
    return read_header(write_gguf(tmp_path / "file.gguf", changes, **more))


# --- the header -------------------------------------------------------------------------------------------------------


def test_a_header_is_read_as_it_was_written(tmp_path):
    found = header(tmp_path, {"a.number": 1.5, "a.switch": True, "a.list": [1, -2]})
    assert found.fields == {**FIELDS, "a.number": 1.5, "a.switch": True, "a.list": [1, -2]}
    assert found.tensors["token_embd.weight"][:2] == ("Q8_0", (8, 32))
    first, second = (tensor.begin for tensor in found.tensors.values())
    assert first % 32 == 0 and second - first == 4096
    assert found.types() == {"Q8_0": 1, "F32": 1}


@pytest.mark.parametrize("size", [0, 10, 200, 500])
def test_half_a_file_is_refused(tmp_path, size):
    path = write_gguf(tmp_path / "file.gguf")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(MoultError, match="not a whole GGUF file"):
        read_header(path)


def test_the_file_of_the_run_passes(tmp_path):
    assert problems(header(tmp_path), EXPECTED) == []


GATES = {
    "name": ({"general.name": "Merged"}, {"general.name": "mine"}),
    "eos": ({"tokenizer.ggml.eos_token_id": 5}, {"tokenizer.ggml.eos_token_id": 2}),
    "padding": ({"tokenizer.ggml.padding_token_id": 2}, {"tokenizer.ggml.padding_token_id": 0}),
    "template": ({"tokenizer.chat_template": TEMPLATE + " "}, {"tokenizer.chat_template": TEMPLATE}),
    "bos": ({"tokenizer.ggml.add_bos_token": True}, {"tokenizer.ggml.add_bos_token": False}),
    "bos by the tokenizer": ({"tokenizer.ggml.pre": "llama-bpe"}, {"tokenizer.ggml.add_bos_token": False}),
    "added_eos": ({"tokenizer.ggml.add_eos_token": True}, {"tokenizer.ggml.add_eos_token": False}),
    "context": ({"llama.context_length": 2048}, {}),
    "tokens": ({"tokenizer.ggml.tokens": TOKENS[:-1]}, {}),
}


@pytest.mark.parametrize("case", GATES)
def test_each_gate_sees_what_is_not_the_run(tmp_path, case):
    changes, right = GATES[case]
    [problem] = problems(header(tmp_path, changes), EXPECTED)
    assert (problem.gate, problem.change) == (case.split()[0], right)
    with pytest.raises(MoultError, match="not the model that was measured"):
        check_header(tmp_path / "file.gguf", EXPECTED)
    if right:
        assert problems(header(tmp_path, {**changes, **right}), EXPECTED) == []


def test_a_missing_template_is_put_in(tmp_path):
    [problem] = problems(header(tmp_path, {"tokenizer.chat_template": None}), EXPECTED)
    assert problem.change == {"tokenizer.chat_template": TEMPLATE}


def test_a_run_on_plain_text_keeps_the_bos_of_its_tokenizer(tmp_path):
    plain = dataclasses.replace(EXPECTED, template="")
    assert (
        problems(header(tmp_path, {"tokenizer.chat_template": None, "tokenizer.ggml.add_bos_token": True}), plain) == []
    )


def test_every_stop_token_ends_generation(tmp_path):
    """llama.cpp has keys for three of them: EOS, EOT, EOM."""
    stops = dataclasses.replace(EXPECTED, stops=[2, 5, 6])
    found = problems(header(tmp_path), stops)
    changes = {key: value for problem in found for key, value in problem.change.items()}
    assert {problem.gate for problem in found} == {"stops"}
    assert changes == {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 6}
    fixed = header(tmp_path, changes)
    assert problems(fixed, stops) == []
    assert ends_generation(fixed.fields) == {2, 5, 6}
    [left] = problems(fixed, dataclasses.replace(EXPECTED, stops=[2, 5, 6, 7]))
    assert left.gate == "stops" and not left.change


@pytest.mark.parametrize(
    "tokens, ends",
    [
        (["a", "<|endoftext|>", "</s>"], {1, 2}),
        (["a", "<|end|>", "<|return|>", "<|call|>"], {2, 3}),  # gpt-oss goes on behind <|end|>
        (["a", "<|end|>", "<|return|>"], {1, 2}),
        (["a", "</s>", "<|tool_response>"], {2}),  # gemma 4
        (["a", "<|fim_pad|>", "<|file_sep|>"], {1, 2}),
    ],
)
def test_the_texts_at_which_llama_cpp_stops(tokens, ends):
    assert ends_generation({"tokenizer.ggml.tokens": tokens}) == ends


def test_tensors_whose_rows_do_not_fit_are_counted(tmp_path):
    kinds = {
        "token_embd.weight": (14, (8, 256)),
        "a": (6, (4, 384)),
        "b": (8, (4, 128)),
        "norm": (0, (128,)),
        "c": (12, (4, 512)),
    }
    found = header(tmp_path, tensors=kinds)
    assert found.fallback("Q4_K_M") == 2
    assert found.fallback("BF16") == 0
    assert found.types() == {"Q6_K": 1, "Q5_0": 1, "Q8_0": 1, "F32": 1, "Q4_K": 1}


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", NAMES, ids=NAMES.values())
def test_a_tokenizer_is_known_by_its_structure(structure):
    steps, whole = structure
    found = steps_of(steps)
    assert name_of(tokenizer_json(*found, ignore_merges=whole)) == NAMES[structure]
    assert name_of(tokenizer_json(*found, ignore_merges=whole, normalizer={"type": "NFC"})) == NAMES[structure]


def test_the_demo_is_smollm():
    assert name_of(read_json(DEMO / "tokenizer.json")) == "smollm"


@pytest.mark.parametrize(
    "tokenizer, what",
    [
        (tokenizer_json(split(r"\w+"), BYTES), r"\\w\+ \+ bytes"),
        (tokenizer_json(split(r"\w+", "Removed"), BYTES), "Removed"),
        (tokenizer_json({**GPT_2, "add_prefix_space": True}), "add_prefix_space"),
        (tokenizer_json({"type": "Digits", "individual_digits": False}, GPT_2), "individual_digits"),
        (tokenizer_json(GPT_2, ignore_merges=True), "with ignore_merges"),
        (tokenizer_json(GPT_2, normalizer={"type": "Lowercase"}), "normalizer"),
        (tokenizer_json(GPT_2, byte_fallback=True), "byte_fallback"),
        (tokenizer_json(GPT_2, type="Unigram"), "Unigram"),
        ({**tokenizer_json(GPT_2), "decoder": None}, "decoder"),
        ({**tokenizer_json(GPT_2), "pre_tokenizer": None}, "null"),
    ],
)
def test_what_llama_cpp_does_not_have_is_not_guessed(tokenizer, what):
    with pytest.raises(MoultError, match=what) as error:
        name_of(tokenizer)
    assert "export.llama_cpp" in error.value.fix


def test_the_name_of_a_run_does_not_make_it_a_phi_3():
    """llama.cpp reads how special tokens treat the space behind them from general.name."""
    phi = {"added_tokens": [{"content": "</s>", "rstrip": True}]}
    other = {"added_tokens": [{"content": "</s>", "rstrip": False}]}
    assert gguf_name("demo", other) == gguf_name("demo", {}) == "demo"
    assert gguf_name("demo", phi) == "demo (phi-3)"
    assert gguf_name("my-Phi3", phi) == "my-Phi3"
    with pytest.raises(MoultError, match="would take its tokenizer for that of Phi-3"):
        gguf_name("phi-3-and-more", other)


# --- Ollama -----------------------------------------------------------------------------------------------------------


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for number, left in enumerate(a, 1):
        above, row = row, [number]
        for place, right in enumerate(b, 1):
            row.append(min(above[place] + 1, row[-1] + 1, above[place - 1] + (left != right)))
    return row[-1]


TEXTS = st.text(alphabet="ab{%", max_size=12)


@given(TEXTS.filter(bool), TEXTS, st.integers(1, 5))
def test_the_bound_is_a_lower_bound(a, b, size):
    pieces = ["".join(sorted(a[begin : begin + size])) for begin in range(0, len(a), size)]
    distance = levenshtein(a, b)
    assert least_distance(pieces, b, 100) <= distance
    assert least_distance(pieces, a, 100) == 0
    assert least_distance(pieces, b, 2) <= min(distance, 2)
    if size == 1:  # then the text is known
        assert least_distance(pieces, b, 100) == distance


def test_no_text_of_ollamas_templates_is_shipped():
    known = read_json(ROOT / "scripts" / "moult" / "exporting" / "ollama_templates.json")
    assert known["commit"] in known["source"] and len(known["templates"]) == 37
    for one in known["templates"]:
        assert set(one) == {"name", "pieces"}
        assert all(len(piece) == 64 for piece in one["pieces"][:-1])
        assert all(list(piece) == sorted(piece) for piece in one["pieces"])


def test_the_template_of_moult_stays_in_ollama():
    own = (DEMO / "chat_template.jinja").read_text(encoding="utf-8")
    for template in (CHATML, own):
        assert template_check(template)["kept"] and template_check(template)["distance_at_least"] == 100
    assert template_check("")["kept"]  # without one, Ollama asks nothing


@pytest.mark.parametrize(
    "file, kept",
    [
        ("meta-llama-Llama-3.1-8B-Instruct", None),  # Ollama replaces it
        ("google-gemma-2-2b-it", None),  # this too
        ("zephyr", True),
        ("llama-2-chat", True),
        ("Qwen-Qwen3-0.6B", True),
        ("mistralai-Mistral-Nemo-Instruct-2407", True),
    ],
)
def test_what_ollama_would_replace_is_told(shared, file, kept):
    template = (shared / "chat_templates" / f"{file}.jinja").read_text(encoding="utf-8")
    assert template_check(template)["kept"] is kept


def test_the_modelfile(tmp_path):
    write_modelfile(tmp_path, "mine-Q8_0.gguf", None, ["<|im_end|>", 'say "stop"'], context=32768, longest=6000)
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines == [
        "FROM ./mine-Q8_0.gguf",
        "PARAMETER num_ctx 6000",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        'PARAMETER stop "<|im_end|>"',
        'PARAMETER stop """say "stop""""',
    ]
    write_modelfile(tmp_path, "base-BF16.gguf", "mine-adapter.gguf", ["</s>"], context=512, longest=256)
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[:3] == ["FROM ./base-BF16.gguf", "ADAPTER ./mine-adapter.gguf", "PARAMETER num_ctx 512"]
