"""The recipe: what to do, as YAML validated by pydantic. Names are resolved later, by the stages.

A recipe names a model, data, an ordered list of steps, targets and a seed. `load` reads a file,
applies `a.b=c` overrides and turns every mistake into one line that names the key.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
    model_validator,
)

from bevel.core.errors import RecipeError, one_line, suggestion
from bevel.core.overrides import assign, override
from bevel.core.section import Section
from bevel.core.steps import TRAINING, Step, pruning_at


class ModelSection(Section):
    """Which network, with which weights."""

    name: str = Field(
        description="bevel:NAME, torchvision:NAME, timm:NAME or path/to/file.py:factory"
    )
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of the factory"
    )
    checkpoint: Path | None = Field(
        default=None, description=".safetensors, or .pt/.pth/.th read with weights_only=True"
    )
    head: Literal["checkpoint", "new"] = Field(
        default="checkpoint",
        description="new: the last layer starts fresh if the checkpoint is for other classes",
    )


class Normalize(Section):
    """Per-channel mean and standard deviation of images scaled to 0..1."""

    mean: list[float] = Field(min_length=1)
    std: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)

    @model_validator(mode="after")
    def same_length(self) -> Normalize:
        """Mean and standard deviation are for the same channels."""
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean has {len(self.mean)} channels and std has {len(self.std)}")
        return self


class Augment(Section):
    """Random changes of training images."""

    flip: bool = Field(default=False, description="mirror left to right, half of the time")
    crop: Literal["none", "pad", "resized"] = Field(
        default="none",
        description="pad: pad by `padding` and crop back; resized: random area and aspect ratio",
    )
    padding: int = Field(default=4, ge=0, description="pixels, for crop: pad")
    scale: tuple[float, float] = Field(
        default=(0.08, 1.0),
        description="least and largest share of the image's area, for crop: resized",
    )

    @field_validator("scale", mode="wrap")
    @classmethod
    def shares(cls, given: object, handler: ValidatorFunctionWrapHandler) -> tuple[float, float]:
        """A share of the area is above nothing and at most all of it."""
        try:
            low, high = handler(given)
        except ValidationError:
            low, high = 0.0, 0.0
        if not 0 < low <= high <= 1:
            raise ValueError("expected [least, largest], with 0 < least <= largest <= 1")
        return low, high


class DataSection(Section):
    """Which images, and how they become tensors."""

    name: str = Field(description="digits, cifar10, cifar100, imagefolder or file.py:factory")
    root: Path | None = Field(default=None, description="folder that holds the data")
    download: bool = Field(default=False, description="fetch the data into root if it is absent")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="keyword arguments of a file.py:factory"
    )
    unlabelled: Path | None = Field(
        default=None,
        description="folder of images of anything, without labels, for steps with "
        "distill.unlabelled",
    )
    size: int | None = Field(
        default=None, ge=1, description="square side in pixels that the network sees"
    )
    resize: int | None = Field(
        default=None, ge=1, description="shorter side before the centre crop; default: size"
    )
    normalize: Normalize | None = Field(default=None, description="default: scale to 0..1 only")
    augment: Augment = Augment()
    validation: float = Field(
        default=0.1, gt=0, lt=1, description="share of train held out where the data has no split"
    )
    batch_size: int = Field(default=128, ge=1)
    workers: int = Field(default=0, ge=0, description="processes that decode large images")

    def at(self, size: int) -> DataSection:
        """The same part of the same images in another size."""
        resize = self.resize
        if resize is not None and self.size is not None:
            resize = round(resize * size / self.size)
        return self.model_copy(update={"size": size, "resize": resize})


class Calibration(Section):
    """Unlabelled use of training images: batch-norm statistics, sensitivity, int8 ranges."""

    images: int = Field(default=512, ge=1)


class Quantization(Section):
    """How float becomes int8."""

    quantizer: Literal["torch", "native", "auto"] = Field(
        default="torch",
        description="torch: bevel's, on torchao PT2E; native: the runtime's own; auto: the better "
        "of both, measured on calibration images",
    )
    observer: Literal["minmax", "percentile", "mse"] | None = Field(
        default=None,
        description="what becomes the range of an activation; without it mse, and of a runtime's "
        "own quantizer minmax",
    )
    equalize: bool = Field(
        default=False, description="even out the channels' ranges across layers (Nagel et al. 2019)"
    )
    correct_bias: bool = Field(
        default=False, description="take back the mean error of each layer's output"
    )
    learn_rounding: bool = Field(
        default=False,
        description="round weights so that the errors of a layer take each other back (GPTQ)",
    )
    keep_float: list[str] = Field(
        default_factory=list, description="module names (globs) that stay in float"
    )
    accuracy_drop: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="validation accuracy that int8 may lose against float; the fewest layers go "
        "back to float until it holds",
    )

    @property
    def ranges(self) -> str:
        """The observer of bevel's own quantizer."""
        return self.observer or "mse"

    @property
    def native_ranges(self) -> str:
        """The observer of a runtime's own quantizer: what it takes when it is asked for nothing."""
        return self.observer or "minmax"


