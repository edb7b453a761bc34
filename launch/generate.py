"""Let a trained model go on with a prompt: from a run's newest checkpoint, or from an exported folder.

    python -m launch.generate runs/first --prompt 'def main('
    python -m launch.generate exported/first --tokens 200 --temperature 0

Runs on the GPU if there is one. Text is transformers' `generate`; for anything beyond these options export the run.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from distmuon.errors import problem
from launch.config import DataConfig
from launch.export import load_run
from launch.failures import run_program
from launch.run import CONFIG_FILE
from launch.tokenization import tokenizer_of


def load(folder: Path, tokenizer: str | None) -> tuple[Any, Any]:
    """(model, tokenizer) of a run or of an exported folder; `tokenizer` is a name for data that have none."""
    if (folder / CONFIG_FILE).is_file() or not (folder / "config.json").is_file():
        model, config, _ = load_run(folder)
        found = tokenizer_of(config.data)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
        found = AutoTokenizer.from_pretrained(folder) if (folder / "tokenizer_config.json").is_file() else None
    if tokenizer is not None:
        found = tokenizer_of(DataConfig(source="hf", tokenizer=tokenizer))
    if found is None:
        raise problem(
            str(folder),
            found="found a model of token shards, which do not say how to read them",
            needed="text needs a tokenizer",
            cure="name it: --tokenizer gpt2, for instance",
        )
    return model, found


def generate(model: Any, tokenizer: Any, prompt: str, *, tokens: int, temperature: float, seed: int) -> str:
    """`prompt` and at most `tokens` tokens behind it; a temperature of 0 takes the likeliest token each time."""
    ids = tokenizer.encode(prompt, add_special_tokens=False) or [tokenizer.eos_token_id]
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and len(ids) + tokens > longest:
        raise problem(
            "--tokens",
            found=f"found {tokens} behind a prompt of {len(ids)} tokens",
            needed=f"the model was trained on sequences of {longest}",
            cure=f"ask for at most {max(0, longest - len(ids))}",
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    transformers.set_seed(seed)
    (found,) = (
        model.eval()
        .to(device)
        .generate(
            input_ids=torch.tensor([ids], device=device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64, device=device),
            max_new_tokens=tokens,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
            use_cache=True,
            **sampling,
        )
    )
    text: str = tokenizer.decode(found[len(ids) :], skip_special_tokens=True)
    return prompt + text


def main(argv: list[str] | None = None) -> None:
    """Print what the model that the command line names writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="log.dir of a run with checkpoints, or a folder of launch.export")
    parser.add_argument("--prompt", default="", help="the beginning; default: that of a document")
    parser.add_argument("--tokens", type=int, default=100, help="tokens to write (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", help="name or folder, for a model of token shards")
    given = parser.parse_args(argv)
    model, tokenizer = load(given.folder, given.tokenizer)
    text = generate(model, tokenizer, given.prompt, tokens=given.tokens, temperature=given.temperature, seed=given.seed)
    print(text)


if __name__ == "__main__":
    run_program(main)
