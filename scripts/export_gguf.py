"""Make a GGUF file of the merged model, or of the adapter, for llama.cpp, Ollama and LM Studio.

    .venv-export/bin/python scripts/export_gguf.py --run demo --format gguf-q8_0 --base config/demo/base \\
        --adapter results/demo/adapter --merged results/demo/merged --merge results/demo/merge.json \\
        --template results/demo/tokens/chat_template.jinja --report results/demo/tokens/report.json \\
        --model results/demo/exports/gguf-q8_0/model --made results/demo/exports/gguf-q8_0/made.json

After merge; before evaluate_export, which measures it. It runs in the environment of the exports (make export-env).

llama.cpp's own converter writes the file. Then its header is held against the run: name, stop tokens, padding, template,
context, and that no BOS is added to what the template writes. What the converter has written otherwise is put right, and told;
what cannot be put right ends the stage. Beside the file is a Modelfile for Ollama. An adapter has the base beside it, in BF16.
"""

import os
import shutil
from pathlib import Path

from moult.errors import MoultError, some
from moult.exporting.adapter import same_adapter
from moult.exporting.calibration import calibration_rows
from moult.exporting.gguf import (
    LlamaCpp,
    check_imatrix_programs,
    find_llama_cpp,
    gguf_name,
    importance_matrix,
    put_right,
    run_converter,
    run_quantizer,
)
from moult.exporting.header import Expected, Header, check_header, ends_generation
from moult.exporting.ollama import template_check, write_modelfile
from moult.exporting.pretokenizer import name_of
from moult.exporting.quantize import FTYPES
from moult.files import atomic_folder, check_space, read_json, sha256_folder, write_json
from moult.model.device import versions
from moult.model.manifest import open_model
from moult.model.safetensors import weight_files
from moult.model.tokenizer import load_tokenizer
from moult.run.cli import stage_parser
from moult.run.stage import stage
from moult.workflow.exports import ADAPTER, BASE_FILE, FORMATS, GGUF, gguf_file

PACKAGES = ("cyllama", "torch", "transformers")

# Where config.json has the longest sequence, in the order in which the converter looks.
CONTEXT = ("max_position_embeddings", "n_ctx", "n_positions", "max_length", "max_sequence_length", "model_max_length")


def main() -> None:
    parser = stage_parser(__doc__, "export_gguf", optional=True, threads="CPU threads")
    parser.add_argument("--run", required=True, help="name of the run: the file and the model get it")
    parser.add_argument("--format", required=True, choices=GGUF, help="what to make")
    parser.add_argument("--base", required=True, help="manifest or folder of the base model")
    parser.add_argument("--adapter", required=True, help="adapter folder")
    parser.add_argument("--merged", required=True, help="folder of the merged model")
    parser.add_argument("--merge", required=True, help="merge.json: the hashes of both")
    parser.add_argument("--template", required=True, help="chat template that the run was trained with")
    parser.add_argument("--report", required=True, help="report.json of encode: stop tokens, padding")
    parser.add_argument("--train", nargs="*", default=[], help="train.parquet, for an importance matrix")
    parser.add_argument("--model", required=True, help="folder to write")
    parser.add_argument("--made", required=True, help="small JSON beside it to write: hashes, sizes, tensors")
    args = parser.parse_args()

    with stage("export_gguf", args.log_file, args.settings) as log:
        export(args.settings, args, log)


def export(settings: dict, args, log) -> None:
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # the converter computes with torch
    llama = find_llama_cpp(settings.get("llama_cpp"))
    if needs_matrix(settings, args.format):
        check_imatrix_programs(llama)
    source = open_model(args.base)[0] if args.format == ADAPTER else Path(args.merged)
    report, merge = read_json(args.report), read_json(args.merge)
    expected = expected_of(args, source, report)
    # The converter's file, what is quantized of it, and a copy where its header is put right.
    check_space(args.model, 2 * sum(path.stat().st_size for path in weight_files(source)))
    calibration = None
    with atomic_folder(args.model) as folder:
        work = folder / "work"
        work.mkdir()
        if args.format == ADAPTER:
            main_file, header, base = export_adapter(llama, args, source, expected, folder, log)
        else:
            main_file, header, calibration = export_model(settings, llama, args, source, expected, folder, work, log)
            base = None
        shutil.rmtree(work)
        tell_towers(read_json(source / "config.json"), log)
        vocabulary = base or header
        tell_stops(vocabulary, expected, log)
        ollama = write_for_ollama(folder, main_file, vocabulary, expected, report, args.format, log)
        files = sha256_folder(folder)
        # The base beside an adapter is there to serve it, and is not uploaded.
        size = sum(path.stat().st_size for path in folder.iterdir() if path.name != BASE_FILE)
    shown = FORMATS[args.format].shown
    fallback = header.fallback(shown)
    if fallback:
        log.warning(
            "%d of %d tensors are not %s: its blocks do not fit their rows, so they have a larger type",
            fallback,
            len(header.tensors),
            shown,
        )
    made = {
        "schema_version": 1,
        "run": args.run,
        "format": args.format,
        "engine": FORMATS[args.format].engine,
        "files": files,
        "bytes": size,
        "made_from": merge["adapter"] if args.format == ADAPTER else merge["files"],
        "tensors": header.types(),
        "fallback": fallback,
        "calibration": calibration,
        "ollama": ollama,
        "versions": {**versions(PACKAGES), "llama.cpp": llama.version},
    }
    write_json(args.made, made)
    log.info("%s: %s bytes", args.model, f"{size:,}")