class Target(Section):
    """Where the network will run."""

    runtime: str = Field(default="onnxruntime", description="see: bevel list runtimes")
    precision: Literal["float32", "float16", "bfloat16", "int8", "int8-weights"] = Field(
        default="float32", description="int8-weights: weights only, the arithmetic stays in float"
    )
    device: str = Field(
        default="local",
        description="its address, such as ssh:pi@raspberrypi.local; see: bevel list devices",
    )
    threads: int = Field(default=1, ge=1)

    def __str__(self) -> str:
        return f"{self.runtime}:{self.precision}@{self.device}"


class Range(Section):
    """Numbers from low to high; whole ones where all that is given is whole."""

    low: int | float
    high: int | float
    step: int | float | None = Field(default=None, gt=0, description="distance between values")
    log: bool = Field(default=False, description="search the orders of magnitude evenly")

    @model_validator(mode="after")
    def numbers_to_choose(self) -> Range:
        """More than one number, and what a logarithm can take."""
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0, and no step")
        return self


Dimension = Annotated[
    Annotated[list[Any], Field(min_length=1), Tag("choices")] | Annotated[Range, Tag("range")],
    Discriminator(
        lambda value: {list: "choices", dict: "range", Range: "range"}.get(type(value)),
        custom_error_type="dimension",
        custom_error_message="expected a list of choices, or a range such as {low: 0.3, high: 0.7}",
    ),
]


class SearchSection(Section):
    """What `bevel search` varies, and what it looks for. `bevel run` does not read it."""

    space: dict[str, Dimension] = Field(
        min_length=1, description="keys of the recipe, such as steps.prune.criterion, with values"
    )
    objectives: list[Literal["accuracy", "latency_ms", "size_bytes", "macs", "params"]] = Field(
        default=["accuracy", "latency_ms", "size_bytes"],
        min_length=1,
        description="accuracy is on validation images and is to be high, the others low",
    )

    @field_validator("objectives")
    @classmethod
    def each_once(cls, names: list[str]) -> list[str]:
        """Twice the same is one objective."""
        if len(set(names)) < len(names):
            raise ValueError("an objective is there twice")
        return names


class Recipe(Section):
    """From a trained network to measured artifacts."""

    version: Literal[1]
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: int = Field(default=0, ge=0)
    model: ModelSection
    data: DataSection
    steps: list[Step] = Field(min_length=1)
    calibration: Calibration = Calibration()
    quantization: Quantization = Quantization()
    targets: list[Target] = Field(min_length=1)
    search: SearchSection | None = None

    @property
    def compressed_data(self) -> DataSection:
        """The images as the compressed network sees them, after all resize steps."""
        sizes = self._resized()
        return self.data.at(sizes[-1]) if sizes else self.data

    def data_for(self, width: int | str) -> DataSection:
        """The images as a network sees them whose input is so wide: a resize step's, or `data`."""
        known = width == self.data.size or width not in self._resized()
        return self.data if known else self.data.at(int(width))

    @property
    def asks_unlabelled(self) -> bool:
        """Whether a step learns from images without labels."""
        return any(step.distill is not None and step.distill.unlabelled for step in self.steps)

    def _resized(self) -> list[int]:
        """The sizes of the resize steps, in order."""
        return [step.resize.size for step in self.steps if step.resize is not None]

    @model_validator(mode="after")
    def original_to_learn_from(self) -> Recipe:
        """Only a finetune step has an original to learn from."""
        if any(step.train is not None and step.train.distill is not None for step in self.steps):
            raise ValueError("train has no original to distill from; distill belongs to finetune")
        return self

    @model_validator(mode="after")
    def images_to_be_asked_about(self) -> Recipe:
        """Images without labels are for a step that learns from them."""
        if self.data.unlabelled is not None and not self.asks_unlabelled:
            raise ValueError("data.unlabelled is for steps with distill: {unlabelled: true}")
        return self

    @model_validator(mode="after")
    def surgery_before_pruning(self) -> Recipe:
        """A plan is on what surgery has made."""
        pruned = [step.pruning is not None for step in self.steps]
        first = pruned.index(True) if any(pruned) else len(pruned)
        if any(step.surgery is not None for step in self.steps[first:]):
            raise ValueError("surgery comes before the first prune step")
        return self

    @model_validator(mode="after")
    def something_to_sparsify_for(self) -> Recipe:
        """What a growing penalty holds down is what the next prune step removes."""
        for number, step in enumerate(self.steps):
            growing = step.sparsify is not None and step.sparsify.penalty == "growing"
            if growing and pruning_at(self.steps, number) is None:
                raise ValueError("a sparsify step needs a prune step after it")
        return self

    @model_validator(mode="after")
    def training_to_fade_in(self) -> Recipe:
        """What fades is a ReLU only after training."""
        fading = False
        for step in self.steps:
            if fading and step.verb == "qat":
                break
            fading = fading and step.verb not in TRAINING
            fading = fading or (step.surgery is not None and step.surgery.progressive)
        if fading:
            raise ValueError("after progressive surgery there has to be a finetune step")
        return self

    @model_validator(mode="after")
    def int8_to_train_for(self) -> Recipe:
        """A qat step needs to know whose int8 it prepares for."""
        int8 = any(target.precision == "int8" for target in self.targets)
        if not int8 and any(s.qat is not None and s.qat.runtime is None for s in self.steps):
            raise ValueError("a qat step needs an int8 target, or a runtime of its own")
        return self


