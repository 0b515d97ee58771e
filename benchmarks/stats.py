"""`make bench-stats`: captions to noun counts, against NLTK's own functions on the same captions, one core each.

Captions are generated: half dense ones as LLaVA writes them, half alt texts as shops write them, with a long-tailed
vocabulary drawn from TextBlob's lexicon. As in Table 1 of the paper, alt texts have many more distinct words.
`SCALE=1` (or `--scale`) runs the whole stage, from Parquet shards to the report, on 100,000 and on 1,000,000 of them in
processes of their own and compares time and peak memory; then the smaller set once more with Ray across two workers,
whose numbers must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from nltk.tag.perceptron import PerceptronTagger as NltkTagger
from nltk.tokenize.destructive import NLTKWordTokenizer
from nltk.tokenize.punkt import PunktSentenceTokenizer
from rich.console import Console
from rich.table import Table

from dataset_stats.__main__ import main as stage
from dataset_stats.counting import NounCounter
from dataset_stats.tagging.perceptron import PerceptronTagger
from dataset_stats.tagging.taggers import NLTK_PARTS, LexiconTagger, find_tagger, read_nltk_part
from pipelines.store.files import sha256_file
from pipelines.store.summary import read_summary

RESULT = Path(__file__).parent / "results" / "stats.json"
ZIPF_EXPONENT = 1.07
ZIPF_SHIFT = 2.7
NUM_DENSE_WORDS = 6000  # of each kind; alt texts use the whole lexicon
SCALE_CAPTIONS = (100_000, 1_000_000)
SHARD_CAPTIONS = 50_000
TRAINING_CAPTIONS = 300
CAPTIONS_PER_TURN = 5_000
DENSE = (
    "The image features a {j} {n} {v} near a {j} {n}.",
    "There are several {n}s in the scene, including a {n}, a {j} {n} and {d} {n}s.",
    'The {n} has a sign that says "{n} {n}", and its {n} is {j}.',
    "In the background, a {n} can be seen {v} next to the {n}'s {n}, giving the {n} a {j} look.",
    "Overall, the style of the image is {j}, with a {j}-{j} {n} that isn't {v}.",
)
ALT = (
    "{j} {n} {n} - {n} {d}",
    "{n} for {n}, {j} {n} ({d} pcs)",
    "IMG_{d}.jpg",
    "Buy {n} {n} | {n}.com",
    "{n} {v} in {n}, stock photo",
)


class CaptionMaker:
    """Makes captions with a long-tailed vocabulary; the same seed gives the same captions."""

    def __init__(self, seed: int) -> None:
        from textblob.en import lexicon

        self._rng = np.random.default_rng(seed)
        words: dict[str, list[str]] = {"n": [], "j": [], "v": []}
        kinds = {"NN": "n", "NNP": "n", "JJ": "j", "VBG": "v"}
        lexicon.load()
        for word, tag in dict.items(lexicon):
            if tag in kinds and word.isalpha():
                words[kinds[tag]].append(word)
        self._words = {kind: self._rng.permutation(sorted(found)) for kind, found in words.items()}
        self._cumulative = {kind: self._zipf(len(found)) for kind, found in self._words.items()}
        self._dense = {kind: self._zipf(min(NUM_DENSE_WORDS, len(found))) for kind, found in self._words.items()}

    def captions(self, count: int) -> Iterator[str]:
        """Yield `count` captions, dense ones and alt texts in turn."""
        for index in range(count):
            if index % 2:
                yield self._fill(ALT[self._rng.integers(len(ALT))], self._cumulative)
                continue
            forms = self._rng.integers(0, len(DENSE), self._rng.integers(2, 5))
            yield " ".join(self._fill(DENSE[form], self._dense) for form in forms)

    def _zipf(self, count: int) -> np.ndarray:
        weights = (np.arange(count) + ZIPF_SHIFT) ** -ZIPF_EXPONENT
        return np.cumsum(weights / weights.sum())

    def _fill(self, form: str, cumulative: dict[str, np.ndarray]) -> str:
        parts = form.split("{")
        filled = [parts[0]]
        for part in parts[1:]:
            kind, rest = part[0], part[2:]
            filled.append(str(self._rng.integers(1, 10_000)) if kind == "d" else self._word(kind, cumulative))
            filled.append(rest)
        return "".join(filled)

    def _word(self, kind: str, cumulative: dict[str, np.ndarray]) -> str:
        index = np.searchsorted(cumulative[kind], self._rng.random() * cumulative[kind][-1])
        return str(self._words[kind][min(index, len(cumulative[kind]) - 1)])


def load_taggers(captions: Sequence[str]) -> tuple[NltkTagger, PerceptronTagger, str]:
    """NLTK's tagger and ours over the same weights: the installed ones, or ones trained here on `captions`."""
    source = find_tagger("auto")
    reference = NltkTagger(load=False)
    if source.name == "nltk":
        reference.decode_json_params([json.loads(read_nltk_part(Path(source.folder), part)) for part in NLTK_PARTS])
        kind = "installed weights"
    else:
        teacher = NounCounter(LexiconTagger())
        reference.train([sentence for text in captions for sentence in teacher.tags(text)], nr_iter=3)
        kind = "weights trained for this benchmark (NLTK's are not installed)"
    return reference, PerceptronTagger(reference.model.weights, reference.tagdict, reference.classes), kind


def count_with_nltk(captions: Sequence[str], tagger: NltkTagger, *, nouns: Counter[str]) -> int:
    """Add the captions' nouns to `nouns` by NLTK's own functions; gives the number of tokens."""
    split, tokenize = PunktSentenceTokenizer().tokenize, NLTKWordTokenizer().tokenize
    num_tokens = 0
    for caption in captions:
        for sentence in split(caption.casefold()):
            tagged = tagger.tag(tokenize(sentence))
            num_tokens += len(tagged)
            nouns.update(word for word, tag in tagged if tag.startswith("NN"))
    return num_tokens


