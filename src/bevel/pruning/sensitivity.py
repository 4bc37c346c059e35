"""How much worse a network gets when one channel group is cut: a map of group x width.

Every point of the map is saved as soon as it is measured, so a killed map goes on where it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import torch
from pydantic import Field, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from bevel.core.errors import PruningError, one_line
from bevel.core.files import write_text
from bevel.core.modes import evaluating
from bevel.core.progress import track
from bevel.core.records import Record
from bevel.graph.couplings import Analysis
from bevel.models.batchnorm import recalibrate
from bevel.pruning.allocate import RankedGroup
from bevel.pruning.apply import prune
from bevel.pruning.contents import ContentHash
from bevel.pruning.plan import make_plan

FILE = "sensitivity.json"
"""The map's file, in the folder that it is given."""

Batches = Sequence[tuple[Tensor, Tensor]]


class Point(Record):
    """What cutting one group to one width costs on held-out images.

    `loss` is the rise of the cross-entropy, `accuracy` what is lost of the share of right answers.
    """

    index: int
    group: str
    kept: int
    rows: int
    loss: float
    accuracy: float


class Score(Record):
    """Mean cross-entropy, and the share of images whose highest output is the label."""

    loss: float
    accuracy: float


class SensitivityMap(Record):
    """The file: what it was measured on as content hashes, the uncut network, the points."""

    network: str
    ranking: str
    images: str
    uncut: Score | None = None
    points: list[Point] = Field(default_factory=list)

    @staticmethod
    def load(path: Path) -> SensitivityMap:
        """Read a map.

        Raises:
            PruningError: the file cannot be read, or is no map.
        """
        try:
            return SensitivityMap.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValidationError) as error:
            raise PruningError(
                f"{path} is not a sensitivity map ({one_line(error, 100)}): delete it, and it is "
                "measured anew"
            ) from error


class Sensitivity:
    """Measures points of the map, side by side; known ones are taken from the file.

    Batch-norm statistics are re-estimated on the same images first, for the uncut network too, so
    that the rise measures what was lost and not the shift of statistics that any cut causes. The
    outputs of the uncut network do not change, so only their loss and accuracy are kept.

    Args:
        net: the network; it is not changed.
        analysis: its groups.
        groups: them, ranked: a map is of one ranking.
        batches: images and labels.
        folder: where the map is kept; None: nowhere.

    Raises:
        PruningError: the folder holds the map of something else.
    """

    def __init__(
        self,
        net: nn.Module,
        analysis: Analysis,
        groups: Sequence[RankedGroup],
        batches: Iterable[tuple[Tensor, Tensor]],
        folder: Path | None = None,
    ) -> None:
        self.net, self.analysis, self.batches = net, analysis, list(batches)
        self.path = folder / FILE if folder is not None else None
        network, ranking, images = ContentHash(), ContentHash(), ContentHash()
        network.network(net)
        for group in groups:
            ranking.array(group.rows)
        images.each(self.batches)
        self.map = SensitivityMap(
            network=network.hexdigest(),
            ranking=ranking.hexdigest(),
            images=images.hexdigest(),
        )
        if self.path is not None and self.path.exists():
            self.map = _of_the_same(self.map, SensitivityMap.load(self.path), self.path)

    def __call__(self, probes: Sequence[tuple[RankedGroup, int]]) -> list[float]:
        """Rise of the loss for each (group, kept rows), with only that group cut to its best rows.

        The points are independent, so each is measured by a thread of its own on a copy of its
        own, with one thread of torch's: the sum does not depend on how many threads there are.
        """
        known = {(point.index, point.kept): point.loss for point in self.map.points}
        missing = [(g, kept) for g, kept in probes if (g.index, kept) not in known]
        if missing:
            with _pool() as pool:
                uncut = self._uncut(pool)
                futures = {pool.submit(self._cut, *probe): probe for probe in missing}
                for future in track(as_completed(futures), "sensitivity", len(futures)):
                    group, kept = futures[future]
                    score = future.result()
                    point = Point(
                        index=group.index,
                        group=group.name,
                        kept=kept,
                        rows=group.size,
                        loss=score.loss - uncut.loss,
                        accuracy=uncut.accuracy - score.accuracy,
                    )
                    self._keep(points=[*self.map.points, point])
                    known[point.index, point.kept] = point.loss
        return [known[group.index, kept] for group, kept in probes]

    def _uncut(self, pool: ThreadPoolExecutor) -> Score:
        """The uncut network, measured once."""
        if self.map.uncut is not None:
            return self.map.uncut
        whole = prune(self.net, make_plan(self.analysis, {}))
        score = pool.submit(self._score, whole).result()
        self._keep(uncut=score)
        return score

    def _cut(self, group: RankedGroup, kept: int) -> Score:
        plan = make_plan(self.analysis, {group.index: group.keep_mask(kept)})
        return self._score(prune(self.net, plan))

    def _score(self, net: nn.Module) -> Score:
        recalibrate(net, [images for images, _ in self.batches])
        loss, right, count = 0.0, 0, 0
        with evaluating(net), torch.no_grad():
            for images, labels in self.batches:
                outputs = net(images)
                loss += float(F.cross_entropy(outputs, labels, reduction="sum"))
                right += int((outputs.argmax(1) == labels).sum())
                count += len(labels)
        return Score(loss=loss / count, accuracy=right / count)

    def _keep(self, **changes: object) -> None:
        self.map = self.map.model_copy(update=changes)
        self.map.points.sort(key=lambda point: (point.index, -point.kept))
        if self.path is not None:
            write_text(self.path, self.map.model_dump_json(indent=1) + "\n")


def _of_the_same(wanted: SensitivityMap, found: SensitivityMap, path: Path) -> SensitivityMap:
    """The found map if it is of the same network, ranking and images.

    Raises:
        PruningError: it is not; says of what it is another.
    """
    what = {
        "network": "another network",
        "ranking": "another ranking of its channels (criterion, reduction or seed)",
        "images": "other images",
    }
    for name, words in what.items():
        if getattr(wanted, name) != getattr(found, name):
            raise PruningError(
                f"{path} is the sensitivity map of {words}: delete it, or give another folder"
            )
    return found


@contextmanager
def _pool() -> Iterator[ThreadPoolExecutor]:
    """As many threads as torch has, each with one of torch's.

    Points measured side by side beat the threads of torch inside one: the layers of a network for
    small images are too short to be shared out. Processes would have to be sent the images.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # a part of what was set is the whole process's
