"""The steps of a recipe and their settings: what training, surgery, pruning and rounds are told."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from bevel.core.limits import QUANTITIES, Amount, parse_limit
from bevel.core.section import Section


class Distill(Section):
    """Learn from the original network as well as from the labels.

    From its outputs (Hinton et al. 2015), with `features` from its feature maps as well (Romero et
    al., FitNets, 2015), and with `embedding` from what its last layer reads (Chen et al. 2022).
    """

    weight: float = Field(default=0.5, ge=0, le=1, description="share of the loss")
    temperature: float = Field(default=4.0, gt=0)
    features: float = Field(
        default=0.0,
        ge=0,
        description="weight of the relative squared distance between feature maps, those at the "
        "ends of the stages, added to the loss; above 0, steps run uncompiled",
    )
    embedding: float = Field(
        default=0.0,
        ge=0,
        description="weight of the relative squared distance between what the last layers read, "
        "through a linear map that is learned along, added to the loss",
    )
    views: int | None = Field(
        default=None,
        ge=1,
        description="epochs go round this many augmentations of the images, and the original is "
        "asked about each once: later epochs cost no more than training without it; default: new "
        "ones in every epoch",
    )
    unlabelled: bool = Field(
        default=False,
        description="learn the original's answers to the images of data.unlabelled as well",
    )

    @model_validator(mode="after")
    def answers_only(self) -> Distill:
        """Feature maps are too large to be kept."""
        if self.views is not None and self.features > 0:
            raise ValueError(
                "views keeps the original's answers, not its feature maps: leave one out"
            )
        return self


ADAMW_LR = 0.0005
"""Peak learning rate of AdamW where a step names none: those of SGD are far too large for it."""


class TrainStep(Section):
    """Train with linear warm-up and cosine decay."""

    epochs: int = Field(ge=1)
    lr: float = Field(default=0.1, gt=0, description="peak learning rate")
    optimizer: Literal["sgd", "adamw"] = Field(
        default="sgd",
        description="sgd: with Nesterov momentum; adamw: steps that do not depend on the size of "
        "the gradients, for transformers, and for a new head, which large features make SGD throw "
        f"about; its lr is {ADAMW_LR} unless set, and its weight_decay wants 0.01 or more",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of adamw: its first beta")
    weight_decay: float = Field(default=5e-4, ge=0)
    warmup_epochs: float = Field(default=0.5, ge=0)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    distill: Distill | None = None
    ema: float | None = Field(
        default=None, gt=0, lt=1, description="decay of the averaged weights that are kept"
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="auto: the fastest of those measured on this machine; with a pinned one and "
        "compile: never, two runs of the recipe end with the same bytes",
    )
    unfreeze: int = Field(
        default=0,
        ge=0,
        description="epochs in which layers join one stage at a time, the last layer first; until "
        "then they stay as they are",
    )
    compile: Literal["auto", "never"] = Field(
        default="auto", description="auto: torch.compile where it pays for its compile time"
    )
    fade: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="after progressive surgery: share of the steps in which activation functions "
        "turn into ReLU",
    )

    @model_validator(mode="after")
    def one_head(self) -> TrainStep:
        """Layers that join one stage at a time do not know the map between embeddings."""
        if self.unfreeze and self.distill is not None and self.distill.embedding > 0:
            raise ValueError("unfreeze and distill.embedding do not go together: leave one out")
        return self

    @model_validator(mode="before")
    @classmethod
    def rate_of_the_optimizer(cls, values: Any) -> Any:
        """AdamW has its own learning rate where none is written."""
        if isinstance(values, dict) and values.get("optimizer") == "adamw":
            return {"lr": ADAMW_LR} | values
        return values


class FinetuneStep(TrainStep):
    """Train the compressed network, gentler than from scratch."""

    lr: float = Field(default=0.02, gt=0, description="peak learning rate")


class SparsifyStep(FinetuneStep):
    """Fine-tune so that what will be removed has little weight left by then."""

    penalty: Literal["growing", "slimming"] = Field(
        default="growing",
        description="growing: on the channels that the next prune step would remove now, ever "
        "stronger; slimming: on all scales of batch norms, for the criterion bn_scale",
    )
    strength: float | None = Field(
        default=None, gt=0, description="of the pull towards zero; default 1 and 1e-4"
    )


class QatStep(FinetuneStep):
    """Fine-tune with the rounding of int8 in the forward (quantization-aware training).

    In the last third of the steps, batch-norm statistics and ranges of activations stay as they
    are.
    """

    lr: float = Field(default=0.005, gt=0, description="peak learning rate")
    runtime: str | None = Field(
        default=None,
        description="whose int8 is simulated; default: that of the first int8 target",
    )

    @model_validator(mode="after")
    def answers_alone(self) -> QatStep:
        """In the traced network that is trained, layers are no modules any more."""
        if self.distill is not None and self.distill.embedding > 0:
            raise ValueError("qat does not take distill.embedding: leave it to a finetune step")
        return self


def _limit(written: object, info: ValidationInfo) -> object:
    """As it was written, if it is a limit of the field's quantity."""
    parse_limit(str(info.field_name), written)
    return written


