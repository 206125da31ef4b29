"""What a training has cost, from adapter.json."""

from typing import NamedTuple


class Cost(NamedTuple):
    """device: `GPU` or `CPU`. gpus: 0 on a CPU. seconds: of the training, times its GPUs. speed: tokens per second, or None."""

    device: str
    gpus: int
    seconds: float
    speed: float | None


def cost_of(adapter: dict) -> Cost:
    throughput = adapter["throughput"]
    on_cpu = adapter["hardware"]["device"] == "cpu"
    gpus = 0 if on_cpu else adapter["settings"]["train"].get("gpu", 1)
    device = "CPU" if on_cpu else "GPU"
    return Cost(device, gpus, throughput["seconds"] * max(1, gpus), throughput["tokens_per_second"])
