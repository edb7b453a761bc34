"""The kind of a parameter, for curves that stand for all layers: q, k, v, o, gate, up, down, embedding, ...

Told from the name alone. A name that no rule knows stands for itself, so that nothing is thrown together wrongly.
"""

from __future__ import annotations

import re
from functools import lru_cache

# First match wins; patterns see the name without layer numbers and without a last ".weight".
_KINDS: tuple[tuple[str, str], ...] = (
    (r"\.bias$|^bias$", "bias"),
    (r"norm\w*$|(^|[._])ln(_\w+)?$", "norm"),
    (r"lm_head$|(^|\.)head$", "head"),
    (r"(^|[._])(emb\w*|wte|wpe)(\.|$)", "embedding"),
    (r"shared_experts?\.(?P<x>\w+?)(_proj)?$", "shared expert {x}"),
    (r"experts\.(?P<x>\w+?)(_proj)?$", "expert {x}"),
    (r"(mlp|moe|ffn)\.(gate|router)$", "router"),
    (r"(attn|attention)\.c_proj$|(^|[._])(o|out)_proj$|(^|\.)wo$", "o"),
    (r"c_attn$|(^|[._])(qkv|query_key_value)(_proj)?$", "qkv"),
    (r"(^|[._])(?P<x>[qkv])(_proj|_lin)?$|(^|\.)w(?P<y>[qkv])$", "{x}{y}"),
    (r"(^|[._])query$", "q"),
    (r"(^|[._])key$", "k"),
    (r"(^|[._])value$", "v"),
    (r"gate_up_proj$", "gate and up"),
    (r"(^|[._])gate_proj$", "gate"),
    (r"mlp\.c_fc$|(^|[._])up_proj$", "up"),
    (r"mlp\.c_proj$|(^|[._])down_proj$", "down"),
)


@lru_cache(maxsize=1 << 16)
def kind(name: str) -> str:
    """The kind of the parameter `name`, equal for all layers."""
    bare = ".".join(part for part in name.split(".") if not part.isdigit()).removesuffix(".weight")
    for pattern, label in _KINDS:
        if found := re.search(pattern, bare):
            parts = found.groupdict()
            return label.format(x=parts.get("x") or "", y=parts.get("y") or "")
    return bare.rpartition(".")[2]


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
