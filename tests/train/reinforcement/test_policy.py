"""Answers and their probabilities on tiny models of both families: what is drawn is what is learned
from, and the gradient is that of the policy."""

from types import SimpleNamespace

import pytest
import torch

from llava.model.inputs import Picture, generate_inputs
from llava.pruning import build_pruner, trace_pruning
from llava.pruning.glimpseprune import GlimpsePrune
from llava.pruning.glimpseprune_modules import Glimpse, GlimpseConfig
from llava.pruning.testing import tiny
from llava.train.reinforcement.adapter import with_adapter
from llava.train.reinforcement.arguments import PolicyModelArguments
from llava.train.reinforcement.loss import advantages
from llava.train.reinforcement.needed import NEEDED, KeepNeeded
from llava.train.reinforcement.objective import PolicyObjective, PolicyWeights
from llava.train.reinforcement.sampling import AnswerSampler, Asked, DrawnTokens, drawn
from llava.train.train_glimpseprune_plus import reduce_layer

END = 5
FAMILIES = ("crops", "own_grids")


def make_case(family, make_model, layer=2, max_new_tokens=6):
    """A model with a random adapter, a sampler of its answers, and two questions."""
    if family == "crops":
        llava = make_model(initializer_range=0.1)
        grids, images = [(6, 6)] * 2, list(tiny.sample("image", "image").images)
    else:
        llava = tiny.make_own_grids_model()
        grids = [(4, 6), (7, 3)]
        images = [tiny.picture(*grid) for grid in grids]
    llava.generation_config.eos_token_id = END
    torch.manual_seed(3)
    policy = with_adapter(llava, rank=4, alpha=8, dropout=0.0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    front = SimpleNamespace(model=llava, pad_id=0, tokenizer=None)
    sampler = AnswerSampler(front, layer, max_new_tokens)
    asked = []
    for key, (grid, image) in enumerate(zip(grids, images, strict=True)):
        mask = torch.zeros(grid, dtype=torch.bool)
        mask[1:3, 1:3] = True
        ids = tiny.sample(4, "image", 3 + 2 * key, seed=key).ids[0]
        asked.append(Asked(ids, Picture(image, (9, 9)), "?", mask, key))
    return policy, sampler, asked


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def drawn_answers(sampler, asked, rows=(0, 1, 0)):
    return sampler([asked[n] for n in rows], [(7, n, place) for place, n in enumerate(rows)])


def objective(policy, sampler, **weights):
    return PolicyObjective(policy, sampler.stage, PolicyWeights(**weights))


@torch.no_grad()
def generated_log_probs(sampler, answers):
    """What the model says step by step, in its own generation, of the tokens of the answers."""
    llava, rows = sampler.llava, []

    class Says(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.step, self.found = 0, []

        def __call__(self, ids, scores):
            token = answers.ids[:, self.step, None]
            self.found.append(scores.log_softmax(-1).gather(1, token))
            self.step += 1
            return torch.full_like(scores, float("-inf")).scatter(1, token, 0)

    says = Says()
    with llava.using(sampler.stage):
        llava.generate_from(
            answers.prompt,
            logits_processor=[says],
            max_new_tokens=answers.ids.shape[1],
            eos_token_id=END,
            pad_token_id=0,
            do_sample=False,
            repetition_penalty=1.0,
        )
    rows = torch.cat(says.found, dim=1)
    return rows.masked_fill(~answers.mask[:, : rows.shape[1]], 0)


def test_the_exact_probabilities_are_those_the_answers_were_drawn_from(family, make_model):
    for layer in (-1, 2, 5):
        policy, sampler, asked = make_case(family, make_model, layer)
        answers = drawn_answers(sampler, asked)
        found = objective(policy, sampler, token_pass="exact").log_probs(answers, answers.mask)
        wanted = generated_log_probs(sampler, answers)
        torch.testing.assert_close(found.detach(), wanted, atol=2e-5, rtol=1e-4)


def test_a_prompt_with_several_answers_runs_once(make_model, monkeypatch):
    policy, sampler, asked = make_case("crops", make_model)
    answers = drawn_answers(sampler, asked)
    decoder, rows = sampler.llava.model, []
    run = decoder.run_layer

    def counted(layer, x, *args):
        rows.append(len(x))
        return run(layer, x, *args)

    monkeypatch.setattr(decoder, "run_layer", counted)
    objective(policy, sampler, token_pass="exact").log_probs(answers, answers.mask)
    assert rows == [2] * len(decoder.layers)


def test_a_prompt_with_several_answers_is_read_once_for_them_all(family, make_model, monkeypatch):
    _, sampler, asked = make_case(family, make_model)
    apart = [drawn_answers(sampler, asked, (n,)).ids[0] for n in (0, 1)]
    decoder, tokens = sampler.llava.model, []
    run = decoder.run_layer
    monkeypatch.setattr(
        decoder, "run_layer", lambda *args: (tokens.append(args[1].shape[:2]), run(*args))[1]
    )
    answers = sampler([asked[n] for n in (0, 1, 0)], [(7, n, 0) for n in (0, 1, 0)])
    for row, n in enumerate((0, 1, 0)):
        wanted = apart[n][: answers.ids.shape[1]]
        assert torch.equal(answers.ids[row][: len(wanted)], wanted)
    first, layers = answers.prompt.inputs_embeds.shape[1], sampler.stage.layer + 1
    assert all(rows == 1 or length == 1 for rows, length in tokens[: 3 * layers])
    assert max(length for _, length in tokens[: 2 * layers]) == first - 1


def test_the_released_pass_is_exact_where_tokens_go_before_the_first_layer(family, make_model):
    policy, sampler, asked = make_case(family, make_model, layer=-1)
    answers = drawn_answers(sampler, asked)
    exact = objective(policy, sampler, token_pass="exact").log_probs(answers, answers.mask)
    released = objective(policy, sampler).log_probs(answers, answers.mask)
    torch.testing.assert_close(released, exact, atol=2e-5, rtol=1e-4)


def test_the_first_token_of_the_released_pass_follows_from_the_prompt_as_it_is_used(
    family, make_model
):
    policy, sampler, asked = make_case(family, make_model)
    answers = drawn_answers(sampler, asked)
    exact = objective(policy, sampler, token_pass="exact").log_probs(answers, answers.mask)
    released = objective(policy, sampler).log_probs(answers, answers.mask)
    torch.testing.assert_close(released[:, 0], exact[:, 0], atol=2e-5, rtol=1e-4)
    assert (released[:, 1:] - exact[:, 1:]).abs().max() > 1e-3  # layers before the cut see less


@pytest.mark.parametrize("token_pass", ["released", "exact"])
def test_the_gradient_is_the_policy_gradient(family, make_model, token_pass):
    policy, sampler, asked = make_case(family, make_model)
    answers = drawn_answers(sampler, asked, (0, 0, 1, 1))
    worth = advantages(torch.tensor([1.0, 0.0, 0.25, 0.5]), 2)
    learned = objective(policy, sampler, token_pass=token_pass, kd_weight=0.0, max_seq_length=None)
    learned(answers, worth)["loss"].backward()
    trained = [p for p in policy.parameters() if p.requires_grad]
    found = [p.grad.clone() for p in trained]
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)

    # By hand: minus the mean over answers of advantage x mean gradient of log p(token).
    wanted = [torch.zeros_like(p) for p in trained]
    log_probs = learned.log_probs(answers, answers.mask)
    for row in range(4):
        for place in range(int(answers.mask[row].sum())):
            grads = torch.autograd.grad(log_probs[row, place], trained, retain_graph=True)
            share = worth[row] / answers.mask[row].sum() / 4
            wanted = [total - share * grad for total, grad in zip(wanted, grads, strict=True)]
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-3)
    assert max(float(grad.abs().max()) for grad in found) > 1e-3


