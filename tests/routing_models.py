"""Models whose routing is kept as golden tables in `tests/unit/golden_routes.json`.

transformers' own on the meta device, and small ones in the manner of well-known public code, whose heads and inputs
hide in other places. After a change of routing that was meant, look at every line of the difference:

    python -m tests.routing_models > tests/unit/golden_routes.json && git diff tests/unit/golden_routes.json
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distmuon.layout.routing import route

Table = dict[str, list[str]]


def table(model: nn.Module) -> Table:
    """{"<rule>, <reason>": sorted patterns of the parameters}, numbers in their names left open; vectors left out."""
    found: dict[str, set[str]] = {}
    for spec, _ in route(model):
        if len(spec.shape) > 1:
            matrices = sum(len(matrix.logical_shapes) for matrix in spec.matrices)
            pattern = re.sub(r"(?<![^.])\d+(?![^.])", "*", spec.fqn)
            found.setdefault(f"{spec.rule}, {spec.reason}", set()).add(
                f"{pattern} as {matrices}" if matrices > 1 else pattern
            )
    return {key: sorted(patterns) for key, patterns in sorted(found.items())}


# ------------------------------------------------------------------------------------------------------- transformers


def hugging(name: str, config: str, **given: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import transformers

        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**given))
        return model

    return build


TWO: dict[str, Any] = {"num_hidden_layers": 2}
MOE: dict[str, Any] = {**TWO, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
SEQ2SEQ: dict[str, Any] = {"encoder_layers": 2, "decoder_layers": 2}

# -------------------------------------------------------------------------------------- in the manner of public code


class Block(nn.Module):
    """A transformer block as timm writes it."""

    def __init__(self, width: int = 32, conv: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gamma = nn.Parameter(torch.ones(width, 1, 1))
        if conv:
            self.local = nn.Conv2d(width, width, 3, groups=width)
            self.attention_biases = nn.Parameter(torch.zeros(4, 196))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


class VisionTransformer(nn.Module):
    """DeiT's: class and distillation tokens, a table of positions, two heads."""

    def __init__(self, depth: int = 2, heads: bool = True) -> None:
        super().__init__()
        self.cls_token, self.dist_token = (nn.Parameter(torch.zeros(1, 1, 32)) for _ in range(2))
        self.pos_embed = nn.Parameter(torch.zeros(1, 18, 32))
        self.patch_embed = nn.Sequential(nn.Conv2d(3, 32, 4, stride=4), nn.LayerNorm(32))
        self.blocks = nn.Sequential(*(Block() for _ in range(depth)))
        self.norm = nn.LayerNorm(32)
        if heads:
            self.head, self.head_dist = nn.Linear(32, 10), nn.Linear(32, 10)


class CrossViT(nn.Module):
    """Two towers in lists, and a list of heads of other widths."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleList(nn.Sequential(nn.Conv2d(3, width, 4)) for width in (32, 64))
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "blocks": nn.ModuleList(nn.Sequential(Block(width)) for width in (32, 64)),
                    "projs": nn.ModuleList((nn.Linear(32, 64), nn.Linear(64, 32))),
                }
            )
            for _ in range(2)
        )
        self.norm = nn.ModuleList((nn.LayerNorm(32), nn.LayerNorm(64)))
        self.head = nn.ModuleList((nn.Linear(32, 10), nn.Linear(64, 10)))


class NormLinear(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.bn, self.linear = nn.BatchNorm1d(inputs), nn.Linear(inputs, outputs)


class LeViT(nn.Module):
    """Heads whose layers are inside modules of their own, learned biases of attention, a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Hardswish(), nn.Conv2d(16, 32, 3))
        self.stages = nn.Sequential(Block(conv=True), Block(conv=True))
        self.head, self.head_dist = NormLinear(32, 10), NormLinear(32, 10)


class MaskedAutoencoder(nn.Module):
    """A decoder whose prediction layer is called by no usual name."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = VisionTransformer(heads=False)
        self.decoder_embed = nn.Linear(32, 24)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 24))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 18, 24))
        self.decoder_blocks = nn.ModuleList(Block(24) for _ in range(2))
        self.decoder_norm = nn.LayerNorm(24)
        self.decoder_pred = nn.Linear(24, 48)


class DoubleConv(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 3)
        )


class Up(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.up, self.conv = nn.ConvTranspose2d(inputs, outputs, 2, 2), DoubleConv(inputs, outputs)


class UNet(nn.Module):
    """Numbered attributes in place of a list; the output is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.inc = DoubleConv(3, 16)
        self.down1, self.down2 = (nn.Sequential(nn.MaxPool2d(2), DoubleConv(w, 2 * w)) for w in (16, 32))
        self.up1, self.up2 = Up(64, 32), Up(32, 16)
        self.outc = nn.Conv2d(16, 20, 1)


class DiffusionUNet(nn.Module):
    """The middle is registered after both sides, as a list of the ups is filled late."""

    def __init__(self) -> None:
        super().__init__()
        self.init_conv = nn.Conv2d(3, 16, 7)
        self.time_mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64))
        self.downs = nn.ModuleList([nn.ModuleList([DoubleConv(16, 16), nn.Conv2d(16, 32, 2)])])
        self.ups = nn.ModuleList([nn.ModuleList([DoubleConv(48, 16), nn.Conv2d(16, 16, 3)])])
        self.mid_block1, self.mid_block2 = DoubleConv(32, 32), DoubleConv(32, 32)
        self.final_res_block = DoubleConv(32, 16)
        self.final_conv = nn.Conv2d(16, 3, 1)


