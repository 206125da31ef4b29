"""Settings of a run that exclude each other, or need each other: what a schema cannot say."""

import re

from moult.workflow.benchmarks import benchmark_problems
from moult.workflow.hints import module_problems


def run_problems(name: str, run: dict, dataset: dict | None) -> list[str]:
    """What is wrong with the settings of the run `name`, which are whole; `dataset` is its own."""
    problems = module_problems(run["lora"])
    if not run["model"].get("name"):
        problems.append(f"model.name: missing (run {name} needs it); a hub id or a local folder")
    ids = [prompt["id"] for prompt in run["eval"]["prompts"]]
    gpus, nodes = run["train"]["gpu"], run["train"]["nodes"]
    if gpus % nodes:
        problems.append(f"train.gpu is {gpus} and train.nodes {nodes}: each node takes as many, so make it a multiple")
    problems += [f"eval.prompts: the id {id} is there twice" for id in sorted({id for id in ids if ids.count(id) > 1})]
    for prompt in run["eval"]["prompts"]:
        if ("prompt" in prompt) == ("messages" in prompt):
            problems.append(f"eval.prompts.{prompt['id']}: give either prompt or messages")
        expect = prompt.get("expect", {})
        if expect.get("exact") is True or expect.get("contains") is True or "match" in expect:
            problems.append(
                f"eval.prompts.{prompt['id']}.expect: true and match compare with a row's own answer, "
                "and a prompt has none; give the text"
            )
    problems += benchmark_problems(run)
    expect = run["eval"].get("row_expect", {})
    problems += [
        f"eval.row_expect.{key}: 'true' is text here, and no check of all rows; write true in a file, not with --config"
        for key in ("contains", "exact")
        if expect.get(key) == "true"
    ]
    pattern = expect.get("match")
    if pattern is not None and not re.compile(pattern).groups:
        problems.append("eval.row_expect.match: has no group; put the part that is compared in ( )")
    if not _measures(run["eval"]):
        problems.append(
            "eval: nothing would be measured; set perplexity: true, or add checks (expect of prompts, row_expect) or benchmarks"
        )
    train = run["train"]
    problems += [
        f"train.{key}: 'no' leaves no best by validation loss; set load_best_model_at_end: false"
        for key in ("eval_strategy", "save_strategy")
        if train["load_best_model_at_end"] and train[key] == "no"
    ]
    if train["early_stopping_patience"] is not None:
        if train["eval_strategy"] == "no":
            problems.append(
                "train.early_stopping_patience: eval_strategy: 'no' makes no validations to count; set steps or epoch"
            )
        elif not train["load_best_model_at_end"]:
            problems.append(
                "train.early_stopping_patience: with load_best_model_at_end: false the adapter of the last step is used, which "
                "is then worse than an earlier one; leave one of the two out"
            )
    elif train["early_stopping_threshold"]:
        problems.append("train.early_stopping_threshold: it needs early_stopping_patience; set that, or leave it out")
    if train["per_device_train_batch_size"] == "auto" and train.get("dataloader_drop_last"):
        problems.append(
            "train.dataloader_drop_last: with per_device_train_batch_size: auto the number of steps would depend on the GPU; "
            "leave it out, or give a number"
        )
    if train["packing"] and dataset is not None and train["padding_free"] is True:
        problems.append("train.padding_free: packing has it already; leave it out")
    problems += _quantization_problems(run["lora"]) if run["model"]["quantization"] else []
    return problems + (_sharding_problems(run) if train["shard"] else [])


def dataset_problems(name: str, dataset: dict) -> list[str]:
    """What is wrong with the settings of a dataset, which are whole."""
    sizes = {part: dataset[f"{part}_size"] for part in ("val", "test") if not dataset[f"{part}_source"]}
    if all(size is not None and size < 1 for size in sizes.values()) and sum(sizes.values()) >= 1:
        shown = " and ".join(f"{part}_size {size:g}" for part, size in sizes.items())
        return [f"datasets.{name}: {shown} leave no training rows; lower them"]
    return []


def _measures(eval: dict) -> bool:
    """Whether a verdict will have something to rest on."""
    checked = any(prompt.get("expect") for prompt in eval["prompts"]) or (
        eval["answer_rows"] and eval.get("row_expect")
    )
    return bool(eval["perplexity"] or checked or eval["benchmarks"])


def _quantization_problems(lora: dict) -> list[str]:
    """What model.quantization cannot go with, and would not stop at."""
    problems = []
    start = lora.get("init_lora_weights", True)
    if isinstance(start, str) and start != "gaussian":
        # olora would take a part out of the quantized weights, and the merge another one out of the base's own.
        problems.append(f"lora.init_lora_weights: {start} needs a base that is not quantized; set true or gaussian")
    if lora.get("bias", "none") != "none":
        # bitsandbytes (0.50, nn/modules.py) casts the biases of its layers to the dtype of each batch.
        problems.append("lora.bias: the biases of a quantized base cannot be trained; leave it out")
    return problems


def _sharding_problems(run: dict) -> list[str]:
    """What train.shard cannot go with. The base is then in pieces, which only LoRA's own tensors are not."""
    lora, train, problems = run["lora"], run["train"], []
    if train["gpu"] == 1:
        problems.append("train.gpu is 1, so there is nothing to split the base over; raise it, or leave shard out")
    if run["model"]["quantization"]:
        # transformers 5.23 fails with every bnb_4bit_quant_storage; accelerate 1.15 leaves the weights whole (accelerate#3987).
        problems.append("a quantized base cannot be split; set model.quantization: null, or leave shard out")
    if train["per_device_train_batch_size"] == "auto":
        # A pass that has run out of memory leaves the parts in a state from which nothing can be tried again.
        problems.append("it cannot try batches out; set train.per_device_train_batch_size to a number")
    trained = [key for key in ("modules_to_save", "trainable_token_indices") if lora.get(key)]
    trained += ["bias"] if lora.get("bias", "none") != "none" else []
    problems += [
        f"lora.{key} trains weights of the base, which is in pieces; leave one of the two out" for key in trained
    ]
    start = lora.get("init_lora_weights", True)
    reading = ["use_dora"] if lora.get("use_dora") else []
    reading += (
        [f"init_lora_weights: {start}"] if isinstance(start, str) and start not in ("gaussian", "orthogonal") else []
    )
    problems += [
        f"lora.{key} reads whole weights of the base, which is in pieces; leave one of the two out" for key in reading
    ]
    return [f"train.shard: {problem}" for problem in problems]
