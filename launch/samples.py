"""A short text sampled from the model in training, so that a reader sees what it has learnt. Changes nothing.

All ranks compute all forwards, since those of FSDP2 and of tensor parallelism are collective, and go on with the token
that rank 0 has drawn. The draws have a generator of their own.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from launch.config import Config
from launch.ranks import Ranks

TEMPERATURE = 0.8


@torch.no_grad()
def sample(model: nn.Module, tokenizer: Any, config: Config, ranks: Ranks) -> str:
    """What the model writes behind `log.sample_prompt`, up to the end of the document. Collective.

    Each token is a forward of all before it, without a cache: those that training uses have none.
    """
    log, seq_len = config.log, config.model.seq_len
    end = tokenizer.eos_token_id
    generator = torch.Generator().manual_seed(config.train.seed)
    prompt = tokenizer.encode(log.sample_prompt, add_special_tokens=False) or [end]
    tokens = list(prompt)
    model.eval()
    # compiled graphs are for the shapes of training
    with torch.compiler.set_stance("force_eager") if config.model.compile else nullcontext():
        while len(tokens) < len(prompt) + log.sample_tokens:
            window = torch.tensor([tokens[-seq_len:]], device=ranks.device)
            logits = model(input_ids=window).logits[0, -1, : len(tokenizer)]
            drawn = _draw(logits, end, generator) if ranks.rank == 0 else 0
            token = int(ranks.sum(torch.tensor(drawn, device=ranks.device)))
            if token == end:
                break
            tokens.append(token)
    model.train()
    text: str = tokenizer.decode(tokens[len(prompt) :])
    return text


def _draw(logits: Tensor, end: int, generator: torch.Generator) -> int:
    """A token; the end where the model has diverged and none is likelier than another."""
    probabilities = torch.softmax(logits.float() / TEMPERATURE, dim=0).cpu()
    if not torch.isfinite(probabilities).all():
        return end
    return int(torch.multinomial(probabilities, 1, generator=generator))