def compare(num_captions: int) -> dict[str, object]:
    """Both on the same captions, in turns of `CAPTIONS_PER_TURN` so that a busy machine slows both alike.

    Neither loading nor compiling is timed; seconds are CPU seconds of this process.
    """
    captions = list(CaptionMaker(0).captions(num_captions))
    reference, tagger, kind = load_taggers(captions[:TRAINING_CAPTIONS])
    NounCounter(tagger).count(captions[:2])
    counter = NounCounter(tagger)
    expected: Counter[str] = Counter()
    our_seconds = nltk_seconds = 0.0
    num_tokens = 0
    for start in range(0, num_captions, CAPTIONS_PER_TURN):
        turn = captions[start : start + CAPTIONS_PER_TURN]
        times = [time.process_time()]
        counter.count(turn)
        times.append(time.process_time())
        num_tokens += count_with_nltk(turn, reference, nouns=expected)
        times.append(time.process_time())
        our_seconds += times[1] - times[0]
        nltk_seconds += times[2] - times[1]
    start_seconds = time.process_time()
    nouns = counter.take()
    our_seconds += time.process_time() - start_seconds
    found = dict(zip(nouns["noun"].to_pylist(), nouns["count"].to_pylist(), strict=True))
    return {
        "ratio_nltk": round(nltk_seconds / our_seconds, 1),
        "identical": found == dict(expected),
        "num_captions": num_captions,
        "num_tokens": num_tokens,
        "distinct_nouns": len(found),
        "nltk_seconds": round(nltk_seconds, 3),
        "our_seconds": round(our_seconds, 3),
        "weights": kind,
        "nltk": version("nltk"),
    }


def write_shards(folder: Path, num_captions: int) -> None:
    """Generated captions as Parquet shards of `SHARD_CAPTIONS` rows."""
    maker = CaptionMaker(0)
    for number in range(num_captions // SHARD_CAPTIONS):
        table = pa.table({"caption": list(maker.captions(SHARD_CAPTIONS))})
        pq.write_table(table, folder / f"{number:04d}.parquet")


def run_stage(folder: Path, num_captions: int, *, num_workers: int) -> dict[str, Any]:
    """The stage in this process (`num_workers` 0) or across Ray workers; memory and CPU time are this process's."""
    run = folder / f"run-{num_captions}-{num_workers}"
    shards = f"{folder}/{{0000..{num_captions // SHARD_CAPTIONS - 1:04d}}}.parquet"
    recipe = folder / "recipe.toml"
    recipe.write_text('[data]\nshards = "{run}/none/*.tar"\n[dataset_stats]\n')
    settings = [f"dataset_stats.sets=web={shards}", "engine.samples_per_slice=25000"]
    settings += [f"engine.num_workers={num_workers}"] if num_workers else ["engine.in_process=true"]
    sys.argv = ["dataset_stats", "--recipe", str(recipe), "--run", str(run)]
    for setting in settings:
        sys.argv += ["--set", setting]
    start_seconds = time.process_time()
    stage()
    seconds = time.process_time() - start_seconds
    return {
        "num_captions": num_captions,
        "num_workers": num_workers,
        "seconds": round(seconds, 2),
        "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2, 2),
        "distinct_nouns": read_summary(run)["dataset_stats"]["web"]["distinct_nouns"],
        "nouns_sha256": sha256_file(run / "stats" / "nouns.parquet"),
    }


def measure_scale() -> dict[str, object]:
    """Run the stage on 10 times as many captions: time should grow 10 times, memory hardly; then across workers."""
    runs = []
    with tempfile.TemporaryDirectory() as name:
        write_shards(Path(name), max(SCALE_CAPTIONS))
        for num_captions, num_workers in [*((count, 0) for count in SCALE_CAPTIONS), (min(SCALE_CAPTIONS), 2)]:
            command = [sys.executable, "-m", "benchmarks.stats", "--stage", name, str(num_captions), str(num_workers)]
            finished = subprocess.run(command, check=True, capture_output=True, text=True)
            runs.append(json.loads(finished.stdout.splitlines()[-1]))
    small, large, spread = runs
    return {
        "scale": runs,
        "ratio_seconds_10x": round(large["seconds"] / small["seconds"], 1),
        "peak_gigabytes": large["peak_gigabytes"],
        "identical_workers": spread["nouns_sha256"] == small["nouns_sha256"],
    }


def main() -> None:
    """Print a table, and as last line one JSON object; write the same to benchmarks/results/stats.json."""
    parser = argparse.ArgumentParser(description="Noun counting against NLTK's own functions.")
    parser.add_argument("--captions", type=int, default=100_000)
    parser.add_argument("--scale", action="store_true", default=os.environ.get("SCALE") == "1")
    parser.add_argument("--stage", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        folder, num_captions, num_workers = options.stage
        print(json.dumps(run_stage(Path(folder), int(num_captions), num_workers=int(num_workers))))
        return
    result = compare(options.captions)
    if options.scale:
        result |= measure_scale()
    table = Table("", "seconds", "captions/s", "tokens/s", title=f"{options.captions:,} captions, {result['weights']}")
    for name, key in (("NLTK", "nltk_seconds"), ("dataset_stats", "our_seconds")):
        seconds = float(str(result[key]))
        rates = [f"{int(str(result[count])) / seconds:,.0f}" for count in ("num_captions", "num_tokens")]
        table.add_row(name, f"{seconds:.2f}", *rates)
    Console().print(table)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
