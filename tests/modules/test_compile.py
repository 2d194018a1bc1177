"""``torch.compile`` of every architecture: no graph break, and values, gradients and counters as without it."""

import copy

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def assert_same_training(mine, theirs, batches, compiled):
    """Losses, gradients and counters of `mine`, by `compiled`, and of `theirs` are equal batch by batch."""
    for batch in batches:
        loss, expected = compiled(*batch), theirs.loss(*batch).total
        torch.testing.assert_close(loss, expected)
        loss.backward()
        expected.backward()
        for (name, parameter), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            assert (parameter.grad is None) == (other.grad is None), name
            if other.grad is not None:
                torch.testing.assert_close(parameter.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")
        for (name, buffer), other in zip(mine.named_buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(buffer, other, msg=lambda text, name=name: f"{name}: {text}")


def test_training_compiles_to_one_graph(architecture):
    sae = architecture.used()
    eager = copy.deepcopy(sae)
    compiled = torch.compile(lambda *batch: sae.loss(*batch).total, fullgraph=True, backend="aot_eager")
    # Latents die in the course of it, and penalties warm up: a backward pass must not see counters of the next batch.
    assert_same_training(sae, eager, [architecture.batch(seed=seed) for seed in range(2)], compiled)


# Of each kind one: evaluation leaves out of the graphs of training what differs inside a kind.
@pytest.mark.parametrize(
    "architecture",
    ["topk_multi", "batchtopk", "jumprelu", "gated", "transcoder", "crosscoder", "cross_layer", "switch", "h_sae"],
    indirect=True,
)
def test_encode_decode_and_loss_compile_to_one_graph(architecture):
    sae = architecture.used().eval()
    x, *target = architecture.batch()

    def outputs(x, *target):
        return sae.decode(sae.encode(x)), sae.loss(x, *target).total

    compiled = torch.compile(outputs, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *target), outputs(x, *target))


@pytest.mark.parametrize("architecture", ["topk"], indirect=True)
def test_no_dead_latent_and_all_of_them_dead(architecture):
    for dead_after in (10**9, 1):
        sae = architecture.used()
        sae.dead_after = dead_after
        sae.tokens_since_fired += 1
        eager = copy.deepcopy(sae)
        compiled = torch.compile(lambda *batch, sae=sae: sae.loss(*batch).total, fullgraph=True, backend="aot_eager")
        assert_same_training(sae, eager, [architecture.batch()], compiled)


@pytest.mark.parametrize("architecture", ["batchtopk"], indirect=True)
def test_other_batch_sizes_and_modes_need_no_graph_break(architecture):
    sae = architecture.used()
    eager = copy.deepcopy(sae)
    compiled = torch.compile(lambda *batch: sae.loss(*batch).total, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        sae.train(training), eager.train(training)
        assert_same_training(sae, eager, [architecture.batch(rows) for rows in (24, 7)], compiled)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["relu_warming"], indirect=True)
def test_inductor_agrees(architecture):
    sae = architecture.used()
    eager = copy.deepcopy(sae)
    compiled = torch.compile(lambda *batch: sae.loss(*batch).total, fullgraph=True, backend="inductor")
    assert_same_training(sae, eager, [architecture.batch(seed=seed) for seed in range(2)], compiled)
