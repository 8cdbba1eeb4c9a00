"""Find OpenAI's published weights in the local cache of Hugging Face's hub, or download them.

Knows nothing of the files' contents. huggingface_hub provides the cache, the progress bar (on a
terminal only) and the settings, such as HF_HOME, HF_HUB_OFFLINE and HF_ENDPOINT.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..machine.environment import decline_telemetry

PUBLISHED = {  # our name of a model, which was once its repository's whole name
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}
FILES = ("config.json", "tokenizer.json", "model.safetensors")  # the small ones first
BY_HAND = f"put its {', '.join(FILES[:-1])} and {FILES[-1]} into a folder and import that"
PATIENCE = 10.0  # seconds for the first response; huggingface_hub's own limit for later ones


def fetch_published(name: str) -> Path:
    """Return the local folder with a published model's FILES, downloading those not in the cache.

    OSError in one line if that fails.
    """
    if name not in PUBLISHED:
        raise ValueError(f"{name} is not a published GPT-2: use one of {', '.join(PUBLISHED)}")
    decline_telemetry()
    try:
        import huggingface_hub
    except ImportError as error:
        raise FileNotFoundError(
            f"downloading {name} needs huggingface_hub: pip install 'gptsmith[hub]', or {BY_HAND}"
        ) from error
    for repository in (PUBLISHED[name], name):
        found = [huggingface_hub.try_to_load_from_cache(repository, file) for file in FILES]
        if all(isinstance(path, str) for path in found):
            return Path(str(found[0])).parent
    try:
        with only_errors_logged():
            return download(PUBLISHED[name])
    except Exception as error:  # its own errors, or those of whichever HTTP library it uses
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = lines[0].rstrip(".")
        raise OSError(
            f"{name} could not be downloaded ({reason}): try again, or {BY_HAND}"
        ) from error


def download(repository: str) -> Path:
    """Download a repository's FILES, all of one version, and return their folder in the cache."""
    import huggingface_hub

    # Fails at once without a network; downloading a file would retry for half a minute.
    huggingface_hub.HfApi().model_info(repository, timeout=PATIENCE)
    folder = Path(huggingface_hub.hf_hub_download(repository, FILES[0])).parent
    for file in FILES[1:]:
        huggingface_hub.hf_hub_download(repository, file, revision=folder.name)
    return folder


@contextmanager
def only_errors_logged() -> Iterator[None]:
    """Silence huggingface_hub's warnings about retries; progress bars are still shown."""
    from huggingface_hub.utils.logging import get_verbosity, set_verbosity

    before = get_verbosity()
    set_verbosity(max(before, logging.ERROR))
    try:
        yield
    finally:
        set_verbosity(before)
