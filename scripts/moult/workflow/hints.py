"""What was probably meant: the keys of other tools, names that are nearly right, lists that are written as text."""

import difflib
import re

from moult.errors import some

_SECTIONS = ("model", "dataset", "lora", "train", "eval", "serve")

# What other tools, and people, call a key: axolotl, LLaMA-Factory, Unsloth, transformers' scripts, mistral-finetune.
ALIASES = {
    "model.name": "base_model model_id model_name model_name_or_path model_path pretrained_model pretrained_model_name_or_path",
    "model.dtype": "torch_dtype precision mixed_precision load_dtype",
    "model.attn_implementation": "attention flash_attention flash_attention_2 flash_attn use_flash_attention"
    " use_flash_attention_2",
    "model.chat_template": "template prompt_template",
    "model.quantization": "bits bnb_4bit_quant_type load_in_4bit load_in_8bit qlora quant_method quantization_bit"
    " quantization_config quantize",
    "model.revision": "base_model_revision model_revision",
    "datasets.<name>.source": "path file files data data_files data_path dataset_path dataset_name train_file file_name",
    "datasets.<name>.val_source": "eval_dataset validation_file val_file eval_file",
    "datasets.<name>.test_source": "test_dataset test_file",
    "datasets.<name>.val_size": "val_set_size eval_size validation_size validation_split val_split eval_split"
    " val_share val_fraction val_ratio",
    "datasets.<name>.test_size": "test_set_size test_split test_share test_fraction test_ratio",
    "datasets.<name>.sample_size": "max_samples num_samples max_train_samples",
    "datasets.<name>.subset": "config_name dataset_config dataset_config_name",
    "datasets.<name>.max_length": "cutoff_len cutoff_length sequence_len sequence_length seq_len seq_length max_seq_len max_len"
    " model_max_length block_size context_length max_sequence_length",
    "lora.r": "rank lora_r lora_rank lora_dim",
    "lora.lora_alpha": "alpha",
    "lora.lora_dropout": "dropout",
    "lora.target_modules": "lora_target lora_targets lora_target_modules lora_target_linear target targets",
    "lora.modules_to_save": "additional_target lora_modules_to_save",
    "lora.use_dora": "dora lora_dora lora_use_dora peft_use_dora",
    "lora.use_rslora": "rslora lora_rslora peft_use_rslora",
    "train.num_train_epochs": "epoch epochs num_epochs n_epochs nb_epochs train_epochs max_epochs",
    "train.max_steps": "steps max_train_steps num_steps total_steps train_steps",
    "train.per_device_train_batch_size": "batch batch_size micro_batch_size mini_batch_size train_batch_size"
    " per_device_batch_size per_gpu_train_batch_size train_micro_batch_size_per_gpu device_batch_size",
    "train.gradient_accumulation_steps": "grad_accum grad_accumulation gradient_accumulation accumulation_steps"
    " gradient_accumulation_step grad_acc_steps accumulate_grad_batches",
    "train.learning_rate": "lr max_lr peak_lr",
    "train.lr_scheduler_type": "lr_scheduler scheduler schedule lr_schedule",
    "train.warmup_steps": "warmup num_warmup_steps",
    "train.max_grad_norm": "grad_clip gradient_clipping clip_grad max_norm",
    "train.weight_decay": "wd",
    "train.optim": "optimizer",
    "train.packing": "sample_packing pack",
    "train.gradient_checkpointing": "activation_checkpoint gradient_checkpoint use_gradient_checkpointing",
    "train.neftune_noise_alpha": "neftune neft_alpha noise_alpha",
    "train.gpu": "gpus num_gpus n_gpus n_gpu num_processes nproc_per_node",
    "train.nodes": "num_nodes nnodes num_machines",
    "train.shard": "fully_shard sharded sharding zero_stage",
    "train.early_stopping_patience": "patience early_stopping early_stop early_stopping_steps",
    "train.early_stopping_threshold": "early_stopping_min_delta min_delta early_stopping_delta",
    "train.report_to": "logger log_with",
    "eval.max_new_tokens": "max_tokens max_gen_length",
    "eval.benchmarks": "tasks benchmark lm_eval_tasks",
    "serve.max_model_len": "max_context_len",
    "seed": "random_seed random_state",
    "paths.results": "output_dir output_path results_dir",
}
_MEANT = {alias: key for key, aliases in ALIASES.items() for alias in aliases.split()}