class ActorCritic(nn.Module):
    """No repeated block; two heads beside each other, the second a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.policy, self.value = nn.Linear(64, 6), nn.Linear(64, 1)


class RecurrentLanguage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.rnn, self.decoder = nn.Embedding(99, 32), nn.LSTM(32, 48, 2), nn.Linear(48, 99)


class StackedExperts(nn.Module):
    """Experts as torchtitan stacks them, (E, m, n)."""

    class Layer(nn.Module):
        class Experts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.w1, self.w2, self.w3 = (nn.Parameter(torch.zeros(4, *s)) for s in ((24, 32), (32, 24), (24, 32)))

        def __init__(self) -> None:
            super().__init__()
            self.wq, self.wo, self.router = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 8)
            self.experts = self.Experts()

    def __init__(self) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(99, 32)
        self.layers = nn.ModuleDict({str(i): self.Layer() for i in range(2)})
        self.norm, self.output = nn.RMSNorm(32), nn.Linear(32, 99)


class Lora(nn.Linear):
    """loralib's: the adapters are parameters of the linear layer itself."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.lora_A, self.lora_B = (nn.Parameter(torch.zeros(s)) for s in ((32, inputs), (outputs, 32)))


class Reparametrized(nn.Module):
    """Weight norm in both of torch's ways, spectral norm, loralib: what stands for the weight is the matrix."""

    def __init__(self) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.old = nn.utils.weight_norm(nn.Linear(32, 32))
        self.new = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(32, 32))
        self.lora = Lora(32, 32)
        self.attention = nn.MultiheadAttention(32, 4, add_bias_kv=True)
        self.classes = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


MODELS: dict[str, Callable[[], nn.Module]] = {
    "GPT-2": hugging("GPT2LMHeadModel", "GPT2Config", n_layer=2),
    "Llama": hugging("LlamaForCausalLM", "LlamaConfig", **TWO),
    "Qwen2-MoE": hugging("Qwen2MoeForCausalLM", "Qwen2MoeConfig", **MOE, num_key_value_heads=2, num_experts=8),
    "DeepSeek-V3": hugging("DeepseekV3ForCausalLM", "DeepseekV3Config", **TWO, first_k_dense_replace=1),
    "Aria (text)": hugging("AriaTextForCausalLM", "AriaTextConfig", **TWO),
    "Gemma 3": hugging("Gemma3ForConditionalGeneration", "Gemma3Config", text_config=TWO, vision_config=TWO),
    "Mamba": hugging("MambaForCausalLM", "MambaConfig", **TWO),
    "T5": hugging("T5ForConditionalGeneration", "T5Config", num_layers=2),
    "BART, classifier": hugging("BartForSequenceClassification", "BartConfig", **SEQ2SEQ),
    "BERT, masked": hugging("BertForMaskedLM", "BertConfig", **TWO),
    "BERT, questions": hugging("BertForQuestionAnswering", "BertConfig", **TWO),
    "RoBERTa, classifier": hugging("RobertaForSequenceClassification", "RobertaConfig", **TWO),
    "ViT": hugging("ViTForImageClassification", "ViTConfig", **TWO),
    "DeiT with a teacher": hugging("DeiTForImageClassificationWithTeacher", "DeiTConfig", **TWO),
    "ViT-MAE": hugging("ViTMAEForPreTraining", "ViTMAEConfig", **TWO, decoder_num_hidden_layers=2),
    "Swin": hugging("SwinForImageClassification", "SwinConfig", depths=[2, 2], num_heads=[3, 6]),
    "ConvNeXt": hugging("ConvNextForImageClassification", "ConvNextConfig", depths=[2, 1, 1, 1]),
    "ResNet": hugging("ResNetForImageClassification", "ResNetConfig", depths=[2, 2], hidden_sizes=[256, 512]),
    "SegFormer": hugging("SegformerForSemanticSegmentation", "SegformerConfig", depths=[1, 1, 1, 1]),
    "CLIP": hugging("CLIPModel", "CLIPConfig", text_config=TWO, vision_config=TWO),
    "Whisper": hugging("WhisperForConditionalGeneration", "WhisperConfig", **SEQ2SEQ),
    "Wav2Vec2, CTC": hugging("Wav2Vec2ForCTC", "Wav2Vec2Config", **TWO),
    "in the manner of DeiT": VisionTransformer,
    "in the manner of CrossViT": CrossViT,
    "in the manner of LeViT": LeViT,
    "in the manner of MAE": MaskedAutoencoder,
    "U-Net": UNet,
    "U-Net for diffusion": DiffusionUNet,
    "actor and critic": ActorCritic,
    "LSTM": RecurrentLanguage,
    "stacked experts": StackedExperts,
    "reparametrized": Reparametrized,
}


if __name__ == "__main__":
    print(json.dumps({name: table(build()) for name, build in MODELS.items()}, indent=1))
