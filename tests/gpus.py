"""GPUs that torch counts and that compute nothing: what a stage would do on a machine that has them."""

from types import SimpleNamespace


def pretend(monkeypatch, count: int = 1, capability: tuple[int, int] = (9, 0)) -> None:
    """Let torch see `count` GPUs."""
    import torch

    answers = {
        "is_available": lambda: count > 0,
        "device_count": lambda: count,
        "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: "Pretended GPU",
        "is_bf16_supported": lambda *args, **kwargs: capability >= (8, 0),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)


def record_loading(monkeypatch) -> list[dict]:
    """Let no weights be read. Returns the list to which each call of from_pretrained adds its arguments."""
    from moult.model import device as module

    calls: list[dict] = []

    def from_pretrained(folder, **arguments):
        calls.append(arguments)
        return SimpleNamespace(), {"missing_keys": [], "mismatched_keys": []}

    monkeypatch.setattr(module, "auto_class", lambda config: SimpleNamespace(from_pretrained=from_pretrained))
    return calls
