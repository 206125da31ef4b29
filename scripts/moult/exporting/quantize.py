"""Quantize a GGUF file with the llama.cpp in cyllama.

    python quantize.py <file> <file to write> <number of the format (llama.h)> <threads>

A process of its own, so that it can be ended.
"""

import sys

# The formats, as llama.h numbers them (LLAMA_FTYPE_MOSTLY_*).
FTYPES = {"Q6_K": 18, "Q5_K_M": 17, "Q4_K_M": 15}


def main() -> None:
    source, target, number, threads = sys.argv[1:]
    from cyllama.llama.llama_cpp import LlamaModelQuantizeParams, model_quantize

    params = LlamaModelQuantizeParams()
    params.ftype, params.nthread = int(number), int(threads)
    model_quantize(source, target, params)


if __name__ == "__main__":
    main()