@pytest.mark.parametrize("token_pass", ["released", "exact"])
def test_a_step_makes_the_better_answer_likelier_than_the_worse(family, make_model, token_pass):
    policy, sampler, asked = make_case(family, make_model)
    answers = drawn_answers(sampler, asked, (0, 0))
    assert not torch.equal(answers.ids[0], answers.ids[1])
    learned = objective(policy, sampler, token_pass=token_pass)
    counts = answers.mask.sum(dim=1)
    before = learned.log_probs(answers, answers.mask).sum(dim=1) / counts
    optimizer = torch.optim.SGD([p for p in policy.parameters() if p.requires_grad], lr=0.02)
    learned(answers, torch.tensor([1.0, -1.0]))["loss"].backward()
    optimizer.step()
    after = learned.log_probs(answers, answers.mask).sum(dim=1) / counts
    assert after[0] - after[1] > before[0] - before[1]


@pytest.mark.parametrize("token_pass", ["released", "exact"])
def test_the_reference_is_the_model_without_its_adapter(family, make_model, token_pass):
    policy, sampler, asked = make_case(family, make_model)
    answers = drawn_answers(sampler, asked)
    learned = objective(policy, sampler, token_pass=token_pass)
    with learned.without_adapter():
        reference = learned.log_probs(answers, answers.mask, reference=True)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    again = learned.log_probs(answers, answers.mask, reference=True)
    torch.testing.assert_close(reference, again)
    # Without pruning: it changes when a token changes that the policy does not see.
    out = sampler.llava(
        inputs_embeds=answers.prompt.inputs_embeds,
        attention_mask=answers.prompt.attention_mask,
        position_ids=answers.prompt.position_ids,
    )
    wanted = out.logits[:, -1].log_softmax(-1).gather(1, answers.ids[:, :1])[:, 0]
    torch.testing.assert_close(reference[:, 0], wanted, atol=2e-5, rtol=1e-4)


