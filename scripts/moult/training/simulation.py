"""Peak memory of a training step and of the validation on a GPU, without one: the real code of transformers, peft and TRL runs
on fake tensors, which have a shape and a dtype but no bytes.

The fake tensors are of the device "cpu", because a torch without CUDA refuses fake ones of a GPU. What a GPU does otherwise
is put in their place: the attention kernel, the Triton kernels of TRL's loss, dropout in one kernel, the products of
bitsandbytes. Memory grows by the same amount with each further layer, so that a few layers are run and the others are added.
What is not seen: the context of CUDA and NCCL, and what the allocator loses between its blocks.
"""

import contextlib
import gc
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from unittest.mock import patch

from moult.model.shrunken import BROKEN, layer_kinds, shrunken_config
from moult.training.arguments import show_backbone
from moult.training.targets import is_linear, with_lora

ATTENTION = "moult_simulated"

# The allocator of CUDA rounds up to this many bytes (c10/cuda/CUDACachingAllocator.cpp).
BLOCK = 512

# lora settings that choose layers by their number: with them not every layer costs the same.
BY_NUMBER = ("layers_to_transform", "rank_pattern", "alpha_pattern")

# All layers of a model with at most so many are run.
FEW_LAYERS = 4


@dataclass(frozen=True)
class Step:
    """What a GPU does at a time.

    rows, length: shape of the batch as the model gets it. A batch without padding is one long row.
    attention: `flash`: the kernel gets no mask. `dense`: it gets one, rows x length x length, as from a padded batch.
        `eager`: the scores are computed in full.
    dtype: of the base and of autocast.
    quantization: nf4, int8 or None.
    checkpointing: whether activations are computed again in the backward pass.
    training: False for the validation: no gradients.
    fused: whether the loss is TRL's fused one, which never holds the logits of all tokens.
    autocast, float32_adapter: as finetune trains; False is for comparison with published figures.
    cast_inputs: whether peft casts what goes into the adapter to float32, where autocast casts it back; finetune does not.
    """

    rows: int
    length: int
    attention: str = "flash"
    dtype: str = "bfloat16"
    quantization: str | None = None
    checkpointing: bool = False
    training: bool = True
    fused: bool = True
    autocast: bool = True
    float32_adapter: bool = True
    cast_inputs: bool = True


def simulate(model, lora: dict, steps: list[Step]) -> list[int]:
    """Bytes at the peak of each step besides weights, gradients and moments.

    Args:
        model: the base on the meta device; it stays as it is.
        lora: settings of peft.LoraConfig.

    Raises one of moult.model.shrunken.BROKEN where the model's code needs the values of its tensors, or cannot run so.
    """
    # torch logs each operation that it cannot do without values, with its stack.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    with patch.object(log, "disabled", True):
        try:
            return run_few_layers(model, lora, steps)
        except BROKEN:
            if steps[0].attention == "eager":
                raise
            # Models with an attention of their own (GPT-J, Falcon, MPT).
            return run_few_layers(model, lora, [replace(step, attention="eager") for step in steps])


def run_few_layers(model, lora: dict, steps: list[Step]) -> list[int]:
    depths = depths_of(model, lora)
    peaks = [[peak(few, step) for step in steps] for few in (build(model, lora, depth, steps[0]) for depth in depths)]
    if len(depths) == 1:
        return peaks[0]
    further = (model.config.get_text_config().num_hidden_layers - depths[0]) / (depths[1] - depths[0])
    return [round(less + (more - less) * further) for less, more in zip(*peaks, strict=True)]


def depths_of(model, lora: dict) -> list[int]:
    """One number of layers (all) or two, from which the others follow: their kinds repeat behind the first few."""
    depth = model.config.get_text_config().num_hidden_layers
    kinds = layer_kinds(model)
    if depth <= FEW_LAYERS or kinds is None or any(lora.get(name) for name in BY_NUMBER):
        return [depth]
    for period in range(1, depth // 2 + 1):
        # DeepSeek's first layers are not like the others.
        different = next(
            (end for end in range(depth - period, 0, -1) if kinds[end - 1] != kinds[end - 1 + period]),
            0,
        )
        repeated = max(1, math.ceil(2 / period)) * period
        first, second = different + repeated, different + 2 * repeated
        if second < depth:
            return [first, second]
    return [depth]


def build(model, lora: dict, layers: int, step: Step):
    """The PeftModel with so many layers, on the meta device."""
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
    config = shrunken_config(model.config, layers, 1)
    with torch.device("meta"):
        few = type(model)._from_config(
            config,
            dtype=getattr(torch, step.dtype),
            attn_implementation="eager" if step.attention == "eager" else ATTENTION,
        )
    few.tie_weights()
    show_backbone(few)
    peft_model = with_lora(few, lora)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32 if step.float32_adapter else getattr(torch, step.dtype))
    if step.quantization:
        quantize(peft_model, step.quantization, step.dtype)
    return peft_model


