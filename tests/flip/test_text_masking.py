"""Text masking: which slots stay, and that a tower given them equals one that drops the others."""

import itertools
import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from frugal.common.contracts import Batch
from frugal.common.data.sample_transform import Collator, SampleTransform
from frugal.common.data.samples import RawSample
from frugal.common.data.tokenizers import ClipBpe
from frugal.common.data.transforms import CenterCrop
from frugal.common.errors import InputError
from frugal.common.models.named import flip_encoder
from frugal.common.models.text import TextTower, TextTransformer
from frugal.common.objectives.contrastive import Contrastive
from frugal.common.objectives.gradient_cache import cached_backward
from frugal.common.randomness import sample_generator
from frugal.common.recipe import EngineOptions, RunOptions
from frugal.common.recipe_json import from_json, to_json
from frugal.common.reduction.image import KeepAll
from frugal.common.reduction.text import PositionedTokens, TextReduction, Truncate
from frugal.flip.text_masking import TextMasking

LENGTH = 32
ORDERS = ("random", "padding_first")


class Words:
    """Numbers as tokens, special tokens around them if wanted, padding is 0."""

    vocab_size, pad_id = 100, 0

    def __init__(self, prefix: tuple[int, ...] = (), suffix: tuple[int, ...] = ()) -> None:
        self.prefix, self.suffix = prefix, suffix

    def encode(self, caption: str) -> list[int]:
        return [int(word) for word in caption.split()]

    def assemble(self, ids: list[int], length: int) -> list[int]:
        room = length - len(self.prefix) - len(self.suffix)
        return [*self.prefix, *ids[:room], *self.suffix]


def caption_of(count: int) -> str:
    return " ".join(str(10 + number) for number in range(count))


def mask(
    caption: str,
    masking: TextMasking,
    *,
    tokenizer: Words | None = None,
    length: int = LENGTH,
    number: int = 0,
) -> PositionedTokens:
    generator = sample_generator(0, "text", number)
    placed = masking.encode(caption, tokenizer or Words(), length=length, generator=generator)
    assert isinstance(placed, PositionedTokens)
    return placed


# ------------------------------------------------------------------------------------------------
# Which slots stay


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("words", [0, 1, 5, 15, 16, 17, 31, 32, 50])
def test_every_caption_keeps_half_of_its_slots_with_the_tokens_that_stood_there(
    words: int, order: str
) -> None:
    full = [10 + number for number in range(min(words, LENGTH))]
    for number in range(20):
        placed = mask(caption_of(words), TextMasking(order=order), number=number)
        assert len(placed.positions) == 16
        assert placed.positions == sorted(set(placed.positions))
        assert set(placed.positions) <= set(range(LENGTH))
        # tokens come before padding, each from the slot it is said to come from
        assert placed.ids == [full[slot] for slot in placed.positions[: len(placed.ids)]]
        assert all(slot >= len(full) for slot in placed.positions[len(placed.ids) :])


@pytest.mark.parametrize("words", [0, 1, 7, 16])
def test_no_word_goes_while_there_is_padding(words: int) -> None:
    for number in range(20):
        placed = mask(caption_of(words), TextMasking(order="padding_first"), number=number)
        assert len(placed.ids) == words


@pytest.mark.parametrize("words", [17, 25, 32])
def test_padding_is_gone_before_a_word_goes(words: int) -> None:
    for number in range(20):
        placed = mask(caption_of(words), TextMasking(order="padding_first"), number=number)
        assert len(placed.ids) == 16


def test_random_masking_takes_words_and_padding_alike() -> None:
    counts: Counter[int] = Counter()
    draws = 4000
    for number in range(draws):
        counts.update(mask(caption_of(9), TextMasking(), number=number).positions)
    assert counts.pop(0) == draws  # the slot that the tower pools
    assert set(counts) == set(range(1, LENGTH))
    share = 15 / 31
    deviation = math.sqrt(draws * share * (1 - share))
    assert all(abs(count - draws * share) < 5 * deviation for count in counts.values())


