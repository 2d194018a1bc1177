"""The loss recovered: known values, the definition, and that padding changes nothing."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparsekern as sk
from sparsekern.training import loss_recovered

D, V = 8, 13


class LanguageModel(nn.Module):
    """Attends causally, by a running mean of what is not masked; block 1 is where the meaning passes."""

    causal = True

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(V, D)
        self.blocks = nn.ModuleList([nn.Linear(D, D) for _ in range(2)])
        self.unused = nn.Linear(D, D)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(D, V)

    def forward(self, input_ids, attention_mask=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        h = self.embedding(input_ids) * mask[..., None]
        running = h.cumsum(1) / mask.cumsum(1).clamp_min(1)[..., None]
        mean = running if self.causal else h.mean(1, keepdim=True)
        for block in self.blocks:
            h = block(h + mean).tanh() * 2
        return SimpleNamespace(logits=self.head(self.dropout(h)))


@pytest.fixture
def model():
    model = LanguageModel()
    with torch.no_grad():
        model.head.weight.mul_(4)
        model.blocks[1].bias.normal_()
    return model


@pytest.fixture
def batches():
    return [torch.randint(0, V, (3, 7)), {"input_ids": torch.randint(0, V, (2, 5))}]


def linear_sae(scale=1.0, bias=0.0):
    """``x̂ = scale · x + bias``, through one latent for each direction and sign."""
    sae = sk.SAE(D, 2 * D, sk.TopK(D), pre_bias=False)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
        sae.W_dec.copy_(scale * sae.W_enc)
        sae.b_dec.copy_(torch.as_tensor(bias).expand(D))
    return sae


def rows_of(model, batches):
    """Outputs of block 1 on all tokens."""
    seen = []
    handle = model.blocks[1].register_forward_hook(lambda *args: seen.append(args[2].flatten(0, 1)))
    for batch in batches:
        model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    return torch.cat(seen)


def test_a_perfect_sae_recovers_everything(model, batches):
    measured = loss_recovered(model, "blocks.1", linear_sae(), batches)
    assert measured.tokens == 3 * 6 + 2 * 4
    assert measured.ce_spliced == pytest.approx(measured.ce_clean, rel=1e-6)
    assert measured.kl == pytest.approx(0, abs=1e-6)
    assert measured.recovered_from_zero == pytest.approx(1, abs=1e-4)
    assert measured.recovered_from_mean == pytest.approx(1, abs=1e-4)
    assert len({measured.ce_clean, measured.ce_zero, measured.ce_mean}) == 3


def test_zeros_and_the_mean_recover_nothing(model, batches):
    measured = loss_recovered(model, "blocks.1", linear_sae(scale=0), batches)
    assert measured.recovered_from_zero == pytest.approx(0, abs=1e-6)
    assert measured.recovered_from_mean != pytest.approx(0, abs=1e-3)
    mean = rows_of(model, batches).double().mean(0)
    measured = loss_recovered(model, "blocks.1", linear_sae(scale=0, bias=mean), batches)
    assert measured.recovered_from_mean == pytest.approx(0, abs=1e-4)


def test_measures_equal_their_definitions(model, batches):
    sae = sk.SAE(D, 24, sk.TopK(2))
    measured = loss_recovered(model, "blocks.1", sae, iter(batches))
    model.eval()
    ids = [batch["input_ids"] if isinstance(batch, dict) else batch for batch in batches]

    def log_probabilities(context):
        with context:
            return torch.cat([model(one).logits[:, :-1].flatten(0, 1) for one in ids]).double().log_softmax(1)

    clean = log_probabilities(torch.no_grad())
    spliced = log_probabilities(sk.splice(model, "blocks.1", sae))
    targets = torch.cat([one[:, 1:].flatten() for one in ids])
    cross_entropy = nn.functional.nll_loss
    assert measured.ce_clean == pytest.approx(cross_entropy(clean, targets).item(), rel=1e-5)
    assert measured.ce_spliced == pytest.approx(cross_entropy(spliced, targets).item(), rel=1e-5)
    kl = nn.functional.kl_div(spliced, clean, log_target=True, reduction="batchmean").item()
    assert measured.kl == pytest.approx(kl, rel=1e-4)
    assert measured.kl > 1e-3
    plain = measured.to_dict()
    lost = plain["ce_zero"] - plain["ce_clean"]
    assert plain["recovered_from_zero"] == pytest.approx((plain["ce_zero"] - plain["ce_spliced"]) / lost)
    assert plain["recovered_from_mean"] == measured.recovered_from_mean


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_neither_counts_nor_is_replaced(model, side):
    contexts, sae = [torch.randint(0, V, (1, n)) for n in (2, 6, 1, 9)], sk.SAE(D, 24, sk.TopK(2))
    ids, mask = torch.full((4, 9), 3), torch.zeros(4, 9, dtype=torch.int64)
    for row, context in enumerate(contexts):
        n = context.shape[1]
        here = slice(9 - n, 9) if side == "left" else slice(n)
        ids[row, here], mask[row, here] = context[0], 1
    padded = loss_recovered(model, "blocks.1", sae, [{"input_ids": ids, "attention_mask": mask}]).to_dict()
    apart = loss_recovered(model, "blocks.1", sae, contexts).to_dict()
    assert padded == pytest.approx(apart, rel=1e-4)
    assert padded["tokens"] == 1 + 5 + 8


def test_special_tokens_are_not_replaced(model):
    ids = torch.randint(0, V, (2, 6))
    special = torch.zeros_like(ids)
    special[:, 0] = 1
    batch = {"input_ids": ids, "special_tokens_mask": torch.ones_like(ids)}
    with pytest.raises(ValueError, match="or all tokens are special"):
        loss_recovered(model, "blocks.1", linear_sae(), [batch])
    model.eval()
    with sk.splice(model, "blocks.1", linear_sae(scale=0), where=1 - special):
        wanted = model(ids).logits[:, :-1].flatten(0, 1)
    measured = loss_recovered(model, "blocks.1", linear_sae(scale=0), [batch | {"special_tokens_mask": special}])
    assert measured.ce_spliced == pytest.approx(nn.functional.cross_entropy(wanted, ids[:, 1:].flatten()).item())
    assert measured.ce_spliced == pytest.approx(measured.ce_zero)


def test_modes_are_put_back_and_progress_ends(model, batches):
    sae, calls = linear_sae(), []
    model.train()
    model.blocks.eval()
    sae.eval()
    loss_recovered(model, "blocks.1", sae, batches, progress=lambda *call: calls.append(call))
    assert model.training
    assert model.dropout.training
    assert not model.blocks[1].training
    assert not sae.training
    assert calls[-1] == (52, 52)
    assert not model.blocks[1]._forward_hooks


def test_logits_that_rule_tokens_out_are_no_trouble(model, batches):
    with torch.no_grad():
        model.head.bias[V - 1] = -torch.inf
    batches = [torch.randint(0, V - 1, (3, 5))]
    assert loss_recovered(model, "blocks.1", linear_sae(), batches).kl == pytest.approx(0, abs=1e-6)


def test_what_cannot_be_measured_is_refused(model, batches):
    sae = linear_sae()
    with pytest.raises(ValueError, match=r"nearest names: blocks.1"):
        loss_recovered(model, "block.1", sae, batches)
    with pytest.raises(ValueError, match="'unused' does not run"):
        loss_recovered(model, "unused", sae, batches)
    with pytest.raises(ValueError, match="nothing to predict"):
        loss_recovered(model, "blocks.1", sae, [torch.zeros(3, 1, dtype=torch.int64)])
    with pytest.raises(ValueError, match=r"input_ids \[batch, positions\], got \(4,\)"):
        loss_recovered(model, "blocks.1", sae, [torch.zeros(4, dtype=torch.int64)])
    model.causal = False
    with pytest.raises(ValueError, match="sees the tokens that it would have to predict"):
        loss_recovered(model, "blocks.1", sae, batches)


def test_models_of_transformers(batches):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=V, n_positions=16, n_embd=D, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    measured = loss_recovered(model, "transformer.h.1", linear_sae(), batches)
    assert measured.recovered_from_zero == pytest.approx(1, abs=1e-3)
    assert measured.kl == pytest.approx(0, abs=1e-5)
    measured = loss_recovered(model, "transformer.h.1", linear_sae(scale=0), batches)
    assert measured.recovered_from_zero == pytest.approx(0, abs=1e-6)

    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(vocab_size=V, **sizes)
    with pytest.raises(ValueError, match="BertModel gives no logits: it has no language-model head"):
        loss_recovered(transformers.BertModel(config), "encoder.layer.1", linear_sae(), batches)
    with pytest.raises(ValueError, match="BertForMaskedLM sees the tokens"):
        loss_recovered(transformers.BertForMaskedLM(config), "bert.encoder.layer.1", linear_sae(), batches)
    with pytest.raises(ValueError, match=r"logits must be \[batch, positions, vocabulary\], got shape \(1, 2\)"):
        loss_recovered(
            transformers.BertForSequenceClassification(config), "bert.encoder.layer.1", linear_sae(), batches[:1]
        )