def test_an_adapter_that_does_nothing_has_no_distance(family, make_model):
    policy, sampler, asked = make_case(family, make_model, layer=-1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    asked = [Asked(**{**vars(one), "mask": torch.ones_like(one.mask)}) for one in asked]
    answers = drawn_answers(sampler, asked)
    assert answers.kept.sum() == answers.prompt.attention_mask.sum()
    for token_pass in ("released", "exact"):
        out = objective(policy, sampler, token_pass=token_pass)(answers, torch.ones(3))
        assert out["kd_loss"].abs() < 1e-6 and out["reward_loss"] == pytest.approx(-1)


@pytest.mark.parametrize("token_pass", ["released", "exact"])
def test_a_limit_cuts_every_answer_by_itself_and_no_prompt(family, make_model, token_pass):
    policy, sampler, asked = make_case(family, make_model)
    answers = drawn_answers(sampler, asked, (0, 1))
    answers.mask[:] = True
    lengths = answers.kept.sum(dim=1)
    limit = int(lengths[0]) + 3
    free = objective(policy, sampler, token_pass=token_pass, max_seq_length=None)
    cut = objective(policy, sampler, token_pass=token_pass, max_seq_length=limit)
    mask = torch.zeros_like(answers.mask)
    mask[0, :3] = True
    mask[1, : max(1, limit - int(lengths[1]))] = True
    whole, seen = free.log_probs(answers, answers.mask), cut.log_probs(answers, mask)
    # What is left is what it was: neither the prompt nor the tokens before the cut have changed.
    torch.testing.assert_close(seen, whole.masked_fill(~mask, 0), atol=2e-5, rtol=1e-4)
    worth = torch.tensor([1.0, -2.0])
    wanted = objective(policy, sampler, token_pass=token_pass, max_seq_length=None)
    answers_cut = type(answers)(**{**vars(answers), "mask": mask})
    torch.testing.assert_close(cut(answers, worth), wanted(answers_cut, worth))


def test_a_prompt_that_fills_the_limit_still_teaches_its_first_token(family, make_model):
    policy, sampler, asked = make_case(family, make_model)
    answers = drawn_answers(sampler, asked, (0, 1))
    out = objective(policy, sampler, max_seq_length=2)(answers, torch.tensor([1.0, 1.0]))
    assert out["reward_loss"] == pytest.approx(-1)
    out["loss"].backward()


def test_answers_in_a_batch_are_those_drawn_alone(family, make_model):
    policy, sampler, asked = make_case(family, make_model)
    batch = drawn_answers(sampler, asked, (0, 1, 0))
    for place, row in enumerate((0, 1, 0)):
        alone = sampler([asked[row]], [(7, row, place)])
        count = int(alone.mask.sum())
        assert batch.ids[place][batch.mask[place]].tolist() == alone.ids[0, :count].tolist()
        found = [objective(policy, sampler).log_probs(x, x.mask) for x in (batch, alone)]
        torch.testing.assert_close(found[0][place, :count], found[1][0], atol=2e-5, rtol=1e-4)


def test_a_question_that_occurs_twice_is_looked_at_once(family, make_model, monkeypatch):
    _, sampler, asked = make_case(family, make_model)
    seen, look = [], sampler.llava.image_tokens

    def count(images, *args, **kwargs):
        seen.append(len(images))
        return look(images, *args, **kwargs)

    monkeypatch.setattr(sampler.llava, "image_tokens", count)
    drawn_answers(sampler, asked, (0, 1, 0, 0))
    assert seen == [2]


def test_no_answer_without_an_end_mark_loses_a_token(family, make_model):
    _, sampler, asked = make_case(family, make_model)
    sampler.ends = [89]  # hardly ever drawn
    answers = drawn_answers(sampler, asked)
    rows = ~answers.ended
    assert rows.any() and answers.mask[rows].all()


def test_numbers_fall_on_tokens_as_often_as_they_are_likely():
    scores = torch.tensor([0.1, 0.2, 0.0, 0.7]).log().expand(2000, -1)
    rule = DrawnTokens(torch.from_numpy(drawn(4000, 1)).view(2000, 2))
    for _ in range(2):
        tokens = rule(None, scores).argmax(dim=1)
        shares = torch.bincount(tokens, minlength=4) / 2000
        torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.0, 0.7]), atol=0.03, rtol=0)
    cold = DrawnTokens(torch.from_numpy(drawn(2000, 1))[:, None], temperature=0.05)
    assert (cold(None, scores).argmax(dim=1) == 3).float().mean() > 0.99
    edge = DrawnTokens(torch.tensor([[0.0], [1.0 - 1e-16]]))
    assert edge(None, scores[:2]).argmax(dim=1).tolist() == [0, 3]


