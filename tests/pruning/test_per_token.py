"""Whatever there is one of for each token follows a change of the tokens."""

from dataclasses import dataclass, field

import torch

from llava.pruning import ImageTokens, VisionTokens
from llava.pruning.extras import with_extra, with_number, without_extra
from llava.pruning.per_token import at, each, mapped, per_token, tensors_of, with_zeros
from llava.pruning.tokens import without_cues


@dataclass
class Carrier:
    x: torch.Tensor = field(metadata=per_token())
    late: torch.Tensor | None = field(default=None, metadata=per_token(2))
    extras: dict = field(default_factory=dict, metadata=per_token())
    other: torch.Tensor | None = None


def carrier(size=5):
    places = torch.arange(size).expand(2, -1)
    return Carrier(
        x=places[..., None].expand(-1, -1, 3).float(),
        late=places[:, None].expand(-1, 4, -1),
        extras={"flag": places > 1, "deep": places[:, :, None, None].expand(-1, -1, 2, 2)},
        other=torch.arange(7),
    )


def test_tokens_are_taken_along_their_axis():
    own, index = carrier(), torch.tensor([[4, 0], [2, 2]])
    taken = mapped(own, at(index), without=("other",))
    assert set(taken) == {"x", "late", "extras"}
    assert torch.equal(taken["x"], index[..., None].expand(-1, -1, 3).float())
    assert torch.equal(taken["late"], index[:, None].expand(-1, 4, -1))
    assert torch.equal(taken["extras"]["flag"], index > 1)
    assert torch.equal(taken["extras"]["deep"], index[:, :, None, None].expand(-1, -1, 2, 2))
    assert mapped(Carrier(own.x), at(index))["late"] is None


def test_zeros_are_put_behind_the_tokens_in_their_type():
    own = carrier()
    grown = each(own.extras, with_zeros(2))
    assert grown["flag"].tolist() == [[False, False, True, True, True, False, False]] * 2
    assert grown["deep"].shape == (2, 7, 2, 2) and not grown["deep"][:, 5:].any()
    rows = each({"deep": own.extras["deep"][0]}, with_zeros(1), axis=0)["deep"]
    assert rows.shape == (6, 2, 2) and torch.equal(rows[:5], own.extras["deep"][0])


def test_entries_of_dicts_are_named():
    assert list(tensors_of(carrier())) == ["x", "late", "extras['flag']", "extras['deep']"]
    assert list(tensors_of(Carrier(torch.zeros(1, 1)))) == ["x"]


def test_crops_keep_all_they_have_of_their_tokens():
    vision = VisionTokens(
        features=torch.randn(2, 4, 3),
        positions=torch.arange(4).expand(2, -1),
        grid=(2, 2),
        valid=torch.tensor([[True] * 4, [True, True, True, False]]),
        cls_attention=torch.randn(2, 5, 4),
        keys=torch.randn(2, 4, 3),
        cls_token=torch.randn(2, 1, 3),
        extras={"mine": torch.randn(2, 4, 6)},
    )
    kept = vision.keep_mask(torch.tensor([[False, True, False, True]]).expand(2, -1))
    assert kept.positions.tolist()[0] == [1, 3] and kept.valid.tolist() == [
        [True] * 2,
        [True, False],
    ]
    assert torch.equal(kept.cls_attention[0], vision.cls_attention[0][:, [1, 3]])
    assert torch.equal(kept.extras["mine"][0], vision.extras["mine"][0, [1, 3]])
    assert torch.equal(kept.keys[0], vision.keys[0, [1, 3]]) and kept.cls_token is vision.cls_token


def test_extras_and_numbers_come_and_go_without_a_trace_on_what_was():
    places = torch.arange(4)
    image = ImageTokens(places[:, None].float(), places, places, 4, extras={"mine": places})
    more = with_number(with_extra(image, "other", 2 * places), "count", 3)
    assert list(more.extras) == ["mine", "other"] and more.image_extras == {"count": 3}
    less = without_extra(without_extra(more, "mine"), "nobody's")
    assert list(less.extras) == ["other"] and less.image_extras == {"count": 3}
    assert list(image.extras) == ["mine"] and image.image_extras == {}


def test_an_image_keeps_places_a_slice_or_what_a_mask_says():
    places = torch.arange(4)
    image = ImageTokens(places[:, None].float(), places, places, 4, extras={"mine": places * 2})
    for index in (torch.tensor([1, 2]), slice(1, 3), torch.tensor([False, True, True, False])):
        kept = image.keep(index)
        assert kept.patches.tolist() == [1, 2] and kept.extras["mine"].tolist() == [2, 4]
        assert kept.length == 4


def test_cues_of_tokens_do_not_outlive_their_blending():
    places = torch.arange(4)[None]
    given = VisionTokens(
        torch.zeros(1, 4, 2),
        places,
        (2, 2),
        salience=torch.rand(1, 4),
        cls_attention=torch.rand(1, 3, 4),
        keys=torch.rand(1, 4, 2),
    )
    bare = without_cues(given)
    assert bare.salience is bare.cls_attention is bare.keys is None


def test_crops_with_padding_are_not_complete():
    places = torch.arange(4)[None]
    given = VisionTokens(torch.zeros(1, 4, 2), places, (2, 2), all_patches=places)
    assert given.complete
    assert not VisionTokens(
        torch.zeros(1, 4, 2), places, (2, 2), all_patches=places, valid=places < 3
    ).complete
