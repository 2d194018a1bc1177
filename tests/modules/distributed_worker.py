"""One of two processes: DistributedDataParallel over the modules that the test has pickled. Arguments: folder, rank."""

import pickle
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Loss(torch.nn.Module):
    """What DistributedDataParallel can wrap to train by ``loss``: a module whose forward pass it is."""

    def __init__(self, sae):
        super().__init__()
        self.sae = sae

    def forward(self, x, target, variance):
        return self.sae.loss(x, target, variance).total


def half(tensor, rank):
    return None if tensor is None else tensor.chunk(2)[rank]


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def run(sae, x, target, rank):
    """Gradients of a mean squared error and of the loss; then states along some steps."""
    mine, wanted = half(x, rank), half(target, rank)
    parallel = DistributedDataParallel(sae)
    (parallel(mine) - (mine if wanted is None else wanted)).square().mean().backward()
    found = {"forward": gradients(sae)}
    sae.zero_grad()
    parallel = DistributedDataParallel(Loss(sae))
    variance = sae.variance_of(x if target is None else target)  # of the whole batch, which a real run would reduce
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for step in range(2):
        optimizer.zero_grad()
        parallel(mine, wanted, variance).backward()
        if step == 0:
            found["loss"] = gradients(sae)
        optimizer.step()
    found["after"] = {name: t.clone() for name, t in sae.state_dict().items()}
    parallel.eval()(mine, wanted, variance)
    found["synchronized"] = {name: t.clone() for name, t in sae.state_dict().items()}
    return found


def main(folder, rank):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    work = pickle.loads((folder / "work.pickle").read_bytes())
    found = {name: run(*given, rank) for name, given in work.items()}
    (folder / f"found.{rank}").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
