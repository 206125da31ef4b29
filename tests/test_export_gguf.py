"""export_gguf: the files that it writes are the model that was measured; what cannot be is refused."""

import json
import subprocess
import time
from pathlib import Path

import pytest
from exporting import ROOT, export_python  # noqa: F401 (a fixture)
from gguf_files import steps_of
from planning import Log
from tiny import change_tensors, make_adapter
from tokenizers_for_tests import CHATML, DEMO, make_tokenizer

import export_gguf
from moult.errors import MoultError
from moult.exporting.adapter import alpha_of, check_plain
from moult.exporting.calibration import calibration_rows
from moult.exporting.gguf import check_imatrix_programs, find_llama_cpp
from moult.exporting.header import Expected, check_header, ends_generation, read_header
from moult.exporting.pretokenizer import NAMES
from moult.files import read_json

# --- llama.cpp of the user --------------------------------------------------------------------------------------------


def make_llama_cpp(folder: Path, *programs: str) -> Path:
    parts = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion/base.py", "gguf-py/gguf/__init__.py")
    for part in (*parts, *programs):
        (folder / part).parent.mkdir(parents=True, exist_ok=True)
        (folder / part).write_text("")
    (folder / "gguf-py" / "pyproject.toml").write_text('version = "0.19.0"\n')
    return folder


def test_a_folder_of_llama_cpp_is_looked_at(tmp_path):
    folder = make_llama_cpp(tmp_path / "whole", "build/bin/llama-quantize")
    found = find_llama_cpp(str(folder))
    assert found.version == "gguf-py 0.19.0"
    assert found.program("llama-quantize") == str(folder / "build" / "bin" / "llama-quantize")
    (folder / "conversion" / "base.py").unlink()
    with pytest.raises(MoultError, match=r"export.llama_cpp: .* has no conversion/base.py"):
        find_llama_cpp(str(folder))


def test_an_importance_matrix_needs_two_programs(tmp_path):
    folder = make_llama_cpp(tmp_path, "bin/llama-quantize")
    with pytest.raises(MoultError, match=r"export\.imatrix needs llama-imatrix, and") as error:
        check_imatrix_programs(find_llama_cpp(str(folder)))
    assert "export.imatrix: false" in error.value.fix
    make_llama_cpp(tmp_path, "bin/llama-imatrix")
    check_imatrix_programs(find_llama_cpp(str(folder)))


# --- the adapter ------------------------------------------------------------------------------------------------------


def test_the_scale_of_an_adapter_is_that_of_peft():
    config = {"r": 8, "lora_alpha": 16, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    assert alpha_of(config, {"layers.0.q": 8, "layers.1.q": 8}) == 16
    # 16 / sqrt(8) = alpha / 8
    assert alpha_of({**config, "use_rslora": True}, {"layers.0.q": 8}) == pytest.approx(16 * 8**0.5, abs=1e-5)
    # A rank of 4 with the same alpha is one alpha too; another alpha is not.
    assert alpha_of({**config, "rank_pattern": {"0.q": 4}}, {"layers.0.q": 4, "layers.1.q": 8}) == 16
    with pytest.raises(MoultError, match="different scales"):
        alpha_of({**config, "alpha_pattern": {"0.q": 32}}, {"layers.0.q": 8, "layers.1.q": 8})


def test_only_plain_lora_can_be_gguf(tmp_path):
    names = [f"base_model.model.layers.0.q.lora_{side}.weight" for side in "AB"]
    check_plain(tmp_path, names)
    with pytest.raises(MoultError, match="lora_magnitude_vector"):
        check_plain(tmp_path, [*names, "base_model.model.layers.0.q.lora_magnitude_vector"])


# --- the stage, in the environment of the exports ---------------------------------------------------------------------

LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}


