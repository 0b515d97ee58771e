"""The processor of any vision-language model of transformers: for images and texts, without what videos would need."""

import copy
import json
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.hub import cached_file
from transformers.utils.import_utils import is_torchvision_available

from encoders.weights import ModelSource, loadable
from errors import UserError

# Where a model says which processor it has, in the order in which transformers looks.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
PARTS = {
    "image_processor": AutoImageProcessor,
    "tokenizer": AutoTokenizer,
    "feature_extractor": AutoFeatureExtractor,
}
VIDEOS = "video_processor"
SERVER = 'a server can have it: captioning.engine = "openai"'


class ProcessorCopies:
    """One processor for each thread that asks at a time.

    A tokenizer's Rust half refuses to be used by two threads while one of them adjusts it; images take longest, and
    threads that took turns would prepare them one by one.
    """

    def __init__(self, processor: Any) -> None:
        """Take the processor that all are copies of, which nobody changes from now on."""
        self._processor = processor
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()

    @contextmanager
    def take(self) -> Iterator[Any]:
        """Lend a processor to the calling thread alone."""
        try:
            processor = self._idle.get_nowait()
        except queue.Empty:
            processor = copy.deepcopy(self._processor)
        try:
            yield processor
        finally:
            self._idle.put(processor)


class NoVideos(dict):
    """Stands where a processor has one for videos: those need torchvision, and captions are of images.

    Empty settings, so that the processor can be printed and copied like any other.
    """

    # SmolVLM's asks for these with every chat, and uses them for videos only.
    num_frames = fps = None


def load_processor(source: ModelSource, *, config: Any, named: str) -> Any:
    """Load the processor of a model with this `config` of transformers; `named` is the model as errors call it.

    Raises:
        UserError: its files are missing or broken, it sees no images, or needs a package that is not installed.
    """
    try:
        processor = _load(source, config)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the processor of {named} needs a package that is not installed ({reason}); {SERVER}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # also where JSON holds something else
        raise UserError(f"{named} has no processor that can be loaded: {str(error).splitlines()[0]}") from error
    for part in ("image_processor", "tokenizer"):
        if getattr(processor, part, None) is None:
            raise UserError(
                f"{named} comes with a {type(processor).__name__} without {part}: its folder lacks the files of one "
                "(preprocessor_config.json or processor_config.json; tokenizer.json), or it sees no images"
            )
    return processor


def _load(source: ModelSource, config: Any) -> Any:
    location, revision = loadable(source, key="captioning.model"), source.revision or "main"
    processor_class = _find_class(source, config)
    attributes = processor_class.get_attributes() if processor_class is not None else []
    if is_torchvision_available() or VIDEOS not in attributes or not {VIDEOS, *PARTS}.issuperset(attributes):
        return AutoProcessor.from_pretrained(location, revision=revision)
    # What `from_pretrained` does, but for the videos.
    parts = [
        PARTS[name].from_pretrained(location, revision=revision) if name in PARTS else NoVideos() for name in attributes
    ]
    blind_to_videos = _without_videos(processor_class)
    settings, _ = blind_to_videos.get_processor_dict(location, revision=revision)
    return blind_to_videos.from_args_and_dict(parts, settings)


def _without_videos(processor_class: Any) -> Any:
    """Return a subclass that takes `NoVideos`, where each part is asked for its class."""

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        if isinstance(argument, NoVideos):
            return NoVideos
        return super(subclass, self).check_argument_for_proper_class(argument_name, argument)

    subclass = type(processor_class.__name__, (processor_class,), {"check_argument_for_proper_class": check})
    return subclass


def _find_class(source: ModelSource, config: Any) -> Any | None:
    """Return the class that the model's files name, else the one transformers has for its config, or None."""
    for file in PROCESSOR_FILES:
        path = cached_file(
            source.location,
            file,
            revision=source.revision or "main",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        name = json.loads(Path(path).read_text()).get("processor_class") if path is not None else None
        if name is not None:
            return getattr(transformers, name, None)
    return PROCESSOR_MAPPING.get(type(config), None)
