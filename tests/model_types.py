"""The table of architectures: which of transformers' decoders Moult trains, merges and packs.

    python tests/model_types.py                 # all; ten seconds each on a core of its own
    python tests/model_types.py qwen3 jamba     # these; the other lines of config/MODELS.md stay

Each is a tiny model of random weights: plan, two steps of finetune, merge; then the KL divergence between the merged model
and base plus adapter on five rows. A model that plan refuses has its message in the table instead.
"""

import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "config" / "MODELS.md"

# What all have in common, in the words of most configs, and what some need besides.
COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
DEEPSEEK = {**MLA, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
DEEPSEEK |= {"moe_intermediate_size": 32, "first_k_dense_replace": 1, "num_key_value_heads": 4}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
LINEAR |= {"layer_types": ["linear_attention", "full_attention"]}
KINDS: dict[str, dict] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "ministral3": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3n_text": {
        "vocab_size_per_layer_input": 128,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "intermediate_size": [96, 96],
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "phi": {},
    "phi3": {},
    "granite": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 8},
    "cohere": {},
    "cohere2": {"sliding_window": 8},
    "starcoder2": {},
    "stablelm": {},
    "smollm3": {},
    "glm": {},
    "glm4": {},
    "exaone4": {},
    "ernie4_5": {},
    "seed_oss": {},
    "helium": {},
    "nanochat": {},
    "minicpm3": {**MLA, "num_key_value_heads": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4, "window_size": 8},
    "gptj": {"n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8},
    "gpt_neox": {},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "bloom": {"n_head": 4, "n_layer": 2},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2},
    "falcon": {"head_dim": None},
    # mixture of experts
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_moe": {**EXPERTS},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    "deepseek_v3": {**DEEPSEEK, "head_dim": 8},
    "glm4_moe": {**DEEPSEEK, "num_key_value_heads": 2},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32, "moe_layer_end_index": 1},
    "llama4_text": {"intermediate_size_mlp": 96, "num_local_experts": 4, "num_experts_per_tok": 1},
    "minimax": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
    # state spaces, linear attention, and hybrids
    "mamba": {"state_size": 8},
    "falcon_mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **MAMBA,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
    },
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 16},
    "qwen3_next": {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    # not decoders that read from left to right, or not with a plain head
    "bert": {"is_decoder": True},
}

# Trained in the fast tests: one of each kind of trouble.
FAST = ("llama", "qwen3_moe", "jamba", "bert")


@dataclass
class Row:
    """One line of the table. `refused`: what plan says instead."""

    kind: str
    plan: dict | None = None
    kl: float | None = None
    packing: str = ""
    refused: str = ""

    def cells(self) -> list[str]:
        if self.plan is None:
            return [self.kind, "", "", "", "", f"refused: {self.refused}"]
        stacked, reach = self.plan["target_parameters"], self.plan["out_of_reach"]
        notes = [f"{name.split('*.', 1)[-1]}: {why}" for name, why in self.plan["left_out"].items()]
        if reach:
            notes.append(f"{reach['share']:.0%} out of reach without target_parameters")
        layers = f"{len(self.plan['targets'])}" + (f" + {len(stacked)}" if stacked else "")
        return [self.kind, layers, self.plan["merge"]["how"], f"{self.kl:.0e}", self.packing, "; ".join(notes)]


def try_out(kind: str, folder: Path) -> Row:
    """plan, finetune, merge and KL of a tiny model, in `folder`."""
    from finetuning import SETTINGS, Run, tokenizer
    from merging import run_merge
    from planning import make as make_plan
    from tiny import make_tokens

    from moult.errors import MoultError

    base, tokens = make_base(kind, folder / "base"), make_tokens(folder / "tokens", rows=8)
    tokenizer(base)
    train = {
        **SETTINGS["train"],
        "max_steps": 2,
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "warmup_steps": 0,
    }
    config = {**SETTINGS, "dtype": "float32", "train": train, "lora": {**SETTINGS["lora"], "lora_dropout": 0.0}}
    (folder / "run").mkdir()
    try:
        run = Run(folder / "run", config, base, tokens)
    except MoultError as error:
        return Row(kind, refused=error.what)
    row = Row(kind, plan=make_plan(base, folder / "run", config["lora"], config["train"])[0], packing="exact")
    run.go()
    merged, _ = run_merge(base, folder / "run" / "adapter", folder / "run")
    row.kl = divergence(base, folder / "run" / "adapter", merged)
    try:
        make_plan(base, folder / "run", config["lora"], {**config["train"], "packing": True})
    except MoultError as error:
        row.packing = "needs a kernel" if "Install" in error.what else "refused"
    return row


def make_base(kind: str, folder: Path) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from moult.model.shrunken import randomise

    sizes = {name: value for name, value in {**COMMON, **KINDS[kind]}.items() if value is not None}
    config = AutoConfig.for_model(kind, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model)
    model.save_pretrained(folder)
    return folder


def divergence(base: Path, adapter: Path, merged: Path) -> float:
    """The largest KL divergence of any position, in nats, between base plus adapter and the merged model."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.randint(3, 128, (5, 16), generator=torch.Generator().manual_seed(2))
    scores = []
    with torch.no_grad():
        for model in (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter),
            AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32),
        ):
            scores.append(model.eval()(input_ids=ids, use_cache=False).logits.double().log_softmax(-1))
    tuned, plain = scores
    return (tuned.exp() * (tuned - plain)).sum(-1).max().item()


HEAD = [
    "model type",
    "layers (+ stacked weights) tuned",
    "merge",
    "KL, nats",
    "packing",
    "left out of all-linear, and why",
]


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def lines_of(page: str) -> dict[str, str]:
    """{model type: its line} of a page."""
    rows = [row for row in page.splitlines() if row.startswith("| ")]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows[2:]}


def main() -> None:
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for kind in sys.argv[1:] or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            row = line(try_out(kind, Path(folder)).cells())
        print(row, flush=True)
        rows = lines_of(PAGE.read_text(encoding="utf-8") if PAGE.exists() else "") | {kind: row}
        ordered = [rows[known] for known in KINDS if known in rows]
        page = "\n".join([INTRODUCTION, line(HEAD), line(["---"] * len(HEAD)), *ordered])
        PAGE.write_text(f"{page}\n", encoding="utf-8")


INTRODUCTION = """# Models

What Moult does with a tiny model of random weights of each of these types of transformers: `plan`, two steps of `finetune`
with `lora.target_modules: all-linear`, `merge`. KL is the largest divergence of any position between the merged model and
base plus adapter. packing: whether a row that `train.packing` puts behind another keeps the logits that it has alone; where
it does not, plan refuses it. "needs a kernel": refused without the package that plan's message names.

plan makes the same trial with your model's own architecture, so a type that is not in the table is tried out as well.

Made by `python tests/model_types.py`.
"""


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]
    main()