Limited = Annotated[float | str, BeforeValidator(_limit)] | None


class Budget(Section):
    """What may remain: all that are given must hold.

    A number up to 1, or a percentage, is a share of the original; a number above 1, or one with
    its unit, is an amount: 0.5, 40 %, 300, 0.8 ms.
    """

    macs: Limited = Field(default=None, description=QUANTITIES["macs"])
    params: Limited = Field(default=None, description=QUANTITIES["params"])
    size_kb: Limited = Field(default=None, description=QUANTITIES["size_kb"])
    peak_memory_kb: Limited = Field(default=None, description=QUANTITIES["peak_memory_kb"])
    latency_ms: Limited = Field(default=None, description=QUANTITIES["latency_ms"])

    @model_validator(mode="after")
    def something(self) -> Budget:
        """An empty budget is no request."""
        if not self.limits():
            known = ", ".join(QUANTITIES)
            raise ValueError(f"a budget needs at least one of {known}, such as macs: 0.5")
        return self

    def limits(self) -> dict[str, Amount]:
        """The given limits by name, as they are written."""
        return {name: value for name, value in self if value is not None}


class PruneStep(Section):
    """Remove channels, and everything that depends on them."""

    criterion: str = Field(default="l2", description="see: bevel list criteria")
    allocate: str = Field(default="global", description="see: bevel list allocators")
    reduction: Literal["mean", "max", "product", "first"] = Field(
        default="mean",
        description="how the scores of all that goes with a channel become one; first: only those "
        "of the layer that makes it",
    )
    budget: Budget | None = Field(default=None, description="what may remain: macs: 0.5")
    ratio: float | None = Field(
        default=None, gt=0, lt=1, description="what is removed: share of the channels"
    )
    ratios: dict[str, Annotated[float, Field(ge=0, lt=1)]] | None = Field(
        default=None,
        min_length=1,
        description="what is removed by module name (globs; later ones win): layer1.*: 0.25",
    )
    align: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default=8,
        description="widths become multiples of this; auto: the largest step that a target's "
        "runtime likes",
    )
    ignore: list[str] = Field(
        default_factory=list, description="module names (globs) whose channels all stay"
    )
    reconstruct: bool = Field(
        default=True,
        description="fit what is left of each layer to what it gave before, on calibration images",
    )

    @property
    def asks_target(self) -> bool:
        """Whether what it removes depends on where the network will run."""
        limits = self.budget.limits() if self.budget is not None else {}
        return self.align == "auto" or not {"macs", "params"}.issuperset(limits)

    @field_validator("align", mode="before")
    @classmethod
    def whole_or_auto(cls, value: object) -> object:
        """One message for all that is neither."""
        text = str(value)  # a number, or the text of an option
        if text != "auto" and not (text.isdecimal() and int(text) >= 1):
            raise ValueError("expected a whole number from 1, or auto")
        return value

    @model_validator(mode="after")
    def one_request(self) -> PruneStep:
        """Exactly one of budget, ratio and ratios."""
        if [self.budget, self.ratio, self.ratios].count(None) != 2:
            raise ValueError(
                "give either budget (what may remain) or ratio (what is removed), or ratios by "
                "layer"
            )
        return self


