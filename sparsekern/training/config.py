"""The options of a trainer and of a training run."""

from __future__ import annotations

from dataclasses import dataclass

from sparsekern.options import Options, option


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(Options):
    """Options of :class:`sparsekern.Trainer`."""

    optimizer: str = option("adam", "update rule", choices=("adam",))
    lr: float | None = option(None, "peak learning rate; by default 2e-4 / sqrt(d_sae / 2**14)", above=0)
    beta1: float = option(0.9, "decay of Adam's first moment", at_least=0, below=1)
    beta2: float = option(0.999, "decay of Adam's second moment", at_least=0, below=1)
    eps: float = option(1e-8, "Adam's epsilon", above=0)
    clip_norm: float = option(1.0, "bound on the global gradient norm, 0 for none", at_least=0)
    rest_after: int | None = option(
        None,
        "without a gradient, a latent's weights are left alone until it has one again; by default never",
        unit="steps",
        at_least=1,
    )
    steps: int | None = option(None, "length of the run; without it the learning rate never decays", at_least=1)
    warmup_steps: int | None = option(
        None, "linear warm-up; by default 1000 or a twentieth of the run, whichever is less", unit="steps", at_least=0
    )
    decay_share: float = option(
        0.2, "final share of the run over which the learning rate falls to 0", at_least=0, at_most=1
    )
    fit_start: bool = option(True, "fit b_dec and the encoder's scale to the first batch, if both biases are still 0")
    validate: bool = option(
        False, "look for NaN and infinity in every batch at once, also on a GPU, which waits for it; a CPU always does"
    )
    cuda_graph: bool = option(
        False, "on a GPU, replay a step as one CUDA graph; pays where kernels are short. Not yet tried on a device"
    )
    b_dec_init: str = option("geometric_median", "where that puts b_dec", choices=("geometric_median", "mean", "zeros"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TrainerConfig):
    """Options of :func:`sparsekern.train`: those of its trainer, and of the loop around it."""

    steps: int = option(1000, "length of the run", at_least=1)
    batch_size: int = option(2048, "tokens a step", unit="tokens", at_least=2)
    held_out: float = option(0.05, "share of the contexts kept for evaluation", above=0, below=1)
    eval_tokens: int = option(65536, "held-out tokens measured, at most", unit="tokens", at_least=2)
    seed: int = option(0, "seed of the weights, the split and the order of the data", at_least=0)
    log_every: int = option(10, "between two rows of metrics.jsonl", unit="steps", at_least=1)
    eval_every: int = option(250, "between two evaluations on held-out tokens", unit="steps", at_least=1)
    checkpoint_every: int = option(500, "between two checkpoints", unit="steps", at_least=1)
    keep_checkpoints: int = option(2, "checkpoints kept, the newest", at_least=1)
    logger: str = option("none", "where metrics go besides metrics.jsonl", choices=("none", "tensorboard", "wandb"))