@pytest.mark.parametrize(("words", "slots"), [(24, range(1, 24)), (6, range(6, 32))])
def test_what_is_drawn_among_equals_is_uniform_when_padding_goes_first(
    words: int, slots: range
) -> None:
    counts: Counter[int] = Counter()
    draws = 4000
    for number in range(draws):
        positions = mask(caption_of(words), TextMasking(order="padding_first"), number=number)
        counts.update(slot for slot in positions.positions if slot in slots)
    share = (15 if words > 16 else 16 - words) / len(slots)
    deviation = math.sqrt(draws * share * (1 - share))
    assert set(counts) == set(slots)
    assert all(abs(count - draws * share) < 5 * deviation for count in counts.values())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("prefix", "suffix"), [((), (2,)), ((1,), ()), ((1,), (2,)), ((1, 3), (4, 2))]
)
@pytest.mark.parametrize("words", [0, 1, 20, 40])
def test_special_tokens_always_stay(
    prefix: tuple[int, ...], suffix: tuple[int, ...], words: int, order: str
) -> None:
    tokenizer = Words(prefix, suffix)
    masking = TextMasking(mask_ratio=0.8, order=order)
    used = min(words + len(prefix) + len(suffix), LENGTH)
    for number in range(20):
        placed = mask(caption_of(words), masking, tokenizer=tokenizer, number=number)
        assert len(placed.positions) == 6
        assert tuple(placed.ids[: len(prefix)]) == prefix
        assert tuple(placed.ids[len(placed.ids) - len(suffix) :]) == suffix
        if suffix:
            assert placed.positions[len(placed.ids) - 1] == used - 1


def test_byte_pairs_keep_the_tokens_that_clip_pools() -> None:
    tokenizer = ClipBpe().load()
    whole = tokenizer.assemble(tokenizer.encode("a small red square left of a circle"), LENGTH)
    for number in range(20):
        placed = mask("a small red square left of a circle", TextMasking(), tokenizer=tokenizer,
                      number=number)  # fmt: skip
        assert placed.ids[0] == whole[0] and placed.ids[-1] == whole[-1] == 49_407
        assert placed.positions[len(placed.ids) - 1] == len(whole) - 1


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, 16), (0.75, 8), (0.7, 9), (0.9, 3), (0.1, 28)])
def test_the_count_is_cut_down_as_that_of_patches(ratio: float, kept: int) -> None:
    masking = TextMasking(mask_ratio=ratio)
    assert masking.num_kept(LENGTH) == kept
    assert len(mask(caption_of(20), masking).positions) == kept


