"""Commands as they are typed in the shell of this system, for messages that advise one.

Knows nothing of which commands there are.
"""

import os
import shlex
import subprocess


def typed(*words: object) -> str:
    """Return words with quotes where the shell needs them: ("train", "a text") is train 'a text'.

    On Windows the quotes are double ones, which are the only ones there.
    """
    texts = [*map(str, words)]
    return subprocess.list2cmdline(texts) if os.name == "nt" else shlex.join(texts)
