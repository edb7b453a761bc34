"""The tokenizer behind a run's tokens, as transformers has it: for prompts, samples and the exported folder."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from distmuon.errors import problem
from launch.config import DataConfig

END = "<|endofdocument|>"
"""The separator of byte-level documents, byte 0, as it is written in a prompt."""


def tokenizer_of(data: DataConfig) -> Any:
    """A transformers tokenizer; None for token shards, which do not say who wrote them. Raises for a wrong name."""
    if data.source == "bin":
        return None
    if data.source == "stdlib" or data.tokenizer == "bytes":
        return byte_tokenizer()
    try:
        return AutoTokenizer.from_pretrained(data.tokenizer)
    except (OSError, ValueError) as error:
        raise problem(
            "data.tokenizer",
            found=f"found {data.tokenizer!r}, for which transformers says: {first_line(error)}",
            needed='"bytes", a tokenizer\'s name or its local folder is needed',
            cure="correct data.tokenizer",
        ) from error


def byte_tokenizer() -> Any:
    """A token is a byte of UTF-8, and byte 0 ends a document."""
    characters = bytes_to_unicode()  # the byte-level alphabet of GPT-2
    vocabulary = {END if byte == 0 else character: byte for byte, character in characters.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, clean_up_tokenization_spaces=False)


def first_line(error: Exception) -> str:
    """What another library says, without its advice."""
    return str(error).strip().partition("\n")[0].rstrip(".;")
