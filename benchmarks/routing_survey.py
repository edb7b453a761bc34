"""How many public models default routing accepts, on the meta device; and what it decides, to be read.

    python -m benchmarks.routing_survey causal timm        one line a refused model, with its reason, and the counts
    python -m benchmarks.routing_survey causal --read      every decision for AdamW that is no embedding, norm or vector

Sets: "causal", "masked", "seq2seq", "image", "sequence", "questions" (transformers: the first class of each model type,
default configuration, cut to 2 layers), "timm" (the first model of each of its modules, needs timm) and "torchvision".
A model whose default configuration cannot be built is counted apart.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from distmuon.layout.routing import Routed, route

Builders = Iterator[tuple[str, Callable[[], nn.Module]]]
MAPPINGS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "questions": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
}
_DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
)
_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")


@dataclass
class Survey:
    """`accepted`: name -> what was routed; `refused`: name -> the error; `unbuilt`: names."""

    accepted: dict[str, Routed] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unbuilt: list[str] = field(default_factory=list)


def survey(which: str) -> Survey:
    found = Survey()
    builders = {"timm": _timm, "torchvision": _torchvision}.get(which, lambda: _transformers(MAPPINGS[which]))()
    for name, build in builders:
        try:
            with warnings.catch_warnings(), torch.device("meta"):
                warnings.simplefilter("ignore")
                model = build()
        except Exception:  # whatever a default configuration lacks is that model's affair
            found.unbuilt.append(name)
            continue
        try:
            found.accepted[name] = route(model)
        except ValueError as error:
            found.refused[name] = str(error)
    return found


def to_read(routed: Routed) -> Iterator[str]:
    """Lines of what AdamW takes though it has the shape of a matrix, numbers left open, each once."""
    usual = ("embedding", "vector", "normalization", "depthwise", "fewer than 2", "bias by", "table of", "scale by")
    seen = set()
    for spec, _ in routed:
        line = f"{re.sub(r'(?<![^.])[0-9]+(?![^.])', '*', spec.fqn)} {spec.shape} {spec.reason}"
        if spec.rule == "adamw" and not spec.reason.startswith(usual) and line not in seen:
            seen.add(line)
            yield line


def _transformers(mapping: str) -> Builders:
    from transformers.models.auto import modeling_auto

    def build(config: Any, model: Any) -> nn.Module:
        model = model[0] if isinstance(model, (list, tuple)) else model
        try:
            return model(_cut(config()))  # type: ignore[no-any-return]
        except Exception:  # some want to know the depth when they are made
            return model(config(num_hidden_layers=2))  # type: ignore[no-any-return]

    for config, model in getattr(modeling_auto, mapping).items():
        yield config.model_type or config.__name__, partial(build, config, model)


def _cut(config: Any) -> Any:
    """`config` and those in it, 2 layers deep."""
    inner = [getattr(config, key, None) for key in dir(config) if key.endswith("_config")]
    for each in [config, *(one for one in inner if hasattr(one, "to_dict"))]:
        for key in _DEPTHS:
            if isinstance(getattr(each, key, None), int) and getattr(each, key) > 2:
                with contextlib.suppress(Exception):  # a property without a setter
                    setattr(each, key, 2)
        for key in _LISTS:
            if isinstance(getattr(each, key, None), list):
                with contextlib.suppress(Exception):
                    setattr(each, key, getattr(each, key)[:2])
    return config


def _timm() -> Builders:
    import timm

    for module in timm.list_modules():
        for name in timm.list_models(module=module)[:1]:
            yield module, partial(timm.create_model, name)


def _torchvision() -> Builders:
    import torchvision

    for name in torchvision.models.list_models(module=torchvision.models):
        yield name, partial(torchvision.models.get_model, name)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=[*MAPPINGS, "timm", "torchvision"])
    parser.add_argument("--read", action="store_true", help="print what AdamW takes of each model")
    given = parser.parse_args(arguments)
    logging.disable(logging.CRITICAL)
    for which in given.sets:
        found = survey(which)
        for name, routed in found.accepted.items() if given.read else ():
            print(f"{which} {name}", *to_read(routed), sep="\n    ")
        for name, error in found.refused.items():
            print(f"{which} {name} refused: {error}")
        print(f"{which}: {len(found.accepted)} accepted, {len(found.refused)} refused, {len(found.unbuilt)} not built")


if __name__ == "__main__":
    main(sys.argv[1:])
