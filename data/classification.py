"""The tasks under the original's class names: `BoolQTask().dataset_train()`, as in GluonNLP.

    from data.classification import BoolQTask, get_task
    name, dataset = BoolQTask().dataset_train()
    passage, question, label = dataset[0]

Files are looked for in $MXNET_HOME/datasets or ~/.mxnet/datasets; nothing is downloaded.
"""

from __future__ import annotations

from typing import Any, ClassVar, Optional, Tuple, Union

from bort.errors import UserError
from data import tasks
from data.task import Example, Task

__all__ = [
    "AXbTask",
    "AXgTask",
    "BoolQTask",
    "CBTask",
    "COPATask",
    "ClassificationTask",
    "CoLATask",
    "MNLITask",
    "MRPCTask",
    "MultiRCTask",
    "QNLITask",
    "QQPTask",
    "RACEHTask",
    "RACEMTask",
    "RTETask",
    "RaceHTask",
    "RaceMTask",
    "ReCoRDTask",
    "SSTTask",
    "STSBTask",
    "SuperGLUERTETask",
    "WNLITask",
    "WSCTask",
    "WiCTask",
    "get_task",
]

Dataset = Any  # mxnet.gluon.data.SimpleDataset
Segment = Tuple[str, Dataset]


class ClassificationTask:
    """A task as GluonNLP's users know it: class labels, and one dataset per segment.

    class_labels: names of the classes; None for regression.
    is_pair: whether an input is made of two or more texts.
    """

    task_name: ClassVar[str] = ""

    def __init__(self, name: Optional[str] = None, data_dir: Optional[str] = None) -> None:
        """Look a task up by its name; `data_dir`: see `data.task.Task.search_paths`."""
        self.task: Task = tasks.get_task(name or self.task_name)
        self._data_dir = data_dir

    @property
    def class_labels(self) -> Optional[list[str]]:
        """Names of the classes, None for regression."""
        return list(self.task.labels) or None

    @property
    def is_pair(self) -> bool:
        """Whether an input is made of two or more texts."""
        return self.task.text_columns == () or len(self.task.text_columns) > 1

    def get_dataset(self, segment: str = "train") -> Dataset:
        """Return the examples of a segment: train, dev or test; MNLI has dev_matched and others.

        An item is a list: the texts of the input, of several options or candidates a list of texts
        each, and then the name of the label (STS-B: the score), where the segment is labelled.
        Raises `UserError` when the task has no such segment or its file is missing or broken.
        """
        from mxnet.gluon.data import SimpleDataset

        if segment not in self.task.splits:
            known = ", ".join(self.task.splits)
            raise UserError(f"{self.task.name}: has no segment {segment}; it has {known}")
        examples = self.task.read(self._data_dir, segment).examples
        return SimpleDataset([self._item(example) for example in examples])

    def _item(self, example: Example) -> list[Any]:
        texts = [list(one_input) for one_input in example.inputs]
        fields: list[Any] = list(texts[0]) if len(texts) == 1 else list(texts)
        if example.label is None:
            return fields
        labels = self.task.labels
        return [*fields, labels[int(example.label)] if labels else example.label]

    def dataset_train(self) -> Segment:
        """Return ("train", dataset); raises `UserError` for a task that is only predicted."""
        return "train", self.get_dataset("train")

    def dataset_dev(self) -> Union[Segment, list[Segment]]:
        """Return ("dev", dataset), of MNLI a list of two such pairs."""
        return self._segments(self.task.dev or ("dev",))

    def dataset_val(self) -> Union[Segment, list[Segment]]:
        """Return what `dataset_dev` does."""
        return self.dataset_dev()

    def dataset_test(self) -> Union[Segment, list[Segment]]:
        """Return ("test", dataset), of MNLI a list of two such pairs."""
        return self._segments(self.task.test)

    def _segments(self, names: tuple[str, ...]) -> Union[Segment, list[Segment]]:
        pairs = [(name, self.get_dataset(name)) for name in names]
        return pairs[0] if len(pairs) == 1 else pairs


def get_task(name: str) -> ClassificationTask:
    """Return the task of a name or alias, such as "SST" or "BoolQ"; also RACE and GLUE's AX.

    Raises `UserError` for an unknown name.
    """
    return ClassificationTask(name)


def _class_of(class_name: str, task_name: str) -> type[ClassificationTask]:
    """Return a class that makes one task; its docstring is that of the task."""
    documentation = type(tasks.get_task(task_name)).__doc__
    members = {"task_name": task_name, "__doc__": documentation, "__module__": __name__}
    return type(class_name, (ClassificationTask,), members)


MRPCTask = _class_of("MRPCTask", "MRPC")
QQPTask = _class_of("QQPTask", "QQP")
QNLITask = _class_of("QNLITask", "QNLI")
RTETask = _class_of("RTETask", "RTE")
STSBTask = _class_of("STSBTask", "STS-B")
CoLATask = _class_of("CoLATask", "CoLA")
MNLITask = _class_of("MNLITask", "MNLI")
WNLITask = _class_of("WNLITask", "WNLI")
SSTTask = _class_of("SSTTask", "SST-2")
SuperGLUERTETask = _class_of("SuperGLUERTETask", "SuperGLUERTE")
CBTask = _class_of("CBTask", "CB")
WSCTask = _class_of("WSCTask", "WSC")
WiCTask = _class_of("WiCTask", "WiC")
COPATask = _class_of("COPATask", "COPA")
MultiRCTask = _class_of("MultiRCTask", "MultiRC")
BoolQTask = _class_of("BoolQTask", "BoolQ")
ReCoRDTask = _class_of("ReCoRDTask", "ReCoRD")
AXbTask = _class_of("AXbTask", "AX-b")
AXgTask = _class_of("AXgTask", "AX-g")
RACEHTask = RaceHTask = _class_of("RACEHTask", "RACE-H")
RACEMTask = RaceMTask = _class_of("RACEMTask", "RACE-M")
