#!/usr/bin/env python3
"""Turn text into pretraining shards: sequences of full sentences, tokens masked for masked-LM."""

from __future__ import annotations

from typing import Optional, Sequence

from bort.cluster import ClusterSettings
from bort.config import parse
from bort.errors import entry_point
from bort.tokenization import TokenizerSettings
from data.masking import MaskingSettings, SequenceSettings
from data.preparation import CorpusSettings
from data.shard_jobs import prepare
from data.shards import Manifest


@entry_point
def main(argv: Optional[Sequence[str]] = None) -> Manifest:
    """Make the shards that the flags ask for and return their manifest."""
    classes = (CorpusSettings, TokenizerSettings, SequenceSettings, MaskingSettings)
    *settings, machines = parse(str(__doc__), argv, *classes, ClusterSettings)
    return prepare(*settings, machines.cluster)


if __name__ == "__main__":
    main()
