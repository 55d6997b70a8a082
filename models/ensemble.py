"""Ensembles of N members of any backbone or defence, and how their answers become one.

Shapes: B batch, C channels, H and W pixels, K classes, N members.

Random sampling inference (RSI) lets one randomly chosen member answer, so a prediction costs one forward pass whatever N is. Which
member answers is the ensemble's own draw; random layers inside the members are sites with streams of their own.

Reference: RED, "Efficiently Boosting Ensemble Robustness via Random Sampling Inference", Eq. 1, 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from models.backbones.base import Backbone
from models.configuration import Config
from models.errors import UserError, unknown_name
from models.randomness import RandomModule, derive_seed, per_example_rows, random_sites
from models.registry import BuildRequest, fitted_section, parse_defence_section, section_stored_earlier

InferenceMode = Literal["rsi_sample", "rsi_call", "mean_prob", "mean_logit", "majority"]
"""`rsi_sample`: each example of a batch is answered by a member of its own; `rsi_call`: one member answers the whole batch;
`mean_prob`: mean of the probabilities; `mean_logit`: mean of the logits; `majority`: vote. `member(2)` names one member."""

INFERENCE_MODES: tuple[str, ...] = get_args(InferenceMode)

_MEMBER = re.compile(r"^member\((\d+)\)$")
_COMPARED_ROWS = 64  # examples whose members are compared between two draws


class Ensemble(RandomModule):
    """N networks behind one `forward`.

    Attributes:
        members: the networks, each from pixels (B, C, H, W) to logits (B, K), with its own normalization inside.
        inference: how `forward` answers; see `InferenceMode`.

    The draw is the choice of members: an index for `rsi_call`, an index per example for `rsi_sample`, which depends on the draw and on the
    row in the batch alone. The host knows it, so choosing does not wait for the device.

    Raises:
        UserError: there is no member, or the inference mode does not exist.
    """

    choice: Tensor

    def __init__(self, members: Iterable[nn.Module], inference: str = "rsi_sample") -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        if len(self.members) == 0:
            raise UserError("an ensemble needs at least one member")
        self.inference = inference
        # Member of `rsi_call`, key of the rows of `rsi_sample`, member that answers everything (-1: none).
        self.register_draw("choice", torch.tensor([0, 0, -1]))
        self._rows: tuple[int, Tensor] | None = None
        self.take_first_draw()

    @property
    def num_members(self) -> int:
        """N."""
        return len(self.members)

    @property
    def inference(self) -> str:
        """How `forward` answers."""
        return self._inference

    @inference.setter
    def inference(self, value: str) -> None:
        parse_inference(value, len(self.members))
        self._inference = value
        self.draw_scope = "per_example" if value == "rsi_sample" else "global"

    @property
    def num_configurations(self) -> int:
        """N where a member is drawn; 1 where all of them or a named one answers."""
        return self.num_members if self._inference in ("rsi_sample", "rsi_call") else 1

    def draw(self, generator: torch.Generator) -> None:
        index = int(torch.randint(self.num_members, (), generator=generator))
        self._choose(index, int(torch.randint(2**62, (), generator=generator)), -1)

    def set_configuration(self, index: int) -> None:
        """Let member `index` answer every example until the next draw. Has no effect on modes in which nothing is drawn."""
        if not 0 <= index < self.num_configurations:
            raise IndexError(f"configuration {index} is outside [0, {self.num_configurations})")
        self._choose(index, 0, index)

    def configuration_probability(self, index: int) -> float:
        """Return 1/N: every member is as likely."""
        del index
        return 1 / self.num_configurations

    def distance(self, first: dict[str, Any], second: dict[str, Any]) -> float:
        """Return 1 where different members answer, as a mean over the first examples of a batch where each has its own."""
        if self.num_configurations == 1:
            return 0.0
        return (self._members_under(first) != self._members_under(second)).double().mean().item()

    def _members_under(self, state: dict[str, Any]) -> Tensor:
        """Return which member answers under a draw: one for all, or one for each of the first rows of a batch."""
        if self.inference == "rsi_call":
            return state["buffers"]["choice"][:1]
        before = self.draw_state()
        self.load_draw_state(state)
        try:
            return self.member_indices(_COMPARED_ROWS).clone()
        finally:
            self.load_draw_state(before)

    def _choose(self, *choice: int) -> None:
        self.set_draw("choice", torch.tensor(choice), on_host=list(choice))

    def forward(self, x_BCHW: Tensor, inference: str | None = None) -> Tensor:
        """Return scores (B, K), whose largest is the prediction.

        Args:
            x_BCHW: pixels in [0,1].
            inference: overrides the configured mode for this call; also `member(i)`.

        Logits for `rsi_*`, `mean_logit` and `member(i)`; log-probabilities for `mean_prob`; for `majority` the number of votes plus
        half the mean probability, so that a tie goes to the more probable class.
        """
        mode, member = parse_inference(self._inference if inference is None else inference, self.num_members)
        if member is not None:
            return self.members[member](x_BCHW)
        if mode in ("rsi_sample", "rsi_call"):
            call_index, _, selected = self.draw_on_host("choice")
            if mode == "rsi_call" or selected >= 0:
                return self.members[call_index](x_BCHW)
            return self._answer_per_example(x_BCHW)
        logits_NBK = self.member_logits(x_BCHW)
        if mode == "mean_logit":
            return logits_NBK.mean(dim=0)
        log_mean_BK = logits_NBK.log_softmax(dim=-1).logsumexp(dim=0) - math.log(self.num_members)
        if mode == "mean_prob":
            return log_mean_BK
        votes_BK = nn.functional.one_hot(logits_NBK.argmax(dim=-1), logits_NBK.shape[-1]).sum(dim=0)
        return votes_BK + 0.5 * log_mean_BK.exp()

    def member_logits(self, x_BCHW: Tensor) -> Tensor:
        """Return the logits of every member, (N, B, K)."""
        return torch.stack([member(x_BCHW) for member in self.members])

    def member_indices(self, num_examples: int) -> Tensor:
        """Return which member answers each of `num_examples` rows under `rsi_sample`, (B,) on the CPU."""
        _, row_key, selected = self.draw_on_host("choice")
        if selected >= 0:
            return torch.full((num_examples,), selected)
        if self._rows is None or self._rows[0] != row_key or len(self._rows[1]) < num_examples:
            rows = per_example_rows(
                row_key,
                num_examples,
                lambda generator, count: torch.randint(self.num_members, (count,), generator=generator),
            )
            self._rows = (row_key, rows)
        return self._rows[1][:num_examples]

    def _answer_per_example(self, x_BCHW: Tensor) -> Tensor:
        """Group the rows by member, evaluate each group once, put the answers back in place."""
        index_B = self.member_indices(len(x_BCHW))
        order_B = index_B.argsort(stable=True)
        counts = index_B.bincount(minlength=self.num_members).tolist()
        there_2B = torch.stack([order_B, order_B.argsort()]).to(x_BCHW.device, non_blocking=True)
        groups = x_BCHW[there_2B[0]].split(counts)
        answers = [member(group) for member, group in zip(self.members, groups, strict=True) if len(group)]
        if not answers:
            return self.members[0](x_BCHW)
        return torch.cat(answers)[there_2B[1]]

    def extra_repr(self) -> str:
        return f"num_members={self.num_members}, inference={self.inference}"


def parse_inference(inference: str, num_members: int) -> tuple[str, int | None]:
    """Return the mode and, for `member(i)`, the index of the member.

    Raises:
        UserError: there is no such mode, or no member of that index.
    """
    match = _MEMBER.match(inference)
    if match is None:
        if inference not in INFERENCE_MODES:
            raise unknown_name("inference mode", inference, [*INFERENCE_MODES, "member(0)"])
        return inference, None
    index = int(match.group(1))
    if index >= num_members:
        raise UserError(f"{inference} does not exist: the ensemble has members 0 to {num_members - 1}")
    return "member", index


def ensemble_in(model: nn.Module) -> Ensemble:
    """Return the ensemble that `model` is or wraps.

    Raises:
        UserError: there is none.
    """
    for module in model.modules():
        if isinstance(module, Ensemble):
            return module
    raise UserError(f"{type(model).__name__} is not an ensemble; defences red, ps_red, gal, adp, dverge and trs are")


@contextlib.contextmanager
def inference_mode_of(model: nn.Module, inference: str) -> Iterator[None]:
    """Within, the ensemble in `model` answers in the mode `inference`; afterwards as before, also after an exception."""
    ensemble = ensemble_in(model)
    before = ensemble.inference
    ensemble.inference = inference
    try:
        yield
    finally:
        ensemble.inference = before


class EnsembleConfig(Config):
    """Parameters that all ensembles share."""

    num_members: int = Field(8, ge=1, le=64, description="N, number of members.")
    inference: InferenceMode = Field(
        "rsi_sample",
        description="How members make one answer: `rsi_sample` (a random member per example), `rsi_call` (a random member per batch), "
        "`mean_prob`, `mean_logit`, `majority`. RED draws; whether per example is not measured (A7).",
    )
    member: dict[str, Any] | None = Field(
        None,
        description="Defence that every member carries, e.g. `{name: ctrw, constraint: project}`; none: plain networks.",
    )
    classifier_std: float | None = Field(
        None,
        gt=0,
        le=100,
        description="Standard deviation of the members' initial classifier weights; none: uniform within 1 / sqrt(features), as in the "
        "codes of DVERGE and TRS (0.07 for ResNet-8, 0.03 for ResNet-18). At 0.001, where other defences' ResNets begin, input gradients "
        "nearly vanish at first and terms made of their directions outweigh cross-entropy.",
    )

    @classmethod
    def stored_earlier(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        """Return the parameters with those of the members' defence treated alike."""
        member = parameters.get("member")
        return parameters if member is None else parameters | {"member": section_stored_earlier(member)}

    @property
    def revision(self) -> int:
        """Classifiers began at the backbone's own standard deviation, 0.001 for ResNets. And that of the members' defence."""
        return 1 + (0 if self.member is None else parse_defence_section(self.member)[1].revision)

    @field_validator("member")
    @classmethod
    def _member_is_a_defence(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is None:
            return None
        if not isinstance(value.get("name"), str):
            raise ValueError(f"a member's defence needs a name, e.g. {{name: ctrw}}; got {value!r}")
        entry, parameters = parse_defence_section(value)
        if issubclass(entry.config, EnsembleConfig):
            raise ValueError(f"members of an ensemble cannot be ensembles themselves: {entry.name!r} is one")
        return {"name": entry.name, **parameters.model_dump(mode="json")}


def num_members_of(config: Config) -> int:
    """Return how many networks a defence's parameters ask for: 1 unless they are those of an ensemble."""
    return config.num_members if isinstance(config, EnsembleConfig) else 1


def fit_members(config: EnsembleConfig, backbone: Backbone) -> EnsembleConfig:
    """Return the parameters with the members' defence fitted to a backbone; what `DefenceModel.fit` of an ensemble is."""
    return config if config.member is None else config.changed(member=fitted_section(config.member, backbone))


def build_members(config: EnsembleConfig, request: BuildRequest) -> list[nn.Module]:
    """Return N members that differ in their initial weights and in the streams of their draws."""
    members = [_build_member(config, request, index) for index in range(config.num_members)]
    for index, member in enumerate(members):
        _initialize_classifier(member, config.classifier_std, derive_seed(request.seed, "classifier", index))
        for _, site in random_sites(member):
            if site.stream_name is not None:  # sites of one member may choose together, those of two members never do
                site.stream_name = f"members.{index}.{site.stream_name}"
    return members


def _initialize_classifier(member: nn.Module, std: float | None, seed: int) -> None:
    for backbone in member.modules():
        if isinstance(backbone, Backbone) and not backbone.classifier.weight.is_meta:
            weight_KD = backbone.classifier.weight
            generator = torch.Generator().manual_seed(seed)
            if std is None:
                nn.init.uniform_(weight_KD, -(weight_KD.shape[1] ** -0.5), weight_KD.shape[1] ** -0.5, generator=generator)
            else:
                nn.init.normal_(weight_KD, std=std, generator=generator)


def _build_member(config: EnsembleConfig, request: BuildRequest, index: int) -> nn.Module:
    if config.member is None:
        return request.network(member=index)
    own_request = dataclasses.replace(request, seed=derive_seed(request.seed, "member", index))
    entry, parameters = parse_defence_section(config.member)
    return entry.network(parameters, own_request)
