"""LoRA tried out on a small model of the same architecture: one forward and backward pass, then the merge, in memory.

What a class or a name cannot tell shows here: routers that are Linear and return tuples, layers whose weight is read past
the layer (jamba's dt_proj), layers that rows of text do not reach (towers for images), LoRA that does not merge.
"""

import copy
from collections import defaultdict
from dataclasses import dataclass, field

from moult.errors import MoultError
from moult.model.lora import lora_layers
from moult.model.shrunken import BROKEN, generic, of_one_layer
from moult.training.arguments import show_backbone

# Of what the logits may differ between adapter and merged model, relative to the largest. Rounding gives 1e-6.
ROUNDING = 1e-3

NO_GRADIENT = "gets no gradient"

# Settings that choose layers by their number, or tokens: the small model has others.
OF_THE_WHOLE = (
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
    "trainable_token_indices",
)

Groups = dict[str, list[str]]  # {name with * for numbers: names in the small model}


@dataclass
class Outcome:
    """`idle`: the layers that got no gradient. `error`: why the pass or the merge cannot be done."""

    idle: list[str] = field(default_factory=list)
    error: str | None = None


def find_faults(small, names: list[str], lora: dict) -> dict[str, str]:
    """{name with * for numbers: why LoRA cannot be trained there}.

    Args:
        small: of moult.model.shrunken.
        names: layers and parameters of the original model that LoRA is to be on.
        lora: settings of peft.LoraConfig.

    Raises MoultError where training fails, and not because of some of the layers.
    """
    wanted = {generic(name) for name in names}
    groups = defaultdict(list)
    for name, part in [*small.named_modules(), *small.named_parameters()]:
        # A Sequential numbers what has no weights too.
        if generic(name) in wanted and (hasattr(part, "weight") or hasattr(part, "requires_grad")):
            groups[generic(name)].append(name)
    check_loss(small)
    faults: dict[str, str] = {}
    outcome = attempt(small, groups, lora)
    if outcome.idle:
        idle = set(outcome.idle)
        faults |= {name: NO_GRADIENT for name, members in groups.items() if idle.issuperset(members)}
        # The merge changes a layer that is read past its LoRA, and training did not.
        outcome = attempt(small, without(groups, faults), lora)
    if outcome.error:
        errors = {name: attempt(small, {name: groups[name]}, lora).error for name in without(groups, faults)}
        if len(errors) == 1 or len(set(errors.values())) > 1:  # else it is not the layers' fault
            faults |= {name: error for name, error in errors.items() if error}
            outcome = attempt(small, without(groups, faults), lora)
    if outcome.error:
        raise MoultError(
            f"training fails on a small model of this architecture: {outcome.error}",
            "tune other layers (lora.target_modules), or another model",
        )
    return faults


def without(groups: Groups, faults: dict[str, str]) -> Groups:
    return {name: members for name, members in groups.items() if name not in faults}


def check_loss(small) -> None:
    """Raises MoultError if the loss that TRL computes from hidden states and head (TRL 1.16) is not that of the logits: what
    the model does besides (BERT's head has layers of its own, RecurrentGemma caps its logits) would not be there in training."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    inputs = tokens_for(small)
    model = copy.deepcopy(small).eval()
    show_backbone(model)
    add_fused_lm_head(model)
    try:
        with torch.no_grad():
            fused = model(**inputs, labels=inputs["input_ids"], fused_lm_head=True).log_probs.sum()
            scores = model(**inputs, use_cache=False).logits[:, :-1].log_softmax(-1)
    except BROKEN as error:
        raise MoultError(f"TRL cannot train this architecture: {first_line(error)}", "tune another model") from error
    plain = scores.gather(-1, inputs["input_ids"][:, 1:, None]).sum()
    if not abs(fused - plain) < ROUNDING * abs(plain):
        raise MoultError(
            f"TRL's loss of this architecture is {fused:.1f}, and that of its own logits {plain:.1f}: another model would be "
            "trained than the one that answers",
            "tune another model",
        )


def without_router_loss(small, train: dict) -> str | None:
    """Why the loss that balances the experts cannot be computed, where TRL would add it (TRL 1.16); None if it can."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    config, wanted = small.config.get_text_config(), train.get("router_aux_loss_coef")
    weight = getattr(config, "router_aux_loss_coef", 0.0) if wanted is None else wanted
    if not weight or not hasattr(config, "output_router_logits"):
        return None
    inputs, model = tokens_for(small), copy.deepcopy(small).eval()
    show_backbone(model)
    add_fused_lm_head(model)
    try:
        with torch.no_grad():
            loss = model(**inputs, labels=inputs["input_ids"], fused_lm_head=True, output_router_logits=True).aux_loss
    except BROKEN as error:
        return first_line(error)
    return None if loss is not None else "the model returns none"


def tokens_for(small) -> dict:
    import torch

    vocabulary = small.get_input_embeddings().weight.shape[0]
    ids = torch.randint(3, vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def distance(ours, theirs) -> float:
    """The largest difference of two tensors of logits, relative to the largest of `theirs`."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def attempt(small, groups: Groups, lora: dict) -> Outcome:
    """One pass forward and backward with LoRA on the layers and parameters of `groups`, as TRL does it, and a merge."""
    import torch
    from peft import LoraConfig, get_peft_model
    from trl.trainer.utils import add_fused_lm_head

    names = [name for members in groups.values() for name in members]
    if not names:
        return Outcome()
    layers = dict(small.named_modules())
    own = {name: value for name, value in lora.items() if name not in OF_THE_WHOLE}
    own |= {"r": 2, "init_lora_weights": True, "target_modules": [name for name in names if name in layers]}
    own["target_parameters"] = [name for name in names if name not in layers] or None
    before = {name: tensor.shape for name, tensor in small.state_dict().items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        inputs = tokens_for(small)
        try:
            model = get_peft_model(copy.deepcopy(small), LoraConfig(task_type="CAUSAL_LM", **own))
            start_off_zero(model)
            show_backbone(model.get_base_model())
            add_fused_lm_head(model.get_base_model())
            loss = model.train()(**inputs, labels=inputs["input_ids"], fused_lm_head=True).log_probs.sum()
            if not loss.requires_grad:
                return Outcome(names)
            loss.backward()
            idle = layers_without_gradient(model)
            with torch.no_grad():
                tuned = model.eval()(**inputs, use_cache=False).logits
                merged = model.merge_and_unload()
                difference = distance(merged(**inputs, use_cache=False).logits, tuned)
        except BROKEN as error:
            return Outcome(error=first_line(error))
    if {name: tensor.shape for name, tensor in merged.state_dict().items()} != before:
        return Outcome(idle, "merging changes the names or shapes of the base's weights")
    if not difference < ROUNDING:
        return Outcome(idle, f"merged, the logits differ by {difference:.1e} of the largest")
    return Outcome(idle)


def start_off_zero(model) -> None:
    """B starts as zeros, through which A gets no gradient and nothing is merged."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name and parameter.dim() > 1:
                parameter.normal_(0, 0.1)


def layers_without_gradient(model) -> list[str]:
    """The layers and parameters with LoRA whose B got none, by their names in the base. An expert that no token was sent to
    does not count if another one of its layer was asked."""
    reached, names = set(), []
    for name, layer in lora_layers(model):
        names.append(name)
        parts = [part["default"] for part in (layer.lora_B, layer.lora_embedding_B) if "default" in part]
        gradients = [getattr(part, "weight", part).grad for part in parts]
        if any(gradient is not None and gradient.any() for gradient in gradients):
            reached.add(of_one_layer(name))
    return [name for name in names if of_one_layer(name) not in reached]
