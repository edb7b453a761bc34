"""Make a Hugging Face folder of a run's newest checkpoint, which `from_pretrained` loads.

    python -m launch.export runs/first --out exported/first

The tokenizer goes with it, that of byte-level text included; token shards have none. Needs one process and the memory
of the model with its optimizer state. The run's own folder says which model it is, so no data is read.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import distmuon
from distmuon.errors import problem
from launch.config import Config, ParallelConfig, parse
from launch.failures import run_program
from launch.resume import FOLDER
from launch.run import CONFIG_FILE, optimizer_options
from launch.tokenization import tokenizer_of


def export(run: Path, out: Path) -> str:
    """Write `out`; return where the weights are from."""
    model, config, checkpoint = load_run(run)
    tokenizer = tokenizer_of(config.data)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
        for settings in (model.config, model.generation_config):  # `generate` ends there
            settings.eos_token_id, settings.bos_token_id = tokenizer.eos_token_id, tokenizer.bos_token_id
    model.save_pretrained(out)
    return str(checkpoint)


def load_run(run: Path) -> tuple[Any, Config, Path]:
    """(model, config, checkpoint) of the newest complete checkpoint of a run."""
    if not (run / CONFIG_FILE).is_file() or distmuon.latest_checkpoint(run / FOLDER) is None:
        raise problem(
            str(run),
            found=f"found no {CONFIG_FILE}" if not (run / CONFIG_FILE).is_file() else "found no complete checkpoint",
            needed="the folder of a run with checkpoints is needed",
            cure="run launch.pretrain with --checkpoint.every",
        )
    config = parse(["--config", str(run / CONFIG_FILE)])
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(run), dtype=getattr(torch, config.model.dtype))
    whole = replace(config, parallel=ParallelConfig())
    optimizer = distmuon.DistMuon(model, **optimizer_options(whole))
    found = distmuon.load_checkpoint(run / FOLDER, model, optimizer)
    optimizer.synchronize()
    return model, config, found.path


def main(argv: list[str] | None = None) -> None:
    """Export what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="log.dir of a run with checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args(argv)
    print(f"{arguments.out}: exported from {export(arguments.run, arguments.out)}")


if __name__ == "__main__":
    run_program(main)