def test_a_ratio_of_zero_is_plain_truncation() -> None:
    for caption in ("", caption_of(5), caption_of(40)):
        options = {"length": 7, "generator": np.random.default_rng(0)}
        ids = TextMasking(mask_ratio=0.0).encode(caption, Words(), **options)
        assert ids == Truncate().encode(caption, Words(), **options)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"mask_ratio": 1.0}, r"text mask ratio 1\.0 must lie in \[0, 1\)"),
        ({"mask_ratio": -0.1}, r"text mask ratio -0\.1 must lie"),
        ({"mask_ratio": math.nan}, "text mask ratio nan must lie"),
        ({"order": "last"}, "the order of text masking is 'last'; choose"),
    ],
)
def test_impossible_settings_are_refused(values: dict, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        TextMasking(**values)


def test_a_mask_that_keeps_too_little_is_refused() -> None:
    with pytest.raises(InputError, match="keeps none of 32 slots"):
        mask(caption_of(3), TextMasking(mask_ratio=0.97))
    with pytest.raises(InputError, match="keeps 1 of 4 slots, fewer than the 2 special tokens"):
        mask(caption_of(3), TextMasking(mask_ratio=0.7), tokenizer=Words((1,), (2,)), length=4)
    recipe = SimpleNamespace(model=flip_encoder("B/16"))
    with pytest.raises(InputError, match="keeps none of 32 slots"):
        TextMasking(mask_ratio=0.97).check_length(recipe.model.text.length)
    TextMasking(mask_ratio=0.96).check_length(recipe.model.text.length)


def test_text_masking_is_a_text_reduction_that_survives_json() -> None:
    masking = TextMasking(mask_ratio=0.25, order="padding_first")
    assert isinstance(masking, TextReduction)
    assert from_json(to_json(masking)) == masking


# ------------------------------------------------------------------------------------------------
# What the tower makes of it

TOWER = TextTower(
    width=12, depth=2, heads=3, mlp_width=20, vocabulary=100, length=LENGTH, causal=False,
    activation="gelu_tanh", norm_epsilon=1e-6, pooling="first",
)  # fmt: skip
VARIANTS = {
    "parity": {},
    "clean": {"pad_mask": True},
    "clean packed": {"pad_mask": True, "packed": True},
    "last": {"pooling": "last"},
    "mean": {"pad_mask": True, "pooling": "mean"},
    "mean packed": {"pad_mask": True, "pooling": "mean", "packed": True},
    "mean of all": {"pooling": "mean_all"},
    "clip": {"causal": True, "pooling": "end_of_text"},
    "clip packed": {"causal": True, "pooling": "end_of_text", "packed": True},
}


def tower_of(options: dict) -> TextTransformer:
    tower = TextTransformer(replace(TOWER, **options), 7).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in tower.parameters():
            weight.normal_(0.0, 0.4, generator=generator)
    return tower


CAPTIONS = [caption_of(count) for count in (9, 32, 1, 0, 20)]


def batch_of(placed: list[PositionedTokens]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, lengths and positions as the loader makes them."""
    ids = torch.zeros(len(placed), len(placed[0].positions), dtype=torch.long)
    for row, one in enumerate(placed):
        ids[row, : len(one.ids)] = torch.tensor(one.ids, dtype=torch.long)
    lengths = torch.tensor([max(len(one.ids), 1) for one in placed])
    return ids, lengths, torch.tensor([one.positions for one in placed])


def slow(tower: TextTransformer, caption: str, kept: list[int]) -> Tensor:
    """(E,): every slot is embedded with its position, then all but the kept ones are dropped."""
    config = tower.config
    words = Words().assemble(Words().encode(caption), LENGTH)
    used = len(words)
    every = torch.tensor(words + [0] * (LENGTH - used))
    embedded = tower.token_embedding.weight[every] + tower.pos_embed[0]  # (32, D)
    tokens = torch.stack([embedded[slot] for slot in kept])  # (K, D)
    is_word = [slot < max(used, 1) for slot in kept]  # an empty caption sees its first slot
    for block in tower.blocks:
        tokens = tokens + slow_attention(block, config, tokens, is_word)
        normed = F.layer_norm(
            tokens, (config.width,), block.norm2.weight, block.norm2.bias, config.norm_epsilon
        )
        hidden = normed @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
        cube = hidden + 0.044715 * hidden**3
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * cube))
        tokens = tokens + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    tokens = F.layer_norm(
        tokens, (config.width,), tower.norm.weight, tower.norm.bias, config.norm_epsilon
    )
    last_word = max(place for place, word in enumerate(is_word) if word)
    pooled = {
        "first": tokens[0],
        "last": tokens[-1],
        "end_of_text": tokens[last_word],
        "mean": torch.stack([t for t, word in zip(tokens, is_word, strict=True) if word]).mean(0),
        "mean_all": tokens.mean(0),
    }[config.pooling]
    return tower.projection.weight @ pooled


def slow_attention(block, config: TextTower, tokens: Tensor, is_word: list[bool]) -> Tensor:
    """(K, D): one query and one head at a time."""
    normed = F.layer_norm(
        tokens, (config.width,), block.norm1.weight, block.norm1.bias, config.norm_epsilon
    )
    query, key, value = (normed @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, dim=1)
    size = config.width // config.heads
    gathered = []
    for place in range(len(tokens)):
        seen = [
            other
            for other in range(len(tokens))
            if (is_word[other] or not config.pad_mask) and (other <= place or not config.causal)
        ]
        heads = []
        for head in range(config.heads):
            part = slice(head * size, (head + 1) * size)
            scores = torch.stack([query[place, part] @ key[other, part] for other in seen])
            weights = (scores / math.sqrt(size)).softmax(0)
            heads.append(
                sum(w * value[other, part] for w, other in zip(weights, seen, strict=True))
            )
        gathered.append(torch.cat(heads))
    return torch.stack(gathered) @ block.attn.proj.weight.T + block.attn.proj.bias


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tower_equals_embedding_every_slot_and_dropping_some(variant: str, order: str) -> None:
    tower = tower_of(VARIANTS[variant])
    masking = TextMasking(order=order)
    placed = [mask(caption, masking, number=n) for n, caption in enumerate(CAPTIONS)]
    ours = tower(*batch_of(placed))
    expected = torch.stack(
        [slow(tower, caption, one.positions) for caption, one in zip(CAPTIONS, placed, strict=True)]
    )
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)
    tower.zero_grad()
    ours.sin().sum().backward()
    grads = {name: p.grad.clone() for name, p in tower.named_parameters()}
    tower.zero_grad()
    expected.sin().sum().backward()
    for name, parameter in tower.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("variant", VARIANTS)
def test_masking_nothing_by_positions_is_masking_nothing(variant: str) -> None:
    tower = tower_of(VARIANTS[variant])
    every = [
        PositionedTokens(Words().assemble(Words().encode(caption), LENGTH), list(range(LENGTH)))
        for caption in CAPTIONS
    ]
    ids, lengths, positions = batch_of(every)
    torch.testing.assert_close(tower(ids, lengths, positions), tower(ids, lengths))


def test_positions_of_another_shape_are_refused() -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="every token has one"):
        tower_of({})(ids, None, torch.arange(5).expand(3, 5))


# ------------------------------------------------------------------------------------------------
# Through the loader and the objective


def transform(masking: TextReduction, *, seed: int = 0) -> SampleTransform:
    return SampleTransform(
        seed=seed,
        augmentation=CenterCrop(),
        image_size=(8, 8),
        tokenizer=Words(),
        text=masking,
        text_length=LENGTH,
    )


@pytest.fixture
def picture() -> bytes:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (200, 30, 60)).save(buffer, "PNG")
    return buffer.getvalue()


def built(masking: TextReduction, picture: bytes, numbers: list[int], *, seed: int = 0) -> Batch:
    """Samples by their numbers; the number decides the caption too. Number 3 is damaged."""
    from frugal.common.data.damage import Damaged

    collator = Collator(transform(masking, seed=seed), np.asarray(numbers, np.int64))
    for number in numbers:
        if number == 3:
            collator.skip("damaged", Damaged("image"))
        else:
            collator.add(str(number), RawSample(picture, [caption_of(number)]))
    return Batch(**collator.fields())


@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_holds_the_slots_that_stay_and_no_others(picture: bytes, order: str) -> None:
    masking = TextMasking(order=order)
    batch = built(masking, picture, [0, 3, 7, 40])
    assert batch.token_ids.shape == batch.text_positions.shape == (4, 16)
    assert batch.token_ids.is_contiguous()
    for row, number in enumerate([0, 3, 7, 40]):
        if number == 3:
            assert not batch.valid[row] and not batch.token_ids[row].any()
            assert batch.text_positions[row].tolist() == list(range(16))
            assert batch.text_lengths[row] == 1
            continue
        placed = mask(caption_of(number), masking, number=number)
        length = len(placed.ids)
        assert batch.token_ids[row, :length].tolist() == placed.ids
        assert not batch.token_ids[row, length:].any()
        assert batch.text_positions[row].tolist() == placed.positions
        assert batch.text_lengths[row] == max(length, 1)


def test_masks_belong_to_sample_numbers_and_seeds(picture: bytes) -> None:
    masking = TextMasking()
    whole = built(masking, picture, [20, 21, 22, 23])
    for order in itertools.permutations(range(4), 3):
        part = built(masking, picture, [20 + row for row in order])
        assert torch.equal(part.text_positions, whole.text_positions[list(order)])
        assert torch.equal(part.token_ids, whole.token_ids[list(order)])
    assert len({tuple(row) for row in whole.text_positions.tolist()}) == 4
    other = built(masking, picture, [20, 21, 22, 23], seed=1)
    assert not torch.equal(other.text_positions, whole.text_positions)


def test_a_batch_of_plain_ids_has_no_positions(picture: bytes) -> None:
    batch = built(Truncate(), picture, [1, 2])
    assert batch.text_positions is None
    assert batch.token_ids.shape == (2, LENGTH)


def model_of(options: dict):
    model = flip_encoder("B/8", image_size=8)
    image = {"width": 16, "depth": 1, "heads": 2, "mlp_width": 16}
    text = {"width": 12, "depth": 2, "heads": 3, "mlp_width": 16, "vocabulary": 100}
    return replace(
        model,
        image=replace(model.image, **image),
        text=replace(model.text, **text, **options),
        embed_dim=8,
    )


def objective_of(options: dict):
    recipe = SimpleNamespace(
        model=model_of(options),
        data=SimpleNamespace(caption_tokenizer=None, color_change=None),
        schedule=SimpleNamespace(samples=100),
        reduction=SimpleNamespace(image=KeepAll()),
        engine=EngineOptions(),
        run=RunOptions(seed=3),
    )
    return Contrastive().build(recipe)


def batch_for(objective, placed: list[PositionedTokens]) -> Batch:
    ids, lengths, positions = batch_of(placed)
    count = len(placed)
    generator = torch.Generator().manual_seed(2)
    return Batch(
        images=torch.randint(256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8),
        sample_numbers=torch.arange(count),
        valid=torch.ones(count).bool(),
        token_ids=ids,
        text_lengths=lengths,
        text_positions=positions,
    )


OBJECTIVES = ("parity", "clean", "clean packed", "clip packed")


@pytest.mark.parametrize("variant", OBJECTIVES)
def test_the_objective_sees_the_slots_at_their_positions(variant: str) -> None:
    objective = objective_of(VARIANTS[variant])
    placed = [mask(caption, TextMasking(), number=n) for n, caption in enumerate(CAPTIONS)]
    batch = batch_for(objective, placed)
    encoded = objective(batch, encode_only=True)
    # the same captions with every slot that went replaced by nothing at all, in float64
    exact = objective_of(VARIANTS[variant]).double()
    for row, (caption, one) in enumerate(zip(CAPTIONS, placed, strict=True)):
        expected = slow(exact.model.text, caption, one.positions)
        expected = F.normalize(expected, dim=0)
        torch.testing.assert_close(
            encoded.texts[row].double(), expected, rtol=0, atol=1e-5, msg=caption
        )
    _, metrics = objective(batch)
    lengths = batch.text_lengths.float().mean().item()
    tokens = lengths if "packed" in variant else 16
    assert metrics["text_tokens"].item() == pytest.approx(tokens)


def test_moving_and_cutting_a_batch_takes_the_positions_along() -> None:
    placed = [mask(caption, TextMasking(), number=n) for n, caption in enumerate(CAPTIONS)]
    batch = batch_for(None, placed)
    assert torch.equal(batch.rows(1, 4).text_positions, batch.text_positions[1:4])
    assert batch.to("meta").text_positions.device.type == "meta"


class Plain:
    """Plain autograd as an engine."""

    def __init__(self, objective) -> None:
        self.objective = objective

    def forward(self, *args, **kwargs):
        return self.objective(*args, **kwargs)

    def accumulating(self, *, last: bool):
        import contextlib

        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("variant", OBJECTIVES)
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_gradient_caching_takes_the_positions_along(variant: str, chunk: int) -> None:
    placed = [mask(caption, TextMasking(), number=n) for n, caption in enumerate(CAPTIONS)]
    whole, cached = (objective_of(VARIANTS[variant]).double() for _ in range(2))
    batch = batch_for(whole, placed)
    loss, _ = whole(batch)
    loss.backward()
    found = cached_backward(Plain(cached), batch, chunk, 1.0, last=True)
    torch.testing.assert_close(found["loss"], loss.detach())
    for (name, one), two in zip(whole.named_parameters(), cached.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-6, atol=1e-8, msg=name)
