"""Models whose table of `distmuon route` is kept as text in `tests/unit/golden_route_tables.txt`.

After a change of routing or of the table that was meant, look at every line of the difference:

    python -m tests.route_tables > tests/unit/golden_route_tables.txt && git diff tests/unit/golden_route_tables.txt
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from distmuon.cli.route import make_table, text
from tests.routing_models import MODELS, MOE, TWO, hugging


def lora() -> nn.Module:
    """A Llama whose trainable parameters are adapters of peft."""
    import peft

    model = hugging("LlamaForCausalLM", "LlamaConfig", **{**MOE, "num_attention_heads": 4})()
    with torch.device("meta"):
        adapted: nn.Module = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    return adapted


TABLES: dict[str, Callable[[], nn.Module]] = {
    **{name: MODELS[name] for name in ("GPT-2", "Llama", "DeepSeek-V3", "ViT", "ResNet", "Mamba")},
    "Qwen3-MoE": hugging("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **TWO, num_experts=8),
    "LoRA": lora,
}


def shown(name: str) -> str:
    """The table of a model, without blanks at the ends of lines."""
    return "\n".join(line.rstrip() for line in text(name, make_table(TABLES[name]())).splitlines())


def golden(content: str) -> dict[str, str]:
    """{model: table} of the golden file."""
    parts = [part.partition("\n") for part in content.split("== ")[1:]]
    return {name: table.strip("\n") for name, _, table in parts}


if __name__ == "__main__":
    print("\n\n".join(f"== {name}\n{shown(name)}" for name in TABLES))
