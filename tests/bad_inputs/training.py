"""Settings that only the libraries can judge: plan tries them, and finetune stops at what training alone shows."""

from bad_inputs.case import Case, edit_json, problems

CASES = [
    Case(
        "kernels that are not installed",
        (
            "plan failed: train.use_liger_kernel: the package liger-kernel is not installed\n"
            "what to do: fix the train section of the config, or install the missing package"
        ),
        {"train": {"use_liger_kernel": True}},
    ),
    Case(
        "compiled on a CPU",
        (
            "finetune failed: train.torch_compile: on a CPU a step takes a hundred times as long with it\n"
            "what to do: leave it out, or use a GPU"
        ),
        {"train": {"torch_compile": True}},
        target="finetune",
    ),
    Case(
        "targets that match nothing",
        (
            "plan failed: lora.target_modules: Target modules {'nope'} not found in the base model. Please check "
            "the target modules and try again.\n"
            "what to do: linear layers of this model: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, "
            "v_proj"
        ),
        {"lora": {"target_modules": ["nope"]}},
    ),
    Case(
        "one target that matches nothing",
        (
            "plan failed: lora.target_modules: nothing is named query\n"
            "what to do: linear layers of this model: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, "
            "v_proj"
        ),
        {"lora": {"target_modules": ["q_proj", "query"]}},
    ),
    Case(
        "tied embeddings",
        (
            "plan failed: lora.target_modules: model.embed_tokens share one weight (tied embeddings), "
            "and merging LoRA into one changes both\n"
            "what to do: leave them out; to train new tokens, set lora.modules_to_save: [embed_tokens] and "
            "ensure_weight_tying: true"
        ),
        {"lora": {"target_modules": ["q_proj", "embed_tokens"]}},
    ),
    Case(
        "a copy of tied embeddings",
        (
            "plan failed: lora.modules_to_save: embed_tokens is tied to another weight, and training a copy of "
            "it would part the two\n"
            "what to do: set lora.ensure_weight_tying: true, or leave it out"
        ),
        {"lora": {"modules_to_save": ["embed_tokens"]}},
    ),
    Case(
        "a start that peft does not know",
        (
            "plan failed: lora.init_lora_weights: Moult cannot start from nope\n"
            "what to do: set true, false, gaussian, orthogonal, olora, mica, pissa or pissa_niter_<number>"
        ),
        {"lora": {"init_lora_weights": "nope"}},
    ),
    Case(
        "a bias that cannot be merged",
        (
            "plan failed: lora.lora_bias: model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, "
            "model.layers.0.self_attn.v_proj and 25 more of the base have no bias that the adapter's could be "
            "merged into\n"
            "what to do: leave it out"
        ),
        {"lora": {"lora_bias": True}},
    ),
    Case(
        "a quantized layer that is to be trained itself",
        (
            "plan failed: model.quantization: these LoRA settings fail on a quantized model: only Tensors of floating "
            "point dtype can require gradients\n"
            "what to do: leave out what lora has beyond r, lora_alpha, lora_dropout and target_modules, or set "
            "model.quantization: null"
        ),
        {"model": {"quantization": "nf4"}, "lora": {"target_modules": ["k_proj"], "modules_to_save": ["q_proj"]}},
    ),
    Case(
        "attention that is not installed",
        (
            "plan failed: model.attn_implementation: flash_attention_2: FlashAttention2 has been toggled on, but "
            "it cannot be used due to the following error: the package for FlashAttention2 doesn't seem to be "
            "installed.\n"
            "what to do: install what it needs, or set sdpa or null"
        ),
        {"model": {"attn_implementation": "flash_attention_2"}},
    ),
    Case(
        "attention that does not exist",
        (
            'plan failed: model.attn_implementation: flash: Specified `attn_implementation="flash"` is not '
            'supported. The only possible arguments are `attn_implementation="eager"`, `"paged|eager"`, '
            '`"attn_implementation=flash_attention_2"`, `"attn_implementation=flash_attention_3"`, '
            '`"attn_implementation=flash_attention_4"`, `"attn_implementation=sdpa"`, '
            '`"attn_implementation=flex_attention"`.\n'
            "what to do: install what it needs, or set sdpa or null"
        ),
        {"model": {"attn_implementation": "flash"}},
    ),
    Case(
        "an optimizer that does not exist",
        problems(
            "train.optim: 'adam' is none of adamw_torch, adamw_torch_fused, adamw_torch_xla, "
            "adamw_torch_npu_fused, adafactor, adamw_anyprecision, adamw_torch_4bit, adamw_torch_8bit, ademamix, "
            "sgd, adagrad, adamw_bnb_8bit and 29 more; did you mean adalomo?"
        ),
        {"train": {"optim": "adam"}},
    ),
    Case(
        "an optimizer that is not installed",
        (
            "plan failed: train.optim: You need to install `lomo_optim` in order to use LOMO optimizers. Install it "
            "with `pip install lomo-optim`\n"
            "what to do: fix the train section of the config, or install the missing package"
        ),
        {"train": {"optim": "lomo"}},
    ),
    Case(
        "a reporter that is not installed",
        (
            "plan failed: train.report_to: CometCallback requires comet-ml>=3.43.2 to be installed. Run `pip "
            "install comet-ml>=3.43.2`.\n"
            "what to do: fix the train section of the config, or install the missing package"
        ),
        {"train": {"report_to": "comet_ml"}},
    ),
    Case(
        "a reporter that does not exist",
        (
            "plan failed: train.report_to: tensorbord is not supported, only azure_ml, comet_ml, mlflow, "
            "neptune, tensorboard, trackio, wandb, codecarbon, clearml, dagshub, flyte, dvclive, swanlab, "
            "kubeflow are supported.\n"
            "what to do: fix the train section of the config, or install the missing package"
        ),
        {"train": {"report_to": "tensorbord"}},
    ),
    Case(
        "a schedule that lacks its argument",
        (
            "plan failed: train.lr_scheduler_type: One of min_lr or min_lr_rate should be set through the "
            "`lr_scheduler_kwargs`\n"
            "what to do: fix the train section of the config, or install the missing package"
        ),
        {"train": {"lr_scheduler_type": "cosine_with_min_lr"}},
    ),
    Case(
        "a schedule that does not exist",
        problems(
            "train.lr_scheduler_type: 'cosin' is none of linear, cosine, cosine_with_restarts, polynomial, "
            "constant, constant_with_warmup, inverse_sqrt, reduce_lr_on_plateau, cosine_with_min_lr, "
            "cosine_warmup_with_min_lr, warmup_stable_decay, greedy; did you mean cosine?"
        ),
        {"train": {"lr_scheduler_type": "cosin"}},
    ),
    Case(
        "more warm-up than steps",
        (
            "plan failed: train.warmup_steps: 100 of 2 steps: the learning rate never reaches its peak\n"
            "what to do: lower it; below 1 it is a share of all steps"
        ),
        {"train": {"warmup_steps": 100}},
    ),
    Case(
        "no step",
        (
            "plan failed: train: no step in 38 sequences: a batch is 64, and dataloader_drop_last leaves out "
            "what does not fill one\n"
            "what to do: lower train.per_device_train_batch_size, or leave dataloader_drop_last out"
        ),
        {"train": {"per_device_train_batch_size": 64, "dataloader_drop_last": True}},
    ),
    Case(
        "sequences longer than the model",
        (
            "plan failed: a sequence has 30 tokens, and the model 16 positions (max_position_embeddings)\n"
            "what to do: lower datasets.<name>.max_length"
        ),
        make=edit_json("base/config.json", max_position_embeddings=16),
    ),
    Case(
        "all at once",
        (
            "plan failed: 4 problems:\n"
            "  - model.attn_implementation: flash_attention_2: FlashAttention2 has been toggled on, but it "
            "cannot be used due to the following error: the package for FlashAttention2 doesn't seem to be "
            "installed.\n"
            "    -> install what it needs, or set sdpa or null\n"
            "  - train.warmup_steps: 5 of 2 steps: the learning rate never reaches its peak\n"
            "    -> lower it; below 1 it is a share of all steps\n"
            "  - train.report_to: CometCallback requires comet-ml>=3.43.2 to be installed. Run `pip install "
            "comet-ml>=3.43.2`.\n"
            "    train.optim: You need to install `galore_torch` in order to use GaLore optimizers. Install it with <...>\n"
            "    -> fix the train section of the config, or install the missing package\n"
            "  - lora.target_modules: Target modules {'nope'} not found in the base model. Please check the "
            "target modules and try again.\n"
            "    -> linear layers of this model: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
        ),
        {
            "model": {"attn_implementation": "flash_attention_2"},
            "lora": {"target_modules": ["nope"]},
            "train": {"warmup_steps": 5, "optim": "galore_adamw", "report_to": "comet_ml"},
        },
    ),
    Case(
        "a loss that is NaN",
        (
            "finetune failed: step 2: eval_loss is nan\n"
            "what to do: lower train.learning_rate or train.max_grad_norm; with float16, set model.dtype: "
            "bfloat16"
        ),
        {"train": {"learning_rate": 1e30, "max_grad_norm": 0, "max_steps": 4, "logging_steps": 1}},
        target="finetune",
    ),
    Case(
        "an adapter that does not change",
        (
            "finetune failed: results/d/trainer_state/checkpoint-1/adapter_model.safetensors: training has not "
            "changed base_model.model.model.layers.0.mlp.down_proj.lora_B.weight, "
            "base_model.model.model.layers.0.mlp.gate_proj.lora_B.weight, "
            "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight, "
            "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight, "
            "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight and 23 more\n"
            "what to do: check lora.target_modules and train.learning_rate"
        ),
        {"train": {"learning_rate": 1e-60}},
        target="finetune",
    ),
]