def needs_matrix(settings: dict, format: str) -> bool:
    """Only K-quants weigh what they round."""
    return bool(settings.get("imatrix")) and FORMATS[format].shown in FTYPES


def expected_of(args, source: Path, report: dict) -> Expected:
    config = read_json(source / "config.json")
    config = config | (config.get("text_config") or {})
    tokenizer = source / "tokenizer.json"
    stop = report["stop"]
    others = [id for id in stop["generation_stop_ids"] if id not in stop["token_ids"]]
    return Expected(
        name=gguf_name(args.run, read_json(tokenizer) if tokenizer.exists() else {}),
        template=Path(args.template).read_text(encoding="utf-8"),
        stops=[*(id for id in stop["token_ids"] if id in stop["generation_stop_ids"]), *others],
        padding=report.get("pad_token_id"),
        context=next((config[key] for key in CONTEXT if key in config), None),
    )


# --- the files --------------------------------------------------------------------------------------------------------


def export_model(
    settings: dict, llama: LlamaCpp, args, source: Path, expected: Expected, folder: Path, work: Path, log
) -> tuple[str, Header, dict | None]:
    """(name of the file, its header, what it was calibrated on)."""
    shown = FORMATS[args.format].shown
    name = gguf_file(args.run, args.format)
    if shown not in FTYPES:
        return name, convert_model(llama, source, folder / name, shown.lower(), expected, log), None
    whole = work / "BF16.gguf"
    convert_model(llama, source, whole, "bf16", expected, log)
    matrix, calibration = None, None
    if needs_matrix(settings, args.format):
        matrix, calibration = calibrate(settings, llama, args, source, whole)
        log.info("importance matrix of %d training rows (%s tokens)", calibration["rows"], f"{calibration['tokens']:,}")
    run_quantizer(llama, whole, folder / name, shown, args.threads, matrix)
    return name, check_header(folder / name, expected), calibration


def export_adapter(
    llama: LlamaCpp, args, base: Path, expected: Expected, folder: Path, log
) -> tuple[str, Header, Header]:
    """(name of the file, its header, the header of the base's): the adapter, and the base that it is for."""
    name = gguf_file(args.run, args.format)
    header = convert_model(llama, base, folder / BASE_FILE, "bf16", expected, log)
    options = ["--base", str(base), "--outfile", str(folder / name), "--outtype", "f32"]
    run_converter(llama, ["convert_lora_to_gguf.py", args.adapter, *options], "", "converting the adapter")
    return name, same_adapter(llama, folder / name, header, Path(args.adapter)), header


def convert_model(llama: LlamaCpp, source: Path, target: Path, outtype: str, expected: Expected, log) -> Header:
    """Write a model folder as GGUF, in the converter's `outtype`, and put its header right."""
    tokenizer: str | MoultError
    try:
        tokenizer = name_of(read_json(source / "tokenizer.json"))
    except MoultError as error:
        tokenizer = error
    options = ["--outfile", str(target), "--outtype", outtype, "--model-name", expected.name]
    arguments = ["convert_hf_to_gguf.py", str(source), *options]
    if run_converter(llama, arguments, tokenizer, f"converting to {outtype}"):
        log.info("the converter does not know the tokenizer; by its structure it is llama.cpp's %s", tokenizer)
    header = put_right(llama, target, expected)
    log.debug("%s: tokenizer %s (%s)", target.name, header.fields.get("tokenizer.ggml.pre"), llama.version)
    return header


def calibrate(settings: dict, llama: LlamaCpp, args, source: Path, model: Path) -> tuple[Path, dict]:
    """The importance matrix of the model on training rows, and {"rows", "tokens"} of these."""
    tokenizer = load_tokenizer(str(source), settings.get("trust_remote_code", False))
    rows = calibration_rows(Path(args.train[0]), settings["calibration_rows"])
    text = model.with_name("calibration.txt")
    text.write_text("\n".join(tokenizer.decode(row) for row in rows), encoding="utf-8")
    tokens = sum(map(len, rows))
    return importance_matrix(llama, model, text, tokens, args.threads), {"rows": len(rows), "tokens": tokens}


# --- beside them ------------------------------------------------------------------------------------------------------


def tell_towers(config: dict, log) -> None:
    towers = [name.removesuffix("_config") for name in ("vision_config", "audio_config") if config.get(name)]
    if towers:
        log.warning("the file has the model's text part only: not what it has for %s (mmproj)", " and ".join(towers))


def tell_stops(header: Header, expected: Expected, log) -> None:
    """llama.cpp stops at some tokens by their text. The run may go on there."""
    tokens = header.fields["tokenizer.ggml.tokens"]
    if more := sorted(ends_generation(header.fields) - set(expected.stops)):
        log.info("llama.cpp stops at %s too, by the text", some(tokens[id] for id in more))


def write_for_ollama(
    folder: Path, main_file: str, header: Header, expected: Expected, report: dict, format: str, log
) -> dict:
    """Write the Modelfile. Returns what `template_check` says."""
    model, adapter = (BASE_FILE, main_file) if format == ADAPTER else (main_file, None)
    stops = [header.fields["tokenizer.ggml.tokens"][id] for id in expected.stops]
    write_modelfile(folder, model, adapter, stops, expected.context, report["max_length"])
    found = template_check(expected.template)
    if not found["kept"]:
        log.warning(
            "`ollama create` may replace the chat template: it is near to its own %s. After `ollama create`, compare: python "
            "scripts/smoke_test.py --run %s --base-url http://127.0.0.1:11434, or serve the file with llama.cpp",
            found["nearest"],
            expected.name,
        )
    return found


if __name__ == "__main__":
    main()
