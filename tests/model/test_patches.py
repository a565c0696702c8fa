"""Functions that other packages assign to a model: called, or refused; never ignored."""

import types

import pytest
import torch
from transformers.models.clip import modeling_clip
from transformers.models.llama import modeling_llama

from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from llava.model.llava_arch import LlavaMetaForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.reuse import Picture, PrefixCache
from llava.pruning import build_pruner
from tests.conftest import SIDE, pad_batch

SPLICE = "prepare_inputs_labels_for_multimodal"
GREEDY = dict(do_sample=False, max_new_tokens=4, eos_token_id=-1, pad_token_id=0)


def first_patches(
    self, input_ids, position_ids, attention_mask, past_key_values, labels, images, image_sizes=None
):
    """The first 10 patches of every image; rows padded on the right, as LLaVA does."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows, features = [], iter(self.get_vision_tower()(images))
    for ids in (row[keep.bool()] for row, keep in zip(input_ids, mask, strict=True)):
        (at,) = (ids < 0).nonzero()[:, 0].tolist()
        image = self.get_model().mm_projector(next(features)[:10])
        embed = self.get_model().embed_tokens
        rows.append(torch.cat([embed(ids[:at]), image, embed(ids[at + 1 :])]))
    lengths = torch.tensor([len(row) for row in rows])
    embeds = torch.nn.utils.rnn.pad_sequence(rows, True)
    mask = torch.arange(embeds.shape[1]) < lengths[:, None]
    if labels is not None:
        labels = mask.long() * 5
    return None, None, mask, past_key_values, embeds, labels


def to_the_object(model, patch):
    patch.setattr(model, SPLICE, types.MethodType(first_patches, model), raising=False)


def to_the_object_plainly(model, patch):
    def plain(*args, **kwargs):
        return first_patches(model, *args, **kwargs)

    patch.setattr(model, SPLICE, plain, raising=False)


def to_its_class(model, patch):
    patch.setattr(LlavaMetaForCausalLM, SPLICE, first_patches)


def to_the_class_below(model, patch):
    patch.setattr(LlavaLlamaForCausalLM, SPLICE, first_patches, raising=False)


WAYS = (to_the_object, to_the_object_plainly, to_its_class, to_the_class_below)


@pytest.fixture
def batch(sample):
    prompts = [sample(3, "image", 9, seed=1), sample(12, "image", 2, seed=2)]
    ids, mask = pad_batch([p.ids for p in prompts])
    return dict(inputs=ids, attention_mask=mask, images=torch.cat([p.images for p in prompts]))


class FirstPatches(type(build_pruner("random"))):
    def select(self, vision):
        return torch.arange(10).expand(len(vision.features), -1)


@pytest.mark.parametrize("way", WAYS)
def test_another_splice_is_called(model, batch, monkeypatch, way):
    model.pruner = FirstPatches(visual_token_num=10)
    wanted = model.generate(**batch, **GREEDY)
    model.pruner = build_pruner("none")
    dense = model.generate(**batch, **GREEDY)
    way(model, monkeypatch)
    assert torch.equal(model.generate(**batch, **GREEDY), wanted)
    assert not torch.equal(wanted, dense)
    out = model(
        batch["inputs"][:1],
        attention_mask=batch["attention_mask"][:1],
        images=batch["images"][:1],
        labels=batch["inputs"][:1],
    )
    assert out.logits.shape[1] == 13 + 10 and out.loss.isfinite()
    monkeypatch.undo()
    assert torch.equal(model.generate(**batch, **GREEDY), dense)


def test_another_splice_serves_questions_that_share_an_image(model, sample, monkeypatch):
    first = sample(4, "image", seed=1).ids[0]
    prompts = [torch.cat([first, sample(n, seed=n).ids[0, 1:]]) for n in (9, 5)]
    picture = Picture(torch.randn(3, SIDE, SIDE), (SIDE, SIDE))
    to_its_class(model, monkeypatch)
    got = PrefixCache(model).generate(prompts, [[picture]] * 2, ["a"] * 2, **GREEDY)
    for row, prompt in zip(got, prompts, strict=True):
        alone = model.generate(prompt[None], images=picture.pixels[None], **GREEDY)
        assert torch.equal(row[None], alone)


def test_a_wrapper_round_our_splice_changes_nothing(model, batch, monkeypatch):
    wanted, calls = model.generate(**batch, **GREEDY), []
    own = LlavaMetaForCausalLM.prepare_inputs_labels_for_multimodal

    def timed(self, *args, **kwargs):
        calls.append(1)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(LlavaMetaForCausalLM, SPLICE, timed)
    assert torch.equal(model.generate(**batch, **GREEDY), wanted) and calls == [1]
    model.generate(batch["inputs"].clamp(min=5), **GREEDY)  # no image, no splice
    assert calls == [1]


def test_another_splice_and_a_method_exclude_each_other(model, batch, monkeypatch):
    model.pruner = build_pruner("fastv", visual_token_num=5)
    to_its_class(model, monkeypatch)
    with pytest.raises(ValueError, match=f"{SPLICE} was replaced .* 'fastv' would not see"):
        model.generate(**batch, **GREEDY)


def test_another_splice_must_return_what_llava_returns(model, batch, monkeypatch):
    for wrong in ((1, 2), (None,) * 6, torch.ones(2)):
        monkeypatch.setattr(model, SPLICE, lambda *a, wrong=wrong: wrong, raising=False)
        with pytest.raises(ValueError, match=f"the {SPLICE} assigned from outside must return"):
            model.generate(**batch, **GREEDY)


def other(self, *args, **kwargs):
    raise AssertionError("not to be called")


REFUSED = {
    "encode_images": lambda model: (model, "encode_images"),
    "encode_images of the class": lambda model: (LlavaMetaForCausalLM, "encode_images"),
    "CLIPVisionTower.forward": lambda model: (model.get_vision_tower(), "forward"),
    "CLIPVisionTower.forward of the class": lambda model: (CLIPVisionTower, "forward"),
    "CLIPVisionModel.forward": lambda model: (model.get_vision_tower().vision_tower, "forward"),
    "CLIPEncoder.forward": lambda model: (modeling_clip.CLIPEncoder, "forward"),
    "CLIPEncoderLayer.forward": lambda model: (modeling_clip.CLIPEncoderLayer, "forward"),
    "CLIPAttention.forward": lambda model: (modeling_clip.CLIPAttention, "forward"),
    "CLIPAttention.forward of one layer": lambda model: (
        model.get_vision_tower().vision_tower.vision_model.encoder.layers[2].self_attn,
        "forward",
    ),
    "LlamaModel": lambda model: (modeling_llama.LlamaModel, "forward"),
    "LlamaDecoderLayer": lambda model: (modeling_llama.LlamaDecoderLayer, "forward"),
    "LlamaSdpaAttention": lambda model: (modeling_llama.LlamaSdpaAttention, "forward"),
    "LlamaAttention": lambda model: (modeling_llama, "LlamaAttention"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_is_refused(model, batch, monkeypatch, name):
    class Another(modeling_llama.LlamaAttention):
        pass

    owner, attribute = REFUSED[name](model)
    value = Another if attribute == "LlamaAttention" else other
    monkeypatch.setattr(owner, attribute, value, raising=False)
    with pytest.raises(ValueError, match=f"{name.split(' ')[0]}.* was replaced from outside, but"):
        model.generate(**batch, **GREEDY)
    with pytest.raises(ValueError, match=SPLICE):
        model(batch["inputs"], attention_mask=batch["attention_mask"], images=batch["images"])


def test_a_table_of_attention_classes_is_looked_at(model, batch, monkeypatch):
    class Another(modeling_llama.LlamaAttention):
        pass

    monkeypatch.setitem(modeling_llama.LLAMA_ATTENTION_CLASSES, "sdpa", Another)
    with pytest.raises(ValueError, match="an attention class of transformers .Another."):
        model.generate(**batch, **GREEDY)


def test_a_layer_of_another_class_in_the_tower_is_refused(model, batch, monkeypatch):
    """As token merging does it: the object gets a new class."""

    class Merging(modeling_clip.CLIPEncoderLayer):
        pass

    layer = model.get_vision_tower().vision_tower.vision_model.encoder.layers[1]
    monkeypatch.setattr(layer, "__class__", Merging)
    with pytest.raises(ValueError, match="CLIPEncoderLayer.forward of the vision tower"):
        model.generate(**batch, **GREEDY)


def test_a_patched_tower_serves_another_splice(model, batch, monkeypatch):
    """As the visionzip package does it: the tower's forward and the splice are both its own."""
    seen = []

    def attentive(self, images):
        out = self.vision_tower(images, output_hidden_states=True, output_attentions=True)
        seen.append(len(out.attentions))
        return out.hidden_states[self.select_layer][:, 1:]

    to_its_class(model, monkeypatch)
    wanted = model.generate(**batch, **GREEDY)
    monkeypatch.setattr(CLIPVisionTower, "forward", attentive)
    assert torch.equal(model.generate(**batch, **GREEDY), wanted) and seen == [4]


def test_functions_that_are_called_may_be_replaced(model, batch, monkeypatch):
    """Assigned to a layer, the decoder, the projector or the model, they take effect."""
    wanted, calls = model.generate(**batch, **GREEDY), []
    for owner in (model, model.model, model.model.layers[2], model.model.mm_projector):
        own = owner.forward

        def counting(*args, own=own, **kwargs):
            calls.append(own)
            return own(*args, **kwargs)

        monkeypatch.setattr(owner, "forward", counting, raising=False)
    assert torch.equal(model.generate(**batch, **GREEDY), wanted)
    assert len(calls) == 4 * 3 + 1


def test_a_tower_of_another_kind_is_told_what_is_missing(make_model, batch):
    class Other(torch.nn.Module):
        is_loaded = True

    model = make_model()
    model.model.vision_tower = Other()
    with pytest.raises(ValueError, match="the vision tower is a Other, .* CLIPVisionTower"):
        model.generate(**batch, **GREEDY)