def make_model(folder: Path, kind: str, width: int) -> Path:
    """A model of random weights in BF16, with the demo's tokenizer; its rows are multiples of `width`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    make_tokenizer(folder, pad="<|pad|>", stops=("<|im_end|>",), template=CHATML)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 3}
    config = AutoConfig.for_model(
        kind, vocab_size=768, head_dim=width // 4, num_key_value_heads=2, max_position_embeddings=512, **sizes, **ids
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def command_of(python: str, work: Path, format: str, model: Path, stops=(2,), **more) -> list[str]:
    """A command line of the stage. `model` stands for the base and for the merged one; `more` are other paths."""
    (work / "chat_template.jinja").write_text(CHATML)
    stop = {"generation_stop_ids": list(stops), "token_ids": [2]}
    (work / "report.json").write_text(json.dumps({"stop": stop, "pad_token_id": 3, "max_length": 256}))
    (work / "merge.json").write_text(json.dumps({"files": {"a": "b"}, "adapter": {"c": "d"}}))
    paths = {
        "base": model,
        "merged": model,
        "adapter": work,
        "merge": work / "merge.json",
        "template": work / "chat_template.jinja",
        "report": work / "report.json",
        "model": work / format / "model",
        "made": work / format / "made.json",
        "log-file": work / "export_gguf.log",
        **more,
    }
    command = [python, str(ROOT / "scripts" / "export_gguf.py"), "--run", "mine", "--format", format, "--threads", "2"]
    return [*command, *(part for name, path in paths.items() for part in (f"--{name}", str(path)))]


@pytest.fixture
def exported(export_python, tmp_path):  # noqa: F811
    """`exported(format, model)` runs the stage. Returns the folder that it wrote, made.json, and what it said."""

    def run(format: str, model: Path, settings: dict | None = None, **more):
        command = [
            *command_of(export_python, tmp_path, format, model, **more),
            "--settings",
            json.dumps(settings or {}),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        out = tmp_path / format
        if done.returncode:
            assert not (out / "model").exists() and not list(out.glob("*.tmp-*"))  # nothing half-written
            raise MoultError(done.stderr)
        return out / "model", read_json(out / "made.json"), done.stderr

    return run


def in_llama_cpp(export_python: str, file: Path, code: str, *arguments: str):  # noqa: F811
    """What `code` prints as JSON, in the environment of the exports; `vocabulary` is that of the file."""
    start = (
        "import json, sys\n"
        "from cyllama.llama.llama_cpp import LlamaModel, LlamaModelParams, disable_logging\n"
        "disable_logging()\n"
        "model = LlamaModel(sys.argv[1], LlamaModelParams(), verbose=False)\n"
        "vocabulary = model.get_vocab()\n"
    )
    command = [export_python, "-c", start + code, str(file), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("format, kind", [("gguf-bf16", "BF16"), ("gguf-q8_0", "Q8_0"), ("gguf-q4_k_m", "Q4_K_M")])
def test_the_demo_is_exported(exported, export_python, format, kind):  # noqa: F811
    model, made, said = exported(format, DEMO)
    file = model / f"mine-{kind}.gguf"
    assert sorted(path.name for path in model.iterdir()) == ["Modelfile", file.name]
    assert set(made["files"]) == {"Modelfile", file.name}
    assert made["bytes"] == sum(path.stat().st_size for path in model.iterdir())
    assert made["made_from"] == {"a": "b"} and made["ollama"]["kept"]
    found = check_header(file, Expected("mine", CHATML, [2], 3, 512))
    assert found.fields["tokenizer.ggml.pre"] == "smollm"
    assert "by its structure it is llama.cpp's smollm" in said
    # Its widths are multiples of 128.
    assert (made["fallback"] > 0) is ("larger type" in said) is (kind == "Q4_K_M")
    assert sum(made["tensors"].values()) == len(found.tensors)
    # Where llama.cpp stops is what the header was read to say.
    ends = in_llama_cpp(
        export_python, file, "print(json.dumps([id for id in range(vocabulary.n_vocab) if vocabulary.is_eog(id)]))"
    )
    assert set(ends) == ends_generation(found.fields) == {0, 2}


@pytest.mark.slow
def test_a_model_of_wide_layers_is_quantized_whole(exported, tmp_path):
    _, made, said = exported("gguf-q4_k_m", make_model(tmp_path / "wide", "qwen3", 256))
    assert made["fallback"] == 0 and "larger type" not in said
    assert set(made["tensors"]) == {"F32", "Q4_K", "Q6_K"}


@pytest.mark.slow
def test_what_the_converter_writes_otherwise_is_put_right(exported, export_python, tmp_path):  # noqa: F811
    """It takes the template in tokenizer_config.json before chat_template.jinja, knows one stop token, and writes that a BOS is
    added."""
    base = make_model(tmp_path / "base", "llama", 64)
    config = read_json(base / "tokenizer_config.json")
    more = {"chat_template": "another", "add_bos_token": True, "bos_token": "<|endoftext|>"}
    (base / "tokenizer_config.json").write_text(json.dumps({**config, **more}))
    model, _, said = exported("gguf-q8_0", base, stops=(2, 1))
    for what in ("the chat template is another", "would add BOS", "would not stop at token 1"):
        assert what in said
    file = model / "mine-Q8_0.gguf"
    found = check_header(file, Expected("mine", CHATML, [2, 1], 3, 512))
    assert found.fields["tokenizer.ggml.eot_token_id"] == 1
    assert in_llama_cpp(export_python, file, "print(json.dumps([vocabulary.is_eog(1), vocabulary.get_add_bos()]))") == [
        True,
        False,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kind, more", [("qwen3", {}), ("llama", {}), ("llama", {"use_rslora": True})])
def test_an_adapter_is_exported(exported, tmp_path, kind, more):
    base = make_model(tmp_path / "base", kind, 64)
    adapter = make_adapter(base, tmp_path / "adapter", {**LORA, **more})
    model, made, _ = exported("adapter-gguf", base, adapter=adapter)
    assert sorted(path.name for path in model.iterdir()) == ["Modelfile", "base-BF16.gguf", "mine-adapter.gguf"]
    found = read_header(model / "mine-adapter.gguf")
    alpha = 16 * 8**0.5 if more else 16
    assert found.fields["adapter.lora.alpha"] == pytest.approx(alpha)
    assert made["tensors"] == {"F32": 2 * 7 * 2} and made["made_from"] == {"c": "d"}
    check_header(model / "base-BF16.gguf", Expected("mine", CHATML, [2], 3, 512))
    assert (model / "Modelfile").read_text().startswith("FROM ./base-BF16.gguf\nADAPTER ./mine-adapter.gguf\n")


@pytest.mark.slow
def test_an_adapter_with_another_number_is_caught(export_python, exported, tmp_path):  # noqa: F811
    base = make_model(tmp_path / "base", "llama", 64)
    adapter = make_adapter(base, tmp_path / "adapter", LORA)
    model, _, _ = exported("adapter-gguf", base, adapter=adapter)

    def change(tensors):
        name = next(name for name in tensors if name.endswith("q_proj.lora_B.weight"))
        tensors[name][3, 2] += 0.01

    change_tensors(adapter, change, "adapter_model.safetensors")
    code = (
        "import sys; sys.path.insert(0, 'scripts')\n"
        "from pathlib import Path\n"
        "from moult.exporting.adapter import same_adapter\n"
        "from moult.exporting.gguf import find_llama_cpp\n"
        "from moult.exporting.header import read_header\n"
        "model = Path(sys.argv[1])\n"
        "base = read_header(model / 'base-BF16.gguf')\n"
        "same_adapter(find_llama_cpp(None), model / 'mine-adapter.gguf', base, Path(sys.argv[2]))\n"
    )
    done = subprocess.run(
        [export_python, "-c", code, str(model), str(adapter)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert "is not model.layers" in done.stderr and "of the adapter" in done.stderr


@pytest.mark.slow
def test_a_tokenizer_of_no_known_structure_is_refused(exported, tmp_path):
    base = make_model(tmp_path / "base", "llama", 64)
    tokenizer = read_json(base / "tokenizer.json")
    tokenizer["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = False
    (base / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(MoultError, match=r"nothing of just its structure: the pre-tokenizer \{'type': 'Digits'"):
        exported("gguf-bf16", base)


@pytest.mark.slow
def test_without_llama_imatrix_the_matrix_is_refused_before_any_work(exported, tmp_path):
    settings = {"imatrix": True, "calibration_rows": 4, "llama_cpp": None}
    with pytest.raises(MoultError, match=r"export\.imatrix needs llama-imatrix and llama-quantize"):
        exported("gguf-q4_k_m", DEMO, settings=settings)
    assert exported("gguf-q8_0", DEMO, settings=settings)[1]["calibration"] is None  # q8_0 weighs nothing


@pytest.mark.slow
def test_the_importance_matrix_is_of_training_rows(exported, export_python, tmp_path):  # noqa: F811
    """With programs that stand for llama.cpp's: they note what they are given."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer

    code = "from moult.exporting.gguf import find_llama_cpp; print(find_llama_cpp(None).folder)"
    source = subprocess.run(
        [export_python, "-c", code], capture_output=True, text=True, cwd=ROOT / "scripts", check=True
    )
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    for part in Path(source.stdout.strip()).iterdir():
        (folder / part.name).symlink_to(part)
    programs = {
        "llama-imatrix": f'echo "$@" > {tmp_path}/imatrix; cp calibration.txt {tmp_path}; echo matrix > imatrix.gguf\n',
        "llama-quantize": f'echo "$@" > {tmp_path}/quantize; cat "$2" > {tmp_path}/matrix; cp "$3" "$4"\n',
    }
    (folder / "bin").mkdir()
    for name, lines in programs.items():
        (folder / "bin" / name).write_text("#!/bin/sh\n" + lines)
        (folder / "bin" / name).chmod(0o755)
    ids = [[1, 20 + row, 2] * 20 for row in range(12)]
    train = tmp_path / "train.parquet"
    pq.write_table(pa.table({"id": [str(row) for row in range(12)], "input_ids": ids}), train)
    settings = {"imatrix": True, "calibration_rows": 4, "llama_cpp": str(folder)}
    with pytest.raises(MoultError, match="the training rows have 60 tokens together"):
        exported("gguf-q4_k_m", DEMO, settings={**settings, "calibration_rows": 1}, train=train)
    _, made, said = exported("gguf-q4_k_m", DEMO, settings=settings, train=train)
    assert made["calibration"] == {"rows": 4, "tokens": 240}
    assert "importance matrix of 4 training rows (240 tokens)" in said
    assert (tmp_path / "matrix").read_text() == "matrix\n"
    given = (tmp_path / "imatrix").read_text().split()
    assert given[2:6] == ["-f", "calibration.txt", "-o", "imatrix.gguf"] and "--parse-special" in given
    assert (tmp_path / "quantize").read_text().split()[:2] == ["--imatrix", "imatrix.gguf"]  # no path of this machine
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    wanted = [tokenizer.decode(row, skip_special_tokens=False) for row in calibration_rows(train, 4)]
    assert (tmp_path / "calibration.txt").read_text() == "\n".join(wanted)