# --- one step ---------------------------------------------------------------------------------------------------------


def peak(model, step: Step) -> int:
    """Bytes at the peak of the step on a PeftModel of the meta device, besides parameters, buffers, gradients and moments."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from trl.trainer.utils import add_fused_lm_head

    base = model.get_base_model()
    memory = watch()
    with FakeTensorMode(allow_non_fake_inputs=True), memory, as_on_a_gpu(), no_collection():
        with made_fake(model):
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
            switch_checkpointing(model, step.checkpointing and step.training)
            for layer in model.modules():
                if hasattr(layer, "cast_input_dtype_enabled"):
                    layer.cast_input_dtype_enabled = step.cast_inputs
            model.train(step.training)
            for parameter in trained:  # those of the micro-batch before
                parameter.grad = torch.empty_like(parameter)
            ids = torch.zeros((step.rows, step.length), dtype=torch.long)
            mask = torch.ones((step.rows, 1, step.length, step.length), dtype=torch.bool)
            MASK[:] = [mask if step.attention == "dense" else None]
            memory.start()
            half = step.autocast and step.dtype != "float32"
            cast = torch.autocast("cpu", dtype=getattr(torch, step.dtype)) if half else contextlib.nullcontext()
            with cast, contextlib.nullcontext() if step.training else torch.no_grad():
                loss, held = loss_of(model, ids, step)
            if step.training:
                loss.backward()
            for parameter in trained:
                parameter.grad = None
            del held
            MASK[:] = [None]
        del base.forward  # the fused head
    return memory.peak


def loss_of(model, ids, step: Step) -> tuple:
    """The loss, or the output of the validation, and what is held besides until the backward pass ends."""
    import torch

    if not step.training:
        # The head is measured apart: moult.measuring.likelihood takes it in parts.
        return model(input_ids=ids, use_cache=False, logits_to_keep=1), None
    if step.fused:
        return -model(input_ids=ids, labels=ids, use_cache=False, fused_lm_head=True).log_probs.sum() / 100, None
    # As transformers did when the figures that we compare with were published.
    output = model(input_ids=ids, use_cache=False)
    logits = output.logits.float()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()), (output, logits)


def switch_checkpointing(model, on: bool) -> None:
    if on:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    elif getattr(model.get_base_model(), "is_activation_checkpointing", False):
        model.activation_checkpointing_disable()


@contextlib.contextmanager
def made_fake(model) -> Iterator[None]:
    """Inside, the parameters and buffers of a model on the meta device are fake tensors of the CPU."""
    import torch

    made: dict[int, torch.Tensor] = {}
    before = []
    for module in model.modules():
        for kind in (module._parameters, module._buffers):
            before.append((kind, dict(kind)))
            for name, tensor in kind.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:  # tied weights stay tied
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trained = tensor.requires_grad
                    made[id(tensor)] = torch.nn.Parameter(fake, trained) if kind is module._parameters else fake
                kind[name] = made[id(tensor)]
    try:
        yield
    finally:
        for kind, tensors in before:
            kind.update(tensors)


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without Python's garbage collection, which comes when it wants: the same step has the same peak."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def watch():
    """A mode that knows how many bytes of tensors are alive, and the most there have been since `start()`.

    (torch.distributed._tools.mem_tracker does much more, needs an optimizer and hooks in each module, and counts no blocks.)
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.weak import WeakIdKeyDictionary

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.known = WeakIdKeyDictionary()
            self.alive = self.before = self.most = 0

        def start(self) -> None:
            self.before = self.most = self.alive

        @property
        def peak(self) -> int:
            return self.most - self.before

        def _freed(self, size: int) -> None:
            self.alive -= size

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.known:
                    size = math.ceil(storage.nbytes() / BLOCK) * BLOCK
                    self.known[storage] = size
                    self.alive += size
                    self.most = max(self.most, self.alive)
                    weakref.finalize(storage, self._freed, size)
            return result

    return Watch()


