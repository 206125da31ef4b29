"""A base that is split over the processes of a training (train.shard): each holds a part of every layer.

transformers does it, by its own plan for the architecture, while it loads (FSDP2; huggingface/transformers, distributed/fsdp.py).
Each process reads its own slices of the files. The adapter comes afterwards: it is whole in each process, in float32, and its
gradients are averaged. So checkpoints, optimizer and resuming are those of a training that is not split.
"""

from moult.model.shrunken import generic

# Of all parameters, what may be in no part of the plan. It is gathered on every GPU at the first pass, and stays there.
OUTSIDE = 0.1


def split_over(processes: int) -> dict:
    """Arguments of from_pretrained that split the model over all processes; the process group must be there."""
    from transformers.distributed import DistributedConfig

    return {"distributed_config": DistributedConfig(fsdp_size=processes)}


def share_split(model) -> float:
    """The share of the parameters of `model` (which may be on the meta device) that transformers' plan splits layer by layer.

    Where the layers have other names (GPT-2's `h`), the plan matches nothing, and transformers (5.23) only warns: each process
    would gather the whole model for each pass.
    """
    parts = [part for name, part in model.named_modules() if generic(name) in model.fsdp_plan]
    inside = {parameter: parameter.numel() for part in parts for parameter in part.parameters()}
    return sum(inside.values()) / sum(parameter.numel() for parameter in model.parameters())


def share_held(model) -> float:
    """The share of the model's parameters that is in this process."""
    parameters = list(model.parameters())
    here = sum((value.to_local() if hasattr(value, "to_local") else value).numel() for value in parameters)
    return here / sum(value.numel() for value in parameters)