def unknown_key(section: str, key: str, fields: dict, schema: dict) -> str:
    """The problem of a key that a section does not have, with the key that was probably meant.

    Args:
        section: where it stands: "", "train", "runs.v.lora", "datasets.d".
        fields: the section's properties. What a stage must set itself is among them, and never proposed.
        schema: the whole schema.
    """
    problem = f"{section}.{key}: unknown key".lstrip(".")
    known = [name for name, field in fields.items() if "x-refused" not in field]
    if section.endswith(".over"):  # of a sweep: keys of several sections, with the section before them
        own, _, last = key.rpartition(".")
        if any(name.startswith(f"{own}.") for name in known):
            return unknown_key(f"{section}.{own}", last, schema["$defs"][own]["properties"], schema)
        if homes := [name for name in known if name.endswith(f".{key}")]:
            return f"{problem}; did you mean {' or '.join(homes)}?"
    meant = _MEANT.get(key.lower().replace("-", "_"), "")
    name = meant.rpartition(".")[2]
    if name in known:
        return f"{problem}; did you mean {name}?"
    if meant and not {"eval", "serve", "paths", "network"} & set(section.split(".")):
        return f"{problem}; did you mean {meant}{'' if '.' in meant else ', at the top'}?"
    short_for = [name for name in known if "".join(word[:1] for word in name.split("_")) == key]
    close = difflib.get_close_matches(key, known, 1, cutoff=0.6) or short_for
    homes = []
    for name in _SECTIONS:
        field = schema["$defs"][name]["properties"].get(key)
        if field is not None and "x-refused" not in field:
            homes.append({"dataset": "datasets.<name>"}.get(name, name))
    if close and not homes:
        return f"{problem}; did you mean {close[0]}?"
    if homes:
        return f"{problem} here; it belongs in {' or '.join(homes)}"
    return f"{problem}; known here: {some(sorted(known), 12)}"


# --- values -----------------------------------------------------------------------------------------------------------

_NAMES = re.compile(r"[\w.-]+")
# Names of layers and what separates them, also in brackets and quotes. A regular expression would have `*` or the like, and
# `q_proj|v_proj` is the whole name of no layer.
_LISTED = re.compile(r"\[?['\"]?[\w.-]+['\"]?([\s,;|]+['\"]?[\w.-]+['\"]?)*\]?")


def module_problems(lora: dict) -> list[str]:
    """Names of layers that can match none: peft takes a text for one regular expression, which has no commas."""
    problems = []
    for key in ("target_modules", "exclude_modules"):
        given = lora.get(key)
        for text in given if isinstance(given, list) else [given]:
            if not isinstance(text, str):
                continue
            names = _NAMES.findall(text) if _LISTED.fullmatch(text.strip()) else []
            plain = re.sub(r"[\W_]", "", text.lower())
            if key == "target_modules" and text.lower() != "all-linear" and _is_all(plain, isinstance(given, list)):
                problems.append(f"lora.{key}: {text!r} names no layer; did you mean all-linear?")
            elif len(names) > 1 or (names and text.startswith("[")):
                problems.append(f"lora.{key}: {text!r} is one text; make it a list: [{', '.join(names)}]")
    return problems


def _is_all(plain: str, in_a_list: bool) -> bool:
    if in_a_list:  # where it would be the end of a layer's name
        return plain in ("all", "alllinear")
    return plain in ("all", "linear") or bool(difflib.get_close_matches(plain, ["alllinear"], 1, cutoff=0.8))