# --- what a GPU does otherwise ----------------------------------------------------------------------------------------

# The mask of the step that runs, or None: transformers hands an attention that it does not know no mask.
MASK: list = [None]


def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Stands for scaled_dot_product_attention on a GPU.

    Args:
        query: (rows, heads, length, size of a head); key, value: the same, with as many heads or fewer.

    Without a mask it is the flash kernel, which takes fewer heads of keys and values. With one it is the memory-efficient
    kernel: transformers repeats keys and values for it, and ATen makes a bias of the mask in the dtype of the query, in
    each layer, and keeps it for the backward pass (transformers 5.23, torch 2.13).
    """
    import torch

    mask = MASK[0]
    kept = value.shape[-1]
    if kept < query.shape[-1]:  # DeepSeek's heads; the kernels take one size
        value = torch.nn.functional.pad(value, (0, query.shape[-1] - kept))
    if mask is None:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention
        result = kernel(query, key, value, 0.0, True, False, scale=scaling)[0]
    else:
        from transformers.integrations.sdpa_attention import repeat_kv

        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        bias = torch.empty(mask.shape, dtype=query.dtype).expand(*query.shape[:2], -1, -1)
        kernel = torch.ops.aten._scaled_dot_product_efficient_attention
        result = kernel(query, key, value, bias, True, 0.0, False, scale=scaling)[0]
    return result[..., :kept].transpose(1, 2).contiguous(), None


class NoKernel:
    """A Triton kernel that does nothing: it writes to tensors that are there already."""

    def __getitem__(self, grid) -> Callable:
        return lambda *args, **kwargs: None


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """TRL's loss (1.16) and dropout as they run on a GPU, where they need less memory."""
    import torch
    import trl.trainer.utils
    from trl.kernels import chunked_logprob

    def dropout(tensor, p=0.5, training=True, inplace=False):
        return torch.native_dropout(tensor, p, True)[0] if training and p else tensor  # keeps a mask of one byte

    with contextlib.ExitStack() as stack:
        for where, name, value in (
            (chunked_logprob, "_use_triton", lambda device: True),
            (chunked_logprob, "_forward_kernel", NoKernel()),
            (chunked_logprob, "_backward_kernel", NoKernel()),
            (chunked_logprob, "triton", SimpleNamespace(cdiv=lambda number, by: -(-number // by))),
            (chunked_logprob, "_addmm_fp32", lambda sums, one, other: None),  # on a GPU it needs no copies
            # All positions are scored: which are trained is not known here.
            (trl.trainer.utils, "_use_triton", lambda device: False),
            (torch.nn.functional, "dropout", dropout),
        ):
            stack.enter_context(patch.object(where, name, value, create=name == "triton"))
        yield


def quantize(model, how: str, dtype: str) -> None:
    """Put what bitsandbytes would in the place of the linear layers of a PeftModel, in place; not of the head."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if is_linear(child) and child is not head and not child.weight.requires_grad:
                setattr(module, name, quantized_linear(child, how, dtype))


def quantized_bytes(shape: tuple[int, ...], quantization: str) -> int:
    """Of a weight [out, in] in bitsandbytes. nf4, with double quantization: half a byte, and per 64 weights one byte of scale,
    whose scales are float32 per 256. int8: a byte, and a float32 scale per row."""
    count = math.prod(shape)
    return count // 2 + count // 64 + count // (64 * 256) * 4 if quantization == "nf4" else count + 4 * shape[0]


def quantized_linear(linear, how: str, dtype_name: str):
    """A layer that needs the memory of bitsandbytes' (0.50): in both directions the weight is restored for the product, and
    not kept."""
    import torch

    dtype = getattr(torch, dtype_name)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs, packed):
            return torch.nn.functional.linear(inputs.to(dtype), torch.empty(shape, dtype=dtype))

        @staticmethod
        def backward(ctx, gradient):
            return gradient.to(dtype) @ torch.empty(shape, dtype=dtype), None

    class Quantized(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = linear.in_features, linear.out_features
            with torch.device("meta"):
                packed = torch.empty((quantized_bytes(shape, how),), dtype=torch.uint8)
            self.weight, self.bias = torch.nn.Parameter(packed, requires_grad=False), linear.bias

        def forward(self, inputs):
            with torch.autocast("cpu", enabled=False):
                result = Product.apply(inputs, self.weight)
            return result if self.bias is None else result + self.bias

    shape = (linear.out_features, linear.in_features)
    return Quantized()
