"""Where OpenAI's published weights are: in the local cache of Hugging Face's hub, or downloaded.

Knows nothing of what is in the files. huggingface_hub does all the work: its cache, its progress
bar (on a terminal only), and its settings, such as HF_HOME, HF_HUB_OFFLINE and HF_ENDPOINT.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..machine.environment import decline_telemetry

PUBLISHED = {  # the word for a model, which was also its repository's whole name once
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}
FILES = ("config.json", "tokenizer.json", "model.safetensors")  # the small ones first
BY_HAND = f"put its {', '.join(FILES[:-1])} and {FILES[-1]} into a folder and import that"
PATIENCE = 10.0  # seconds for the first answer, as huggingface_hub gives each later one


def fetch_published(name: str) -> Path:
    """The local folder with a published model's FILES, downloaded unless the cache has them all.

    OSError of one line where they cannot be had.
    """
    if name not in PUBLISHED:
        raise ValueError(f"{name} is no published GPT-2: one of {', '.join(PUBLISHED)} is needed")
    decline_telemetry()
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"{name} is downloaded by huggingface_hub: pip install 'gptsmith[hub]', or {BY_HAND}"
        ) from error
    for repository in (PUBLISHED[name], name):
        found = [huggingface_hub.try_to_load_from_cache(repository, file) for file in FILES]
        if all(isinstance(path, str) for path in found):
            return Path(str(found[0])).parent
    try:
        with only_errors_said():
            return download(PUBLISHED[name])
    except Exception as error:  # its own, or those of the HTTP library that its version is built on
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].rstrip(".")
        raise OSError(
            f"{name} could not be downloaded ({reason}): try again, or {BY_HAND}"
        ) from error


def download(repository: str) -> Path:
    """The folder in the cache that a repository's FILES were downloaded to, all of one version."""
    import huggingface_hub

    # Fails at once without a network; the download of a file would try again for half a minute.
    huggingface_hub.HfApi().model_info(repository, timeout=PATIENCE)
    folder = Path(huggingface_hub.hf_hub_download(repository, FILES[0])).parent
    for file in FILES[1:]:
        huggingface_hub.hf_hub_download(repository, file, revision=folder.name)
    return folder


@contextmanager
def only_errors_said() -> Iterator[None]:
    """Let huggingface_hub keep what it has to say of its attempts to itself; bars are shown."""
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    before = get_verbosity()
    set_verbosity(max(before, logging.ERROR))
    try:
        yield
    finally:
        set_verbosity(before)
