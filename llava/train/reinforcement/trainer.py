"""The Trainer of the reinforcement: answers are drawn, scored and compared in every step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..llava_trainer import LLaVATrainer
from ..saving import lora_state, save_lora
from .loss import advantages
from .objective import PolicyObjective
from .rewards import Scorer
from .sampling import Answers, AnswerSampler, Asked, drawn

#: what a draw is for: behind seed, epoch and question
ANSWER, MASK = 0, 1


class PolicyTrainer(LLaVATrainer):
    """Trains and saves an adapter alone.

    model:   a `PolicyObjective`
    answers: draws them from the model inside
    scorer:  says what they are worth
    glimpse_share: of the questions, those that are pruned by the glimpse in spite of their boxes

    The answers of one step stand in a row over all processes, and so do the groups in it.
    """

    full_batches = True

    def __init__(
        self, *args, answers: AnswerSampler, scorer: Scorer, glimpse_share: float = 0.0, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.answers, self.scorer, self.glimpse_share = answers, scorer, glimpse_share
        self._sums: dict[str, Tensor] = {}
        self._told = 0, 0

    @property
    def objective(self) -> PolicyObjective:
        return self.accelerator.unwrap_model(self.model)

    @property
    def hidden_size(self) -> int:
        return self.model.llava.config.hidden_size

    @property
    def repeats(self) -> int:
        """The answers to a question, which come in a row."""
        return self.args.num_generations

    def run_settings(self) -> dict:
        layer = self.answers.stage.layer
        return {"num_generations": self.args.num_generations, "reduce_layer": layer}

    def compute_loss(self, model, inputs, return_outputs: bool = False):
        asked, wanted = inputs["asked"], inputs["wanted"]
        size, first = self.args.num_generations, self.args.process_index * len(asked)
        places = [(first + row) % size for row in range(len(asked))]
        asked = [self._masked(one) for one in asked]
        keys = [(*self._key(one, ANSWER), n) for one, n in zip(asked, places, strict=True)]
        answers = self.answers(asked, keys)
        own = zip(answers.ids, answers.mask, strict=True)
        texts = self.answers.front.decode([ids[mask] for ids, mask in own])
        scores = torch.tensor(self.scorer.scores(wanted, texts), device=answers.ids.device)
        scores = self.accelerator.gather(scores)
        worth = advantages(scores, size)[first : first + len(asked)]
        out = model(answers, worth)
        self._note(out, answers, scores.view(-1, size))
        return (out["loss"], out) if return_outputs else out["loss"]

    def _masked(self, one: Asked) -> Asked:
        """The question, without its mask where the glimpse is asked instead: for all of a group."""
        if self.glimpse_share and drawn(1, *self._key(one, MASK))[0] < self.glimpse_share:
            return replace(one, mask=None)
        return one

    def _key(self, one: Asked, purpose: int) -> tuple[int, ...]:
        return self.data_seed, self.order.epoch, one.key, purpose

    # --- the log ------------------------------------------------------------------------------

    def _note(self, out: dict[str, Tensor], answers: Answers, groups: Tensor) -> None:
        """Sums up what the log shows; groups: (groups, answers) scores of all processes."""
        known = ~groups.isnan()
        scores = groups.masked_fill(~known, 0)
        mean = scores.sum(dim=1) / known.sum(dim=1).clamp(min=1)
        off = (scores - mean[:, None]).masked_fill(~known, 0)
        spread = (off.square().sum(dim=1) / (known.sum(dim=1) - 1).clamp(min=1)).sqrt()
        prompt = answers.prompt
        visual = prompt.visual_index >= 0
        found = {
            "reward": (scores.sum(), known.sum()),
            "reward_std": (spread.sum(), len(spread)),
            "completion_length": (answers.mask.sum(), len(answers.ids)),
            "ended": (answers.ended.sum(), len(answers.ids)),
            "kept": ((answers.kept & visual).sum(), visual.sum()),
        }
        found |= {name: (value, 1) for name, value in out.items() if name != "loss"}
        device = groups.device
        for name, pair in found.items():
            pair = torch.stack([torch.as_tensor(n, dtype=torch.float, device=device) for n in pair])
            self._sums[name] = self._sums.get(name, 0) + pair

    def log(self, logs: dict[str, float]) -> None:
        if self._sums and "loss" in logs:
            sums = {k: self.accelerator.reduce(v, "sum") for k, v in self._sums.items()}
            means = {name: (total / count).item() for name, (total, count) in sums.items()}
            logs = {**logs, **{name: round(mean, 4) for name, mean in means.items()}}
            if self.scorer.judge is not None:
                logs |= self._verdicts()
            self._sums = {}
        super().log(logs)

    def _verdicts(self) -> dict[str, int]:
        """How often the judge was asked since the last time, and did not answer."""
        now = self.scorer.requests, self.scorer.failures
        news = [new - old for new, old in zip(now, self._told, strict=True)]
        self._told = now
        counts = torch.tensor(news, device=self.args.device)
        requests, failures = self.accelerator.reduce(counts, "sum").tolist()
        return {"judge_requests": requests, "judge_failures": failures}

    # --- checkpoints --------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter, as `llava.train.train` writes its own. Called by every process."""
        policy = self.objective.policy
        state = lora_state(policy)
        if self.args.should_save:
            save_lora(policy, output_dir or self.args.output_dir, state, {})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        from peft import load_peft_weights, set_peft_model_state_dict

        weights = load_peft_weights(resume_from_checkpoint, device="cpu")
        set_peft_model_state_dict(self.objective.policy, weights)