@pytest.mark.slow
def test_an_interrupted_export_leaves_nothing(export_python, tmp_path):  # noqa: F811
    log, command = tmp_path / "export_gguf.log", command_of(export_python, tmp_path, "gguf-bf16", DEMO)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and "llama.cpp: " not in (log.read_text() if log.exists() else ""):
            time.sleep(0.05)
        process.terminate()
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "terminated" in said
    assert list((tmp_path / "gguf-bf16").iterdir()) == []
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in running  # the converter


def test_what_is_not_in_the_file_is_told():
    log = Log()
    export_gguf.tell_towers({"text_config": {}, "vision_config": {"depth": 2}}, log)
    assert "not what it has for vision" in log.lines[0]
    export_gguf.tell_towers({"vocab_size": 768}, silent := Log())
    assert not silent.lines


TEXT = (
    "It's 12345 o'clock, SHE'LL say:\n\n\t  don't! 3.14 x² ½ Ⅷ naïve Ünïcödé\r\n   多个汉字，テスト 한국어 हिन्दी ไทย "
    "עברית <tag attr='1'>{{x}}</tag>   end  \n \n x" + "\u00a0nbsp 🚀👍🏽 …—“q”"
)


@pytest.mark.slow
@pytest.mark.parametrize("structure", NAMES, ids=NAMES.values())
def test_llama_cpp_makes_the_same_tokens(exported, export_python, tmp_path, structure):  # noqa: F811
    """A vocabulary that nobody knows, of each structure that has a name."""
    import random

    from tokenizers import Tokenizer, decoders, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel

    steps, whole = structure
    base = make_model(tmp_path / "base", "llama", 64)
    made = json.loads(Tokenizer(models.BPE(ignore_merges=whole)).to_str())
    made["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps_of(steps)}
    tokenizer = Tokenizer.from_str(json.dumps(made))
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, initial_alphabet=ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT] * 4 + [(ROOT / "README.md").read_text()], trainer)
    saved = json.loads(tokenizer.to_str())
    (base / "tokenizer.json").write_text(json.dumps(saved))
    model, _, said = exported("gguf-bf16", base)
    assert f"it is llama.cpp's {NAMES[structure]}" in said
    shuffled = random.Random(0)
    texts = [TEXT, *("".join(shuffled.sample(TEXT, len(TEXT))) for _ in range(50))]
    code = "print(json.dumps([vocabulary.tokenize(text, False, True) for text in json.loads(sys.argv[2])]))"
    found = in_llama_cpp(export_python, model / "mine-BF16.gguf", code, json.dumps(texts))
    assert found == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