class IterateStep(Section):
    """Prune and fine-tune in turns."""

    prune: PruneStep = Field(
        default=PruneStep(budget=Budget(macs=0.7)),
        description="what to cut, by shares: in all rounds together; with max_accuracy_drop in "
        "each round, of what the round before left",
    )
    finetune: FinetuneStep
    rounds: int | None = Field(
        default=None, ge=1, description="default 3; with max_accuracy_drop at most 10"
    )
    schedule: Literal["linear", "cubic"] = Field(
        default="linear", description="how the cut is spread over the rounds; cubic: most at first"
    )
    max_accuracy_drop: float | None = Field(
        default=None,
        gt=0,
        lt=100,
        description="points of validation accuracy that may be lost: rounds go on, more gently "
        "after one that lost too much, and the smallest network that holds is kept",
    )

    @model_validator(mode="after")
    def something_that_rounds_can_share(self) -> IterateStep:
        """Ratios by layer are one cut, and rounds that back off need a budget to do it with."""
        if self.prune.ratios is not None:
            raise ValueError("rounds take a budget or a ratio, not ratios by layer")
        if self.max_accuracy_drop is not None and self.prune.budget is None:
            raise ValueError("with max_accuracy_drop, give a budget: what each round leaves")
        return self


class SurgeryStep(Section):
    """Replace layers that are dear on embedded processors by cheap ones."""

    rules: str | list[str] = Field(
        default="lite",
        description="a set (exact, lite, tidl), or rules in order; see: bevel list rules",
    )
    progressive: bool = Field(
        default=False,
        description="activation functions turn into ReLU in the finetune step that follows",
    )


class ResizeStep(Section):
    """Show the network images of another size from here on; the original keeps its own."""

    size: int = Field(ge=1, description="square side in pixels")


StepSettings = TrainStep | PruneStep | IterateStep | SurgeryStep | ResizeStep
"""What a step holds under its verb."""


TRAINING = ("train", "sparsify", "iterate", "finetune")
"""Verbs of steps after which nothing fades any more."""


class Step(Section):
    """One step: a mapping with the step's verb as its only key."""

    VERBS: ClassVar[tuple[str, ...]] = (
        "train",
        "resize",
        "surgery",
        "sparsify",
        "prune",
        "iterate",
        "finetune",
        "qat",
    )

    train: TrainStep | None = None
    resize: ResizeStep | None = None
    surgery: SurgeryStep | None = None
    sparsify: SparsifyStep | None = None
    prune: PruneStep | None = None
    iterate: IterateStep | None = None
    finetune: FinetuneStep | None = None
    qat: QatStep | None = None

    @model_validator(mode="after")
    def one_verb(self) -> Step:
        """Exactly one verb."""
        given = [verb for verb in self.VERBS if getattr(self, verb) is not None]
        if len(given) != 1:
            raise ValueError(f"a step has exactly one of {', '.join(self.VERBS)}")
        return self

    @property
    def verb(self) -> str:
        """Which step this is."""
        return next(verb for verb in self.VERBS if getattr(self, verb) is not None)

    @property
    def pruning(self) -> PruneStep | None:
        """What it removes, if it removes anything."""
        return self.iterate.prune if self.iterate is not None else self.prune

    @property
    def distill(self) -> Distill | None:
        """How it learns from the original, if it does."""
        training = self.iterate.finetune if self.iterate is not None else self.settings
        return training.distill if isinstance(training, TrainStep) else None

    @property
    def settings(self) -> StepSettings:
        """The settings under the verb."""
        value: StepSettings = getattr(self, self.verb)
        return value


def pruning_at(steps: Sequence[Step], position: int) -> PruneStep | None:
    """What a step removes, or what a later one does where this step prepares for it."""
    step = steps[position]
    if step.sparsify is not None and step.sparsify.penalty == "growing":
        later = (other.pruning for other in steps[position + 1 :])
        return next((pruning for pruning in later if pruning is not None), None)
    return step.pruning