def test_masks_of_another_grid_are_refused(family, make_model):
    _, sampler, asked = make_case(family, make_model)
    wrong = Asked(**{**vars(asked[0]), "mask": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(ValueError, match="its mask has 4 cells"):
        sampler([wrong], [(1,)])


def test_questions_without_boxes_need_a_glimpse(family, make_model):
    _, sampler, asked = make_case(family, make_model)
    bare = Asked(**{**vars(asked[0]), "mask": None})
    with pytest.raises(ValueError, match="no trained glimpse to ask"):
        sampler([bare], [(1,)])


def test_a_stage_prunes_every_layer_behind_its_own(family, make_model):
    policy, sampler, asked = make_case(family, make_model)
    assert isinstance(sampler.stage, KeepNeeded)
    prompt, _ = sampler.prompts(asked)
    kept = (prompt.visual_index < 0) | prompt.extras[NEEDED]
    kept &= prompt.attention_mask
    with sampler.llava.using(sampler.stage):
        out = sampler.llava.model(
            prompt.inputs_embeds,
            prompt.attention_mask,
            prompt.position_ids,
            visuals=prompt.visuals,
            stage=sampler.stage,
        )
    for row in range(2):
        valid = slice(None) if out.valid is None else out.valid[row]
        assert out.index[row][valid].tolist() == kept[row].nonzero()[:, 0].tolist()


def test_a_name_that_no_layer_of_the_decoder_has_is_refused(make_model):
    with pytest.raises(ValueError, match="lora_target_modules x_proj"):
        with_adapter(make_model(), names=["q_proj", "x_proj"])


def test_the_adapter_is_on_the_decoder_alone(family, make_model):
    policy, *_ = make_case(family, make_model)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert len(trained) == 6 * 7 * 2
    assert all(".model.layers." in name and "lora_" in name for name in trained)


def test_a_question_without_boxes_keeps_what_the_glimpse_keeps(family, make_model):
    _, sampler, asked = make_case(family, make_model)
    llava = sampler.llava
    glimpse = tiny.with_random_parts(build_pruner("glimpseprune", max_remain_ratio=0.3))
    llava.pruner = sampler.glimpse = glimpse
    bare = Asked(**{**vars(asked[1]), "mask": None})
    answers = sampler([asked[0], bare, asked[0]], [(1, n) for n in range(3)])
    prompt = answers.prompt
    visual = (answers.kept & (prompt.visual_index >= 0)).sum(dim=1).tolist()
    assert visual[0] == visual[2] == int(asked[0].mask.sum())
    inputs = generate_inputs(llava, [bare.ids], [[bare.picture]], ["?"])
    with trace_pruning(llava) as trace:
        llava(**inputs)
    (own,) = trace.decoder_keep[max(trace.decoder_keep)]
    start = int((~prompt.attention_mask[1]).sum())
    assert (answers.kept[1].nonzero()[:, 0] - start).tolist() == own.tolist()
    assert 0 < visual[1] < bare.picture.pixels.shape[0] * bare.picture.pixels.shape[1]
    assert llava.pruner is glimpse


def test_a_glimpse_that_prunes_behind_the_last_layer_says_where_the_policy_does(make_model):
    llava = make_model()
    glimpse = GlimpsePrune()
    glimpse.module = Glimpse(GlimpseConfig.for_model(llava, reduce_layer=1000))
    flags = PolicyModelArguments()
    assert reduce_layer(llava, flags, glimpse) == llava.config.num_hidden_layers - 1
    assert reduce_layer(llava, flags, None) == GlimpseConfig.for_model(llava).reduce_layer
