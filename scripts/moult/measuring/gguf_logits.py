"""What llama.cpp finds likely after each token of a sequence: the logits of a GGUF, in this process, by the package cyllama."""

from collections.abc import Iterator
from pathlib import Path

from moult.data.sequence import IGNORE
from moult.errors import MoultError
from moult.measuring.likelihood import Likelihood
from moult.run.console import progress

# Tokens that are computed at a time. With a vocabulary of 150,000, their logits take 300 MB.
AT_ONCE = 512


class GgufModel:
    """A GGUF, for sequences of up to `longest` tokens, on the CPU.

    Its methods do what the functions of these names (likelihood.py, divergence.py) do with a model of transformers.
    """

    def __init__(self, path: str | Path, longest: int, threads: int):
        import cyllama.llama.llama_cpp as llama

        class Model(llama.LlamaModel):
            # The model of cyllama 0.2.18 has no n_vocab, which its context looks for.
            n_vocab = property(lambda self: self.get_vocab().n_vocab)

        llama.disable_logging()  # hundreds of lines
        parameters = llama.LlamaModelParams()
        parameters.n_gpu_layers = 0
        try:
            self.model = Model(str(path), parameters, verbose=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise MoultError(
                f"{path}: llama.cpp cannot read it: {error}", "remove its folder, and make it again"
            ) from None
        settings = llama.LlamaContextParams()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = longest, AT_ONCE, AT_ONCE
        settings.n_threads = settings.n_threads_batch = threads
        self.context = llama.LlamaContext(self.model, settings, verbose=False)
        self.llama = llama

    def scored_logits(self, row: dict) -> Iterator[tuple]:
        """Logits at the positions whose next token is trained, and what that token is, in parts.

        Yields (logits, targets): float32 (n, vocabulary), int64 (n,).
        """
        import numpy
        import torch

        ids, targets = row["input_ids"], [*row["labels"][1:], IGNORE]
        self.context.kv_cache_clear()
        for start in range(0, len(ids), AT_ONCE):
            places = range(start, min(start + AT_ONCE, len(ids)))
            scored = [place for place in places if targets[place] != IGNORE]
            batch = self.llama.LlamaBatch(n_tokens=len(places), embd=0, n_seq_max=1)
            for place in places:
                batch.add(ids[place], place, [0], targets[place] != IGNORE)
            if (code := self.context.decode(batch)) not in (0, None):
                raise MoultError(f"llama.cpp cannot compute a row of {len(ids):,} tokens (code {code})", "see the log")
            if scored:
                found = numpy.array([self.context.get_logits_ith(place - start) for place in scored], numpy.float32)
                yield torch.from_numpy(found), torch.tensor([targets[place] for place in scored])

    def one_logits(self, row: dict, most: int):
        """Of the first trained positions, at most `most`: float32 (positions, vocabulary)."""
        import torch

        parts: list = []
        for logits, _ in self.scored_logits(row):
            parts.append(logits[: most - sum(map(len, parts))])
            if sum(map(len, parts)) == most:
                break
        return torch.cat(parts)

    def likelihood(self, sequences: list[dict], what: str) -> list[Likelihood]:
        """The likelihood of each sequence (dicts with input_ids and labels), in their order."""
        import torch

        results = []
        with progress(len(sequences), what) as bar:
            for sequence in sequences:
                found = Likelihood(0.0, 0, 0)
                for logits, targets in self.scored_logits(sequence):
                    found.nll += (
                        torch.nn.functional.cross_entropy(logits, targets, reduction="none").double().sum().item()
                    )
                    found.tokens += len(targets)
                    found.correct += int((logits.argmax(dim=-1) == targets).sum())
                results.append(found)
                bar.update(1)
        return results