def load(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides such as `data.root=DIR` or `steps.prune.align=16`.

    A list element is addressed by its index; a step also by its verb where only one has it.

    Raises:
        RecipeError: the file is missing, is not YAML, or does not validate.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"no recipe at {path}; 'bevel init' writes a starter recipe") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path}: {one_line(error)}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path} is not valid YAML: {one_line(error)}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"{path} is not a recipe: expected keys such as 'model' and 'steps'")
    for text in overrides:
        override(raw, text)
    return validate(raw, source=str(path))


def vary(recipe: Recipe, values: Mapping[str, Any], source: str = "recipe") -> Recipe:
    """The recipe with other values at dotted keys such as `steps.prune.criterion`.

    Raises:
        RecipeError: a key leads nowhere, or the result does not validate; says so after `source`.
    """
    raw = recipe.model_dump(mode="json", exclude_unset=True)
    for key, value in values.items():
        assign(raw, key, value, source)
    return validate(raw, source)


def completed(recorded: dict[str, Any]) -> dict[str, Any]:
    """A recipe that an earlier version wrote down, with what has come since at its default.

    Unchanged where it is no recipe of this version.
    """
    try:
        return Recipe.model_validate(recorded).model_dump(mode="json")
    except ValidationError:
        return recorded


def validate(raw: dict[str, Any], source: str = "recipe") -> Recipe:
    """Turn a plain mapping into a recipe.

    Raises:
        RecipeError: the first problem, as one line that names the key.
    """
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"{source}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    """The first validation problem in one line, with the nearest valid key for unknown ones."""
    problems = error.errors(include_url=False)
    first = problems[0]
    location = list(first["loc"])
    key = ".".join(str(part) for part in location)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        section = _section_at(location[:-1])
        hint = suggestion(str(location[-1]), section.model_fields)
        return f"unknown key '{key}'. {hint}{more}"
    if first["type"] == "missing":
        return f"'{key}' is missing{more}"
    message = one_line(first["msg"].removeprefix("Value error, "))
    value = first["input"]
    got = f", got {value!r}" if isinstance(value, str | int | float | bool) else ""
    return f"{key}: {message}{got}{more}" if key else f"{message}{more}"


def _section_at(location: Sequence[str | int]) -> type[Section]:
    """The section class that a validation error's location points into."""
    section: type[Section] = Recipe
    for part in location:
        if isinstance(part, int) or part not in section.model_fields:
            continue
        inner = _section_in(section.model_fields[part].annotation)
        if inner is not None:
            section = inner
    return section


def _section_in(annotation: Any) -> type[Section] | None:
    """The section class inside an annotation such as `list[Step]` or `Budget | None`."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, Section) else None
    if get_origin(annotation) in (Union, types.UnionType, Annotated, list, dict):
        for argument in get_args(annotation):
            found = _section_in(argument)
            if found is not None:
                return found
    return None
