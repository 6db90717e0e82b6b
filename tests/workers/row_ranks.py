"""One rank that decodes a part of the picture's rows over gloo.

    row_ranks.py FOLDER RANKS RANK

The folder has "given.pt"; "PART-DTYPE.pt" are made. Without the VAE, as diffusers takes long to import: its one other
exchange, attention, is called by itself. Then rank 0 ends, and the others must hear of it.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional as F

from dualparal.distributed.messages import PeerLost
from dualparal.distributed.rows import RankRows
from dualparal.models.wan.light_decoder import LightDecoder
from dualparal.models.wan.light_sizes import LightSizes
from dualparal.models.wan.rows import OverRows

folder, ranks, rank = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
store = dist.FileStore(str(folder / "store"), ranks)
dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=40))
order = list(reversed(range(ranks)))  # a part's rank need not be its number
group = dist.new_group(order)
rows = RankRows(group, order, order.index(rank))
given = torch.load(folder / "given.pt")
latents, queries, keys, values = (given[name] for name in ("latents", "queries", "keys", "values"))
for dtype in (torch.float32, torch.bfloat16):
    tensors = {name: tensor.to(dtype) for name, tensor in given["tensors"].items()}
    decoder = LightDecoder(LightSizes(*given["sizes"]), tensors, rows)
    frames = torch.cat([decoder.push(piece) for piece in latents.split([1, 2], dim=2)])
    over = OverRows(rows)
    over.begin(latents.shape[3])
    with over:
        own = slice(over.part.start * latents.shape[4], over.part.stop * latents.shape[4])
        attended = F.scaled_dot_product_attention(*(tensor.to(dtype)[:, :, own] for tensor in (queries, keys, values)))
    torch.save((frames, attended), folder / f"{rows.index}-{dtype}.pt")
if rank == 0:
    os._exit(0)  # and is not heard of again
try:
    while True:
        decoder.push(latents)
except PeerLost as error:
    assert str(error).startswith(f"rows of part {rows.index} with "), error
os._exit(0)
