"""A whole training script. Copy it, then:  torchrun --standalone --nproc_per_node=2 minimal.py"""

import os

import torch
import torch.distributed as dist
from torch import nn

import distmuon  # before init_process_group

gpu = torch.cuda.is_available()  # one GPU a process, or CPUs
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
torch.manual_seed(dist.get_rank())  # each rank draws its own batches; all ranks get rank 0's weights

with open(nn.functional.__file__, "rb") as file:  # the text to learn: a source file of torch
    text = torch.tensor(list(file.read()), device=device)


class ByteModel(nn.Module):
    def __init__(self, width: int = 128, length: int = 64) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1], device=ids.device)
        hidden = self.bytes(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        logits: torch.Tensor = self.head(self.layers(hidden, mask=mask, is_causal=True))
        return logits


model = ByteModel().to(device)
optimizer = distmuon.DistMuon(model, lr=4e-3, weight_decay=0.1)  # Muon for hidden matrices, AdamW for the rest
if dist.get_rank() == 0:
    print(optimizer.report(full=True))  # which parameter is updated by which rule, and why
for step in range(1, 61):
    starts = torch.randint(len(text) - 65, (16,))
    window = torch.stack([text[start : start + 65] for start in starts])
    loss = nn.functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
    loss.backward()  # gradients are averaged over the ranks meanwhile
    norm = optimizer.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 and dist.get_rank() == 0:
        print(f"step {step}  loss {loss.item():.3f}  gradient norm {norm.item():.2f}")
if dist.get_rank() == 0:
    torch.save(model.state_dict(), "minimal.pt")  # the parameters are whole on every rank
dist.destroy_process_group()
