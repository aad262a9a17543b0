"""What it costs to verify an answer by re-execution, against generating it, in the same run on the same cores."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from benchmarks.rows import Row, median_seconds
from poip_chain.proof.reexecution import Answer, TorchSource
from poip_chain.service.engine.noise import gumbel_array, uniform_bits_array

PROMPT_TOKENS, OUTPUT_TOKENS = 64, 64


def run(model_directory: Path) -> list[Row]:
    """One prefill in fp32 against token-by-token generation of the same answer by the same library."""
    source = TorchSource(model_directory, threads=max(1, len(os.sched_getaffinity(0))))
    answer = Answer(tuple(range(1000, 1000 + PROMPT_TOKENS)), tuple(range(2000, 2000 + OUTPUT_TOKENS)))

    def verify() -> None:
        for _ in source.rows([answer]):
            pass

    def verify_eight() -> None:
        for _ in source.rows([answer] * 8):
            pass

    alone = median_seconds(verify)
    together = median_seconds(verify_eight, repeats=3) / 8
    generation = _generation_seconds(source, answer)
    rows = []
    for what, seconds in (("one answer", alone), ("eight answers in one forward, each", together)):
        rows.append(
            Row(
                f"verification of {what}",
                OUTPUT_TOKENS / seconds,
                "tokens/s",
                f"prefill of {PROMPT_TOKENS} + {OUTPUT_TOKENS} tokens, torch fp32, logits of every output position",
                compared_with="torch fp32 generating the same tokens one by one, with a cache",
                ratio=seconds / generation,
            )
        )
    rows.append(_noise_row(source))
    return rows


def _generation_seconds(source: TorchSource, answer: Answer) -> float:
    model = source.model
    with torch.inference_mode():
        begin = time.perf_counter()
        output = model(input_ids=torch.tensor([answer.prompt_ids]), use_cache=True)
        for token in answer.output_ids[:-1]:
            output = model(input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values, use_cache=True)
        return time.perf_counter() - begin


def _noise_row(source: TorchSource) -> Row:
    import numpy as np

    vocabulary = source.model.config.vocab_size
    ids = np.arange(vocabulary, dtype=np.int64)
    keys = np.full(vocabulary, 1234567, dtype=np.uint64)
    seconds = median_seconds(lambda: gumbel_array(uniform_bits_array(keys, ids)))
    return Row(
        "exact noise of a whole vocabulary",
        1000 * seconds,
        "ms/token",
        f"all {vocabulary} integer Gumbel values of one position, numpy, median of 5",
    )
